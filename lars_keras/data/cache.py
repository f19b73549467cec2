"""Image files nearer to the processor: in memory, or copied from a slow disk or a bucket to a local one."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from tqdm import tqdm

from lars_keras.data.parallel_map import cores, each_row

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples


class InMemory:
    """A split whose files were read once, and are held as they are, not decoded.

    Args:
        examples: the split.

    Raises:
        ValueError: there is not enough memory.
    """

    def __init__(self, examples: Examples):
        import tensorflow as tf

        free = psutil.virtual_memory().available
        if examples.nbytes > 0.8 * free:
            raise ValueError(
                f"--cache=memory would take {examples.nbytes / 1e9:,.1f} GB a split, {free / 1e9:,.1f} GB are free. "
                "Use --cache=disk or --cache=none."
            )
        self._examples = examples
        unreadable = lambda i: (tf.constant(b""), tf.constant(0, tf.int64))  # noqa: E731
        ids = tf.range(len(examples), dtype=tf.int64)
        self._images, self._labels = each_row(examples.example, (ids,), cores(), unreadable)

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The bytes and the label of image `i` in a graph."""
        return self._images[i], self._labels[i]

    def where(self, i: int) -> str:
        """Which image `i` is, for people."""
        return self._examples.where(i)

    @property
    def nbytes(self) -> int:
        """Size of all images, in bytes."""
        return self._examples.nbytes


def copied(paths: Sequence[str], root: str, folder: Path) -> list[str]:
    """Copies files to a local folder, those that it has not yet.

    Each is written under another name and renamed when it is whole, so a copy that was interrupted goes on.

    Args:
        paths: files below `root`, which may be a bucket's (`gs://...`).
        root: what to leave out of their names.
        folder: where to; files keep their place below it.

    Returns:
        The paths of the copies.

    Raises:
        ValueError: there is no room in `folder`, or it cannot be written to.
    """
    from etils import epath

    pairs = [(epath.Path(path), folder / os.path.relpath(path, root)) for path in paths]
    missing = []
    for source, target in pairs:
        size = source.stat().length
        if not target.is_file() or target.stat().st_size != size:
            missing.append((source, target, size))
    needed = sum(size for _, _, size in missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        if needed > room:
            raise ValueError(
                f"--cache=disk needs {needed / 1e9:,.1f} GB in --cache_dir={folder}, which has {room / 1e9:,.1f} GB."
            )

        def copy(file: tuple[epath.Path, Path, int]) -> None:
            source, target, _ = file
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.{os.getpid()}.part")
            source.copy(part, overwrite=True)
            os.replace(part, target)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            done = tqdm(pool.map(copy, missing), total=len(missing), desc="copying to --cache_dir", disable=not missing)
            list(done)
    except OSError as e:
        raise ValueError(f"--cache_dir={folder} cannot be written to: {e}") from e
    return [str(target) for _, target in pairs]
