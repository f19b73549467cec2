"""Data sets held in memory as arrays."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.augment import shift_flip
from lars_keras.data.base import AUGMENTS, ImageData, check_arguments, positions
from lars_keras.data.fingerprint import array_parts, fingerprint
from lars_keras.data.keyed import Array
from lars_keras.data.unreadable import UnreadableImages

if TYPE_CHECKING:
    import tensorflow as tf

_BLOCK = 2**20  # pixel values that are counted at once: each takes 8 bytes then


class ArrayData(ImageData):
    """A data set held in memory.

    `train_batches` and `test_batches` return the batches as a `tf.data.Dataset`. `train_numpy` and `test_numpy` return
    the same batches as arrays. They need no TensorFlow, as in a training loop on JAX:

    ```python
    data = ArrayData("mine", (images, labels), (test_images, test_labels), 10, crop_flip=pad_crop_flip)
    for images, labels, mask in data.train_numpy(256, first=batches_consumed):
        ...
    ```

    Args:
        name: name of the data set.
        train: images, uint8 `(n, height, width, channels)`, and integer labels `(n,)`. The images are not copied.
        test: images and labels of the test split.
        num_classes: number of classes.
        crop_flip: the random crop and flip, such as `pad_crop_flip`. It maps images and draws, float32 `(n, 3)` uniform
            in [0, 1), to images, as arrays and as tensors. None for images that must not be cropped or flipped.
        augment: as in `ImageData`. None for crop and flip if there is a `crop_flip`, else for none.
        description: one line about the data.

    Raises:
        ValueError: if images are not uint8 of rank 4 and of one shape, if labels are not integers or do not match them,
            or if `augment` does not work with the images.
    """

    def __init__(
        self,
        name: str,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        num_classes: int,
        *,
        crop_flip: Callable[[Array, Array], Array] | None = None,
        augment: str | None = None,
        description: str = "",
    ):
        for argument, split in (("train", train), ("test", test)):
            _check_split(argument, *split, num_classes)
        if test[0].shape[1:] != train[0].shape[1:]:
            raise ValueError(
                f"`test` must have images of the same shape as `train`, {train[0].shape[1:]}. "
                f"Received: images of shape {test[0].shape[1:]}"
            )
        if augment is not None and augment not in AUGMENTS:
            raise ValueError(f"`augment` must be one of {', '.join(AUGMENTS)}. Received: augment={augment!r}")
        self._train = train[0], train[1].astype(np.int32)
        self._test = test[0], test[1].astype(np.int32)
        self._crop_flip = crop_flip
        self.augment = augment or ("crop_flip" if crop_flip else "none")
        if self.augment in ("crop_flip", "alternating_flip") and not crop_flip:
            raise ValueError(f"{name} has no random crop and flip. Received: augment={augment!r}")
        if self.augment == "crop_mirror":
            raise ValueError(f"`augment` crop_mirror is for images that are stored at one size, not for {name}.")
        if self.augment == "alternating_flip":
            self._crop_flip = shift_flip
        if self.augment == "randaugment" and train[0].shape[3] != 3:
            raise ValueError(
                f"`augment` randaugment needs images of 3 channels, those of {name} have {train[0].shape[3]}. "
                f"Received: augment={augment!r}"
            )
        self.name = name
        self.num_classes = num_classes
        self.image_shape = train[0].shape[1:]
        self.num_train, self.num_test = len(train[0]), len(test[0])
        self.mean, self.std = _statistics(train[0])
        self.description = description or name
        parts = itertools.chain(array_parts(*self._train), array_parts(*self._test))
        self.fingerprint = fingerprint(self.num_train, self.num_test, num_classes, parts)
        self.unreadable_images = UnreadableImages()  # stays empty: all images are in memory

    def train_numpy(
        self,
        batch_size: int,
        *,
        first: int = 0,
        count: int | None = None,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        augment: bool = True,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Return an iterator over the batches of `train_batches` as arrays, without TensorFlow.

        RandAugment, mixup and cutmix do need TensorFlow.
        """
        check_arguments(batch_size, shard, seed, first, count)
        kind = self.augment if augment else "none"
        if kind not in ("none", "crop_flip", "alternating_flip"):
            return super().train_numpy(batch_size, first=first, count=count, seed=seed, shard=shard)
        indices = itertools.count(first) if count is None else range(first, first + count)
        return (self._train_arrays(np.uint64(i), batch_size, seed, shard, kind) for i in indices)

    def test_numpy(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, ...]]:
        """Return an iterator over the batches of `test_batches` as arrays, without TensorFlow."""
        check_arguments(batch_size, shard)
        indices = range(-(-self.num_test // batch_size))
        return (self._test_arrays(positions(np.uint64(i), batch_size, shard)) for i in indices)

    def _train_arrays(self, *batch: Any) -> tuple[np.ndarray, ...]:
        ids, draws = self._train_draws(*batch)
        images, labels = (array[ids] for array in self._train)
        if self._crop_flip and draws.shape[1]:
            images = self._crop_flip(images, draws)
        return images, labels, np.ones(len(ids), np.float32)

    def _test_arrays(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        real = ids < self.num_test
        images, labels = (array[np.where(real, ids, 0)] for array in self._test)
        return images * real[:, None, None, None], labels * real, real.astype(np.float32)

    _num_draws = 3
    reading = "gathered from memory"

    def _train_examples(self, ids: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
        import tensorflow as tf

        images, labels = (tf.gather(tensor, tf.cast(ids, tf.int64)) for tensor in self._tensors["train"])
        if self._crop_flip and draws.shape[1]:
            images = self._crop_flip(images, draws)
        return images, labels, tf.ones_like(labels, tf.float32)

    def _test_examples(self, ids: tf.Tensor) -> tuple[tf.Tensor, ...]:
        import tensorflow as tf

        real = ids < self.num_test
        ids = tf.where(real, tf.cast(ids, tf.int64), 0)
        images, labels = (tf.gather(tensor, ids) for tensor in self._tensors["test"])
        images *= tf.cast(real, images.dtype)[:, None, None, None]
        return images, labels * tf.cast(real, labels.dtype), tf.cast(real, tf.float32)

    @functools.cached_property
    def _tensors(self) -> dict[str, list[tf.Tensor]]:
        """Hold the arrays in TensorFlow's memory, outside the graphs."""
        import tensorflow as tf

        with tf.init_scope():
            return {
                name: [tf.constant(a) for a in part] for name, part in (("train", self._train), ("test", self._test))
            }


def _check_split(argument: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Raise a `ValueError` for arrays of `argument` that are not images and labels."""
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"`{argument}` must have images in a non-empty uint8 array of shape (n, height, width, channels). "
            f"Received: {images.dtype} of shape {images.shape}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"`{argument}` must have labels of shape {images.shape[:1]}. Received: {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{argument}` must have integer labels. Received: {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`{argument}` must have labels in range({num_classes}). Received: {labels.min()} to {labels.max()}"
        )


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation of each channel, from a histogram."""
    values = np.arange(256)
    means, stds = [], []
    step = max(1, _BLOCK // max(1, images[0].size))
    for channel in range(images.shape[-1]):
        blocks = (images[start : start + step, ..., channel] for start in range(0, len(images), step))
        counts = np.sum([np.bincount(block.reshape(-1), minlength=256) for block in blocks], axis=0)
        mean = counts @ values / counts.sum()
        means.append(float(mean))
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())))
    return tuple(means), tuple(stds)
