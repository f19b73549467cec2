"""Data sets of image files, one folder for each class."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_TEST_FOLDERS = ("val", "validation", "test")


class FolderExamples:
    """Random access to image files.

    Args:
        paths: the files.
        labels: integer labels `(len(paths),)`.
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.paths = list(paths)
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the encoded image and the label of example `i`, in a graph."""
        import tensorflow as tf

        paths, labels = self._tensors
        return tf.io.read_file(paths[i]), labels[i]

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        return self.paths[i]

    @functools.cached_property
    def nbytes(self) -> int:
        """Return the size of all files, in bytes."""
        return sum(os.stat(path).st_size for path in self.paths)

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        import tensorflow as tf

        with tf.init_scope():
            return tf.constant(self.paths), tf.constant(self.labels)


def read_folder(root: Path) -> tuple[FolderExamples, FolderExamples, list[str]]:
    """List the images in `root/train/CLASS/` and `root/val/CLASS/` (or `validation`, or `test`).

    Classes are numbered by the lines of `root/labels.txt` if that file exists, which may list classes without a folder.
    Otherwise they are numbered in the order of their names, as for ImageNet.

    Args:
        root: the folder.

    Returns:
        The training split, the test split, and the classes. A split is ordered by class name, then by file name.

    Raises:
        FileNotFoundError: if a split has no folder or no images.
        ValueError: if a folder belongs to no class.
    """
    train = root / "train"
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise FileNotFoundError(
            f"A folder of images needs {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg (or validation, or test). "
            f"Received: `data_dir` without a folder {'val' if train.is_dir() else 'train'}, data_dir={root}"
        )
    numbering = root / "labels.txt"
    if numbering.is_file():
        lines = numbering.read_text(encoding="utf-8").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    else:
        classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    return _split(train, classes), _split(test, classes), classes


def _split(folder: Path, classes: list[str]) -> FolderExamples:
    number = {name: i for i, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        if name not in number:
            raise ValueError(
                f"{folder / name} is not one of the {len(number)} classes of the training split or of labels.txt."
            )
        files = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(_SUFFIXES))
        paths += files
        labels += [number[name]] * len(files)
    if not paths:
        raise FileNotFoundError(f"{folder} has no images: expected {folder}/CLASS/*.jpg")
    return FolderExamples(paths, np.array(labels))
