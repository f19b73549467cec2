"""Paths of files, and files that are written completely or not at all."""

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

# Also `gs:/bucket`, into which pathlib turns `gs://bucket`. A single letter is a drive.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_TEMPORARY = re.compile(r"\.writing-(?P<host>[\w.]*)-(?P<pid>\d+)-.+")


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
        OSError: if the file cannot be written. The old one or the new one is there, whole.
    """
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a path to write to, in the same folder, and rename its file to `path` at the end.

    A kill or a loss of power leaves the old file or the new one. It may leave the temporary file, which a later write
    removes.

    Args:
        path: the file, in an existing folder. An address (`gs://...`) is written directly.

    Yields:
        The path to write to; it ends as `path` does.

    Raises:
        OSError: if the file cannot be renamed, or does not reach the disk.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        yield text
        return
    folder, name = os.path.split(text)
    folder = folder or os.curdir
    remove_abandoned(folder)
    temporary = os.path.join(folder, temporary_name(name))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, text)
        with contextlib.suppress(PermissionError):  # a folder that one may write and not list
            sync(folder)  # the new name must be on the disk, too
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def temporary_name(name: str) -> str:
    """Return the name under which this process writes a file, before it gets its own; it ends as `name` does."""
    return f".writing-{_host()}-{os.getpid()}-{name}"


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of processes that are gone from a folder; those of other machines after a day."""
    for path in Path(folder).glob(".writing-*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if _is_abandoned(path):
                path.unlink()


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk, if the file system can tell.

    Raises:
        OSError: if they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not know it of folders
            raise
    finally:
        os.close(descriptor)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _is_abandoned(path: Path) -> bool:
    """Return True if the process that began to write a file is gone."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or match["host"] != _host():  # of an earlier version, or of another machine
        return time.time() - path.stat().st_mtime > 24 * 3600
    try:
        os.kill(int(match["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it is another user's
        pass
    return False
