"""Data sets of encoded images, in files or records, that are decoded when they are used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lars_keras.data.base import ImageData
from lars_keras.data.decode import NUM_DRAWS, central_crop, central_fraction, random_crop
from lars_keras.data.limits import cores
from lars_keras.data.parallel_map import map_rows
from lars_keras.data.resized import Storage, central_window, mirrored_window
from lars_keras.data.unreadable import UnreadableImages

if TYPE_CHECKING:
    import tensorflow as tf

# Over the ImageNet training images, pixel values 0 to 255.
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


class Examples(Protocol):
    """Random access to the encoded images of a split."""

    def __len__(self) -> int: ...

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the encoded image and the integer label of example `i`, in a graph."""
        ...

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        ...

    @property
    def nbytes(self) -> int:
        """Return the stored size of all images, in bytes."""
        ...


class ImageFileData(ImageData):
    """A data set of encoded images (JPEG, PNG, WebP, BMP or GIF), which are decoded when they are used.

    Training images take a random resized crop and a random flip (see `random_crop`). Test images take a central crop
    (see `central_crop`). Both are resized to `image_size` squared by bilinear interpolation, and become uint8 RGB.
    Grayscale and CMYK images are converted, and the EXIF orientation is applied.

    An unreadable image, and one whose label is not in `range(num_classes)`, is replaced by the mean color with label 0
    and mask 0. So its loss and score do not count, but the statistics of batch normalization include the mean color.
    `unreadable_images` records it.

    Args:
        name: name of the data set.
        train, test: the splits.
        num_classes: number of classes.
        image_size: height and width of the images in a batch, in pixels.
        augment: as in `ImageData`.
        description: one line about the data.
        fingerprint: as in `ImageData`.
        remote: whether hosts other than this process's make the batches, as for a TPU pod. Such a host runs no Python
            function, so it prints the number of an unreadable image on its own terminal.
        storage: the form of the images, if they are stored at one size. With `augment="crop_mirror"`, or for raw
            images, training takes a random window and evaluation the central window, and nothing is resized.

    Attributes:
        storage: as passed.
        resizes: True if images are resized when they are used.

    Raises:
        ValueError: if `image_size` is not positive; if `augment` or `image_size` does not suit `storage`.
    """

    def __init__(
        self,
        name: str,
        train: Examples,
        test: Examples,
        num_classes: int,
        *,
        image_size: int = 227,
        augment: str = "crop_flip",
        description: str = "",
        fingerprint: str = "",
        remote: bool = False,
        storage: Storage | None = None,
    ):
        if image_size < 1:
            raise ValueError(f"`image_size` must be positive. Received: image_size={image_size}")
        self.storage = storage
        self._windows_of = _check_storage(storage, augment, image_size)
        self.resizes = self._windows_of is None
        self._train, self._test = train, test
        self.name = name
        self.num_classes = num_classes
        self.image_shape = (image_size, image_size, 3)
        self.num_train, self.num_test = len(train), len(test)
        self.mean, self.std = _IMAGENET_MEAN, _IMAGENET_STD
        self.augment = augment
        self.description = description or name
        self.fingerprint = fingerprint
        self.unreadable_images = UnreadableImages()
        self._remote = remote
        # The number of cores of another host is unknown here.
        self.threads = None if remote else cores()
        threads = (
            f"{self.threads} threads, one for each core" if self.threads else "as many threads as each host allows"
        )
        crop = round(central_fraction(image_size) * 256)
        part = f"{image_size}x{image_size} pixels" if self._windows_of else f"{crop}/256"
        self.reading = f"decoded by {threads}; evaluation on the central {part}"

    _num_draws = NUM_DRAWS

    @property
    def train_examples(self) -> Examples:
        """The encoded images of the training split."""
        return self._train

    @property
    def test_examples(self) -> Examples:
        """The encoded images of the test split."""
        return self._test

    def _train_examples(self, ids: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
        size = self.image_shape[0]

        def load(i: tf.Tensor, draw: tf.Tensor) -> tuple[Any, ...]:
            image, label = self._train.example(i)
            if not draw.shape[0]:
                return self._central(image), label, 1.0
            if self._windows_of:
                return mirrored_window(image, draw, size, self._windows_of), label, 1.0
            return random_crop(image, draw, size), label, 1.0

        return self._load_rows(load, (ids, draws), self._train)

    def _test_examples(self, ids: tf.Tensor) -> tuple[tf.Tensor, ...]:
        import tensorflow as tf

        def decode(i: tf.Tensor) -> tuple[Any, ...]:
            image, label = self._test.example(i)
            return self._central(image), label, 1.0

        def load(i: tf.Tensor) -> tuple[Any, ...]:
            padding = lambda: (tf.zeros(self.image_shape, tf.uint8), tf.zeros((), tf.int64), 0.0)  # noqa: E731
            return tf.cond(i < self.num_test, lambda: decode(i), padding)

        return self._load_rows(load, (ids,), self._test)

    def _central(self, image: tf.Tensor) -> tf.Tensor:
        size = self.image_shape[0]
        return central_window(image, size, self._windows_of) if self._windows_of else central_crop(image, size)

    def _load_rows(self, load: Any, arguments: tuple[tf.Tensor, ...], examples: Examples) -> tuple[tf.Tensor, ...]:
        """Apply `load` to each row of `arguments`, of which the first is the id. Mask unreadable images."""
        import tensorflow as tf

        mean = np.broadcast_to(np.round(self.mean), self.image_shape).astype(np.uint8)

        def example(i: tf.Tensor, *draw: tf.Tensor) -> tuple[tf.Tensor, ...]:
            image, label, mask = load(tf.cast(i, tf.int64), *draw)
            is_class = (label >= 0) & (label < self.num_classes)
            if not tf.executing_eagerly():
                tf.debugging.Assert(is_class, [label])
            elif not is_class:  # `record` asks for the reason
                raise ValueError(f"its label {int(label)} is not in range({self.num_classes})")
            return tf.ensure_shape(image, self.image_shape), tf.cast(label, tf.int32), mask

        def record(i: np.ndarray, *draw: np.ndarray) -> np.float32:
            self.unreadable_images.add(examples.where(int(i)), lambda: example(i, *draw))
            return np.float32(0.0)

        def placeholder(*row: tf.Tensor) -> tuple[Any, ...]:
            if self._remote:
                tf.print("left out an unreadable image, number", row[0], output_stream=sys.stderr)
                return mean, 0, 0.0
            return mean, 0, tf.ensure_shape(tf.numpy_function(record, row, tf.float32), [])

        return map_rows(example, arguments, self.threads, placeholder)


def _check_storage(storage: Storage | None, augment: str, image_size: int) -> Storage | None:
    """Return the storage if windows of the stored images are taken as they are; None if they are resized."""
    if augment == "crop_mirror" and not storage:
        raise ValueError(
            "`augment` crop_mirror takes windows of images that are stored at one size: prepare them with `resize`, "
            "and set `resized`. Received: augment=crop_mirror"
        )
    if storage and storage.encoding == "raw" and augment not in ("crop_mirror", "none"):
        raise ValueError(
            f"Raw images need `augment` crop_mirror or none. Received: augment={augment}, resized={storage}"
        )
    if not storage or (augment != "crop_mirror" and storage.encoding != "raw"):
        return None
    if image_size > storage.size:
        raise ValueError(
            f"`image_size` must be at most the stored size. Received: image_size={image_size}, resized={storage}"
        )
    return storage
