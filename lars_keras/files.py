"""Paths of files, and files that are written completely or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Also `gs:/bucket`, into which pathlib turns `gs://bucket`. A single letter is a drive.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Return a path on a local disk, with `~` and `~user` expanded.

    Args:
        path: the path.
        argument: name of the argument that holds it, for messages.

    Raises:
        ValueError: if it is the address of a bucket or another service (`gs://...`), or its `~user` is unknown.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise ValueError(
            f"`{argument}` must be a folder on a local or mounted disk, not an address such as gs:// or file://. Mount "
            f"the bucket (with gcsfuse, say), or copy the folder afterwards. Received: {argument}={printable(text)}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ValueError(f"`{argument}` begins with ~ of an unknown user. Received: {argument}={text}") from e


def printable(text: str) -> str:
    r"""Return a name as text that any stream accepts: bytes that are not UTF-8 become `\xe9`."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def size_text(size: float) -> str:
    """Return a number of bytes as text for people: `"12.3 GB"`, `"8.5 MB"`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file atomically. A kill leaves the old file or the new one.

    Args:
        path: the file, in an existing folder.
        text: its contents, written as UTF-8.

    Raises:
        OSError: if the file cannot be written. The old one is unchanged.
    """
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a path to write to, in the same folder, and rename its file to `path` at the end.

    A kill leaves the old file or the new one. It may leave the temporary file, which the next write overwrites.

    Args:
        path: the file, in an existing folder. An address (`gs://...`) is written directly.

    Yields:
        The path to write to; it ends as `path` does.

    Raises:
        OSError: if the file cannot be renamed.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        yield text
        return
    folder, name = os.path.split(text)
    temporary = os.path.join(folder, f".writing-{name}")
    try:
        yield temporary
        os.replace(temporary, text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
