"""Hooks of mkdocs for `make docs`: pages and files of the site that lie outside of docs/, and the notebook's page."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from tools.notebook import SOURCES, page_of

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", **{name: name for name in ("BUILD-notes.md", "CHANGELOG.md", "CONTRIBUTING.md")}}
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add README as the front page, the other pages of the root, the notebooks, and the files that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text(), "")))
    for source in SOURCES:
        files.append(File.generated(config, f"{source.stem}.md", content=page_of(source.read_text())))
    texts = [(ROOT / name).read_text() for name in PAGES] + [p.read_text() for p in (ROOT / "docs").glob("*.md")]
    for name in sorted({posixpath.normpath(link[1]) for text in texts for link in _LINK.findall(text)}):
        name = name.removeprefix("../")
        if not name.startswith("docs/") and name not in PAGES and (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the text of a page of docs/ with its links to the checkout turned to the site."""
    return _moved(markdown, "docs/") if page.file.abs_src_path else markdown


def _moved(text: str, folder: str) -> str:
    """Return Markdown of a folder of the checkout with links that are right in the site."""

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(folder + link[2])
        target = PAGES.get(target, target.removeprefix("docs/"))
        return link[1] + target + link[3]

    return _LINK.sub(moved, text)
