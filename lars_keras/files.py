"""Files that are there whole or not at all."""

import os
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file at once: a kill leaves the old one or the new one.

    Args:
        path: the file, in an existing folder.
        text: its contents, written as UTF-8.

    Raises:
        OSError: if it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
