"""Lock a folder, so that one process at a time writes to it."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from lars_keras.runtime.errors import UsageError

_NAME = ".lock"
_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def lock_folder(folder: Path, argument: str, *, must_be_new: bool = False) -> Iterator[None]:
    """Hold a folder for this process. The folder is created, and removed again if nothing was written to it.

    The operating system releases the lock when the process ends, however it ends. So a lock is never stale.

    Args:
        folder: path of the folder.
        argument: name of the argument that names the folder, for messages.
        must_be_new: refuse a folder that exists.

    Raises:
        UsageError: if another process holds the folder, or it exists and must be new.
        OSError: if it cannot be created or written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=not must_be_new)
    except FileExistsError as e:
        if not must_be_new:
            raise
        raise UsageError(f"`{argument}` exists already: another process made it. Received: {argument}={folder}") from e
    descriptor = _acquired(folder, argument)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _NAME).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


def _acquired(folder: Path, argument: str) -> int:
    """Return the descriptor of the locked file."""
    path = folder / _NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, descriptor):  # its owner has just removed it
                os.close(descriptor)
                continue
        except BlockingIOError as e:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UsageError(
                f"`{argument}` is in use by {owner}. Wait for its end, or name another folder. "
                f"Received: {argument}={folder}"
            ) from e
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logging.warning("The file system of %s has no locks. Let one process at a time write to it.", folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
