"""Files that are written completely or not at all."""

import os
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file atomically. A kill leaves the old file or the new one.

    Args:
        path: the file, in an existing folder.
        text: its contents, written as UTF-8.

    Raises:
        OSError: if the file cannot be written. The old one is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
