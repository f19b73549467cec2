"""The text of `--help`: each flag with what it takes, then what it does."""

import textwrap
from collections.abc import Sequence
from typing import Any

_KINDS = {
    "string": "TEXT",
    "integer": "N",
    "int": "N",
    "float": "X",
    "list": "A,B,...",
    "comma separated list of strings": "A,B,...",
}


def entry(flag: str, text: str) -> list[str]:
    """Return the lines of one flag."""
    return [f"  {flag}", *textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def flag_entry(name: str, kind: str, text: str, default: Any, choices: Sequence[str] | None) -> list[str]:
    """Return the lines of one flag, with its default.

    Args:
        name: name of the flag.
        kind: kind of its value, as `flags.config` or absl calls it.
        text: what it does.
        default: its default; none is shown for None, False and lists.
        choices: the values that it takes, or None.
    """
    if default is not None and default is not False and not isinstance(default, list):
        text += f" (default: {str(default).lower()})"
    if kind == "bool":
        return entry(f"--[no]{name}", text)
    if choices and len(choices) > 5:
        return entry(f"--{name}=NAME", f"{text} Names: {', '.join(choices)}.")
    return entry(f"--{name}={'|'.join(choices or ()) or _KINDS[kind]}", text)
