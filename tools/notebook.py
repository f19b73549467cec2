"""Notebooks and their pages: a script in the percent form of jupytext is the source of both.

    python -m tools.notebook

writes docs/*.ipynb. The pages are made while the site is built.
"""

import json
import re
from pathlib import Path
from typing import Any

SOURCES = tuple(Path(__file__).parents[1] / "docs" / f"{name}.py" for name in ("quickstart", "cifar10", "tpu"))


def cells_of(script: str) -> list[tuple[str, str]]:
    """Return the cells of a script in the percent form, each as `("markdown" or "code", text)`."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", body.strip()))
    return cells


def page_of(script: str) -> str:
    """Return such a script as Markdown."""
    forms = {"markdown": "{}", "code": "```python\n{}\n```"}
    return "\n\n".join(forms[kind].format(text) for kind, text in cells_of(script)) + "\n"


def notebook_of(script: str) -> str:
    """Return such a script as the JSON of a notebook, format 4.5, without outputs."""
    cells: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells_of(script)):
        outputs: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
        source = text.splitlines(keepends=True)
        cells.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **outputs, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for source in SOURCES:
        source.with_suffix(".ipynb").write_text(notebook_of(source.read_text()))
