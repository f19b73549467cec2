"""Cache encoded images in memory, or on a local disk in place of a slow disk or a bucket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lars_keras.data.limits import cores, free_memory
from lars_keras.data.parallel_map import map_rows
from lars_keras.data.unreadable import reason_of
from lars_keras.files import printable, size_text

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples

_BLOCK = 2**23  # bytes that are copied at once
_ABANDONED = 600  # seconds without a write, after which an unfinished copy belongs to a killed process


class InMemory:
    """Holds the encoded images of a split in memory. Reads them once, and does not decode them.

    Args:
        examples: the split.

    Raises:
        ValueError: if the split does not fit into memory.
    """

    def __init__(self, examples: Examples):
        import tensorflow as tf

        free = free_memory()
        if examples.nbytes > 0.8 * free:
            raise ValueError(
                f"A split needs {size_text(examples.nbytes)} of memory, and {size_text(free)} are free. "
                "Set `cache` to disk or none. Received: cache=memory"
            )
        self._examples = examples
        self._reasons: dict[int, str] = {}  # why an image could not be read, by its number

        def record(i: np.ndarray) -> bytes:
            try:
                examples.example(i)
            except Exception as e:  # whatever a library makes of a damaged file
                self._reasons[int(i)] = reason_of(e)
            return b""

        def unreadable(i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.ensure_shape(tf.numpy_function(record, [i], tf.string), []), tf.constant(0, tf.int64)

        ids = tf.range(len(examples), dtype=tf.int64)
        self._images, self._labels = map_rows(examples.example, (ids,), cores(), unreadable)

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the encoded image and the label of example `i`, in a graph.

        An image that could not be read is empty.

        Raises:
            OSError: outside a graph, if the image could not be read, with the reason.
        """
        import tensorflow as tf

        if tf.executing_eagerly() and int(i) in self._reasons:
            raise OSError(self._reasons[int(i)])
        return self._images[i], self._labels[i]

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        return self._examples.where(i)

    @property
    def nbytes(self) -> int:
        """Return the size of all images, in bytes."""
        return self._examples.nbytes


def copy_to_local(paths: Sequence[str], root: str, folder: Path) -> list[str]:
    """Copy files to a local folder, except those that are there already, with the same size and time of change.

    A file is written under a temporary name, and renamed when it is complete. So an interrupted copy resumes at the
    next call.

    Args:
        paths: files below `root`, which may be in a bucket (`gs://...`).
        root: the folder to which paths are relative.
        folder: the local folder. Each copy keeps its path relative to `root`.

    Returns:
        The paths of the copies.

    Raises:
        ValueError: if a file cannot be read, if the disk lacks space, or if `folder` is not writable.
    """
    from etils import epath

    pairs = [(epath.Path(path), folder / os.path.relpath(path, root)) for path in paths]
    missing = []
    for source, target in pairs:
        found = source.stat()
        if not _is_copy(target, found.length, found.mtime):
            missing.append((source, target, found))
    needed = sum(found.length for _, _, found in missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned({target.parent for _, target, _ in missing})
        room = shutil.disk_usage(folder).free
        if needed > room:
            raise ValueError(
                f"The copies need {size_text(needed)} in `cache_dir`, and {size_text(room)} are free. "
                f"Received: cache_dir={folder}"
            )
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            copies = pool.map(lambda file: _copy(file[0], file[1], file[2].mtime), missing)
            list(tqdm(copies, total=len(missing), desc="copying to the cache", disable=not missing))
    except OSError as e:
        raise ValueError(f"`cache_dir` cannot be written: {e}. Received: cache_dir={folder}") from e
    return [str(target) for _, target in pairs]


def _remove_abandoned(folders: Collection[Path]) -> None:
    """Remove the unfinished copies that killed processes left."""
    for folder in folders:
        for part in folder.glob("*.[0-9]*.part"):
            with contextlib.suppress(OSError):  # another process is faster, or another user's
                if time.time() - part.stat().st_ctime > _ABANDONED:  # a finished copy gets the time of its source
                    part.unlink()


def _is_copy(path: Path, size: int, mtime: int) -> bool:
    """Return True for a file of this size and time of change; `mtime` is 0 if the file system does not tell it."""
    if not path.is_file():
        return False
    found = path.stat()
    # Some file systems keep a time to 2 seconds.
    return found.st_size == size and (not mtime or abs(found.st_mtime - mtime) <= 2)


def _copy(source: Any, target: Path, mtime: int) -> None:
    """Copy a file and its time of change.

    Raises:
        ValueError: if `source` cannot be read.
        OSError: if `target` cannot be written; it names the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes in containers may have one number, and share the folder.
    part = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            for block in _blocks(source):
                file.write(block)
        if mtime:
            os.utime(part, (mtime, mtime))
        os.replace(part, target)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:  # a failed write does not name its file
            e.filename = str(target)
        raise


def _blocks(source: Any) -> Iterator[bytes]:
    """Yield the contents of a file, which may be in a bucket. Raise a `ValueError` if it cannot be read."""
    try:
        with source.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except Exception as e:  # of the operating system, TensorFlow or fsspec
        raise ValueError(f"{printable(os.fspath(source))} cannot be read: {reason_of(e)}") from e
