"""Data sets of image files, one folder for each class."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.files import local_path, printable

if TYPE_CHECKING:
    import tensorflow as tf

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
_OTHER_IMAGES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".svg", ".psd", ".dng")
_TEST_FOLDERS = ("val", "validation", "test")
# Folders that operating systems, archives and network disks leave behind.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "lost+found", "$RECYCLE.BIN", "__pycache__"}
_SYSTEM_FOLDERS |= {"System Volume Information"}
_SIZES = 1 << 15  # files whose size enters the fingerprint; more would take seconds
_HIDDEN_FOLDER, _HIDDEN_FILE = "hidden folder", "hidden file"


class FolderExamples:
    """Random access to image files.

    Args:
        paths: the files.
        labels: integer labels `(len(paths),)`.
        left_out: number of things in the folder that are not examples, by reason.
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray, left_out: Mapping[str, int] | None = None):
        self.paths = list(paths)
        self.labels = np.asarray(labels, np.int64)
        self.left_out = collections.Counter(left_out or {})

    def __len__(self) -> int:
        return len(self.paths)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the encoded image and the label of example `i`, in a graph."""
        import tensorflow as tf

        paths, labels = self._tensors
        return tf.io.read_file(paths[i]), labels[i]

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        return printable(self.paths[i])

    @functools.cached_property
    def nbytes(self) -> int:
        """Return the size of all files, in bytes."""
        return sum(os.stat(path).st_size for path in self.paths)

    def parts(self) -> Iterator[bytes]:
        """Yield values that identify the split wherever it is stored: class, name and label of each file.

        The sizes of up to 32,768 files, spread evenly over their order, are included.

        Raises:
            OSError: if a file is gone.
        """
        yield os.fsencode("\0".join("/".join(path.rsplit(os.sep, 2)[1:]) for path in self.paths))
        yield self.labels.tobytes()
        sample = self.paths[:: -(-len(self.paths) // _SIZES) or 1]
        yield np.array([os.stat(path).st_size for path in sample], np.int64).tobytes()

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        import tensorflow as tf

        with tf.init_scope():  # bytes, because a name need not be UTF-8
            return tf.constant([os.fsencode(path) for path in self.paths]), tf.constant(self.labels)


def read_folder(
    root: str | os.PathLike[str], needs_test: bool = True
) -> tuple[FolderExamples, FolderExamples, list[str]]:
    """List the images in `root/train/CLASS/` and `root/val/CLASS/` (or `validation`, or `test`).

    Classes are numbered by the lines of `root/labels.txt` if that file exists, which may list classes without a folder.
    Otherwise they are numbered in the order of their names, as for ImageNet.

    Hidden folders and folders of operating systems (`.ipynb_checkpoints`, `__MACOSX`) are not classes, unless
    `labels.txt` lists them. Hidden files (`._1.jpg`) are not images. `FolderExamples.left_out` counts everything that
    is not an example.

    Args:
        root: the folder, on a local disk.
        needs_test: whether the test split must have a folder. If False, the split is empty without one.

    Returns:
        The training split, the test split, and the classes. A split is ordered by class name, then by file name.

    Raises:
        FileNotFoundError: if a split has no folder or no images.
        ValueError: if `root` is not local, a folder belongs to no class, or `labels.txt` lists a class twice.
    """
    root = local_path(root, "data_dir")
    train = root / "train"
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir() or (needs_test and not test):
        raise FileNotFoundError(
            f"A folder of images needs {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg (or validation, or test). "
            f"Received: `data_dir` without a folder {'val' if train.is_dir() else 'train'}, data_dir={root}"
        )
    numbering = root / "labels.txt"
    if numbering.is_file():
        # The bytes of a name that is not UTF-8 are kept, as in the names of folders.
        lines = numbering.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        twice = [name for name, count in collections.Counter(classes).items() if count > 1]
        if twice:
            raise ValueError(f"{numbering} lists a class twice: {printable(twice[0])}")
    else:
        classes = sorted(entry.name for entry in os.scandir(train) if _holds(entry.is_dir) and not _is_hidden(entry))
    return _split(train, classes), _split(test, classes) if test else FolderExamples([], np.array([])), classes


def _split(folder: Path, classes: list[str]) -> FolderExamples:
    number = {name: i for i, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    left_out: collections.Counter[str] = collections.Counter()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not _holds(entry.is_dir):
            left_out[_HIDDEN_FILE if _is_hidden(entry) else "file beside the folders of the classes"] += 1
        elif entry.name in number:
            files, others = _images(entry.path)
            paths += files
            labels += [number[entry.name]] * len(files)
            left_out += others
        elif _is_hidden(entry):
            left_out[_HIDDEN_FOLDER] += 1
        else:
            raise ValueError(
                f"{printable(entry.path)} is not one of the {len(number)} classes of the training split or of "
                "labels.txt."
            )
    if not paths:
        found = f" It has: {describe_left_out(left_out)}." if left_out else ""
        raise FileNotFoundError(f"{folder} has no images: expected {folder}/CLASS/*.jpg.{found}")
    return FolderExamples(paths, np.array(labels), left_out)


def _images(folder: str) -> tuple[list[str], collections.Counter[str]]:
    """Return the images in the folder of a class, and the count of everything else by reason."""
    paths = []
    left_out: collections.Counter[str] = collections.Counter()
    for entry in os.scandir(folder):
        if _holds(entry.is_dir):
            if _is_hidden(entry):
                left_out[_HIDDEN_FOLDER] += 1
            else:
                deeper = sum(1 for _ in _files_below(entry.path))
                left_out["file in a folder inside the folder of a class"] += deeper
                left_out["empty folder inside the folder of a class"] += not deeper
        elif _is_hidden(entry):
            left_out[_HIDDEN_FILE] += 1
        elif not _holds(entry.is_file):
            left_out["broken link" if entry.is_symlink() else "special file"] += 1
        elif entry.name.lower().endswith(SUFFIXES):
            paths.append(entry.path)
        else:
            left_out[_reason(entry.name)] += 1
    return sorted(paths), +left_out


def _files_below(folder: str) -> Iterator[str]:
    """Yield the names of the files in a folder and in those inside it, without hidden ones."""
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden_name(name)]
        yield from (name for name in files if not name.startswith("."))


def _holds(question: Callable[[], bool]) -> bool:
    """Call `DirEntry.is_dir` or `is_file`, which fail for a link to itself."""
    try:
        return question()
    except OSError:
        return False


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return _is_hidden_name(entry.name) if _holds(entry.is_dir) else entry.name.startswith(".")


def _is_hidden_name(folder: str) -> bool:
    return folder.startswith(".") or folder in _SYSTEM_FOLDERS


def _reason(name: str) -> str:
    """Return the reason why a file is not an example, by its suffix."""
    suffix = os.path.splitext(printable(name))[1].lower()
    if suffix in _OTHER_IMAGES:
        return f"{suffix} file, which cannot be decoded"
    return f"{suffix} file" if suffix else "file without a suffix"


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return the counts in words: `2 x broken link, 1 x .txt file`."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(left_out.items()))


def empty_classes(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Return the classes without an image, for messages."""
    counts = np.bincount(labels, minlength=len(classes))
    return [printable(name) for name, count in zip(classes, counts, strict=True) if not count]
