"""A data set as many hold ImageNet: one folder of image files for each class."""

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
    """Image files by number.

    Args:
        paths: the files.
        labels: integer `(len(paths),)`.
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.paths = list(paths)
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The bytes and the label of image `i` in a graph."""
        import tensorflow as tf

        paths, labels = self._tensors
        return tf.io.read_file(paths[i]), labels[i]

    def where(self, i: int) -> str:
        """Which image `i` is, for people."""
        return self.paths[i]

    @functools.cached_property
    def nbytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(os.stat(path).st_size for path in self.paths)

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        import tensorflow as tf

        with tf.init_scope():
            return tf.constant(self.paths), tf.constant(self.labels)


def read_folder(root: Path) -> tuple[FolderExamples, FolderExamples, list[str]]:
    """Finds the images of `root/train/CLASS/` and of `root/val/CLASS/` (or `validation`, or `test`).

    Classes are numbered in the order of their names, as for ImageNet's, or in that of the lines of `root/labels.txt` if
    there is one, which may name more classes than there are folders.

    Args:
        root: the folder.

    Returns:
        The training and the test split, each in the order of class names and file names, and the classes.

    Raises:
        FileNotFoundError: a split has no folder or no images.
        ValueError: a folder is no class.
    """
    train = root / "train"
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise FileNotFoundError(
            f"--dataset=folder needs {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg (or validation, or test). "
            f"Received: --data_dir={root} without {'a folder train' if not train.is_dir() else 'a folder val'}"
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
                f"{folder / name} is no class of the training split or of labels.txt ({len(number)} classes)."
            )
        files = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(_SUFFIXES))
        paths += files
        labels += [number[name]] * len(files)
    if not paths:
        raise FileNotFoundError(f"{folder} has no images: expected {folder}/CLASS/*.jpg")
    return FolderExamples(paths, np.array(labels))
