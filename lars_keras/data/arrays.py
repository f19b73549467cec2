"""Data sets that fit into memory as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.data.image_data import ImageData, check_arguments

if TYPE_CHECKING:
    import tensorflow as tf


class ArrayData(ImageData):
    """Images held in memory. `train_numpy` and `test_numpy` work without TensorFlow.

    Args:
        name: name of the data set.
        train, test: pairs of images, uint8 `(n, height, width, channels)`, and integer labels
            `(n,)`. The arrays are used as they are, not copied.
        num_classes: number of classes.
        augment: `augment(images, draws) -> images`, with `draws` float32 `(n, 3)` uniform in
            [0, 1); `None` for no augmentation.
        description: one line for people.

    Raises:
        ValueError: images are not uint8 of rank 4, or labels do not match them.
    """

    def __init__(
        self,
        name: str,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        num_classes: int,
        *,
        augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        description: str = "",
    ):
        for images, labels in (train, test):
            if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
                raise ValueError(
                    "Images must be a non-empty uint8 array of shape (n, height, width, channels). "
                    f"Received: {images.dtype} of shape {images.shape}"
                )
            if labels.shape != images.shape[:1]:
                raise ValueError(f"Expected labels of shape {images.shape[:1]}. Received: {labels.shape}")
            if labels.min() < 0 or labels.max() >= num_classes:
                raise ValueError(f"Labels must be in range({num_classes}). Received: {labels.min()} to {labels.max()}")
        self._train = train[0], train[1].astype(np.int32)
        self._test = test[0], test[1].astype(np.int32)
        self._augment = augment
        self.name = name
        self.num_classes = num_classes
        self.image_shape = train[0].shape[1:]
        self.num_train, self.num_test = len(train[0]), len(test[0])
        self.mean, self.std = _statistics(train[0])
        self.description = description or name

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
        check_arguments(batch_size, shard, seed, first)
        indices = itertools.count(first) if count is None else range(first, first + count)
        return (self._train_block(batch_size, seed, shard, augment, i) for i in indices)

    def test_numpy(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, ...]]:
        check_arguments(batch_size, shard)
        count = -(-self.num_test // batch_size)
        return (self._test_block(batch_size, shard, i) for i in range(count))

    _num_draws = 3

    def _read_train(self, ids: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, ...]:
        images, labels = (array[ids] for array in self._train)
        if draws is not None and self._augment is not None:
            images = self._augment(images, draws)
        return images, labels

    def _read_test(self, ids: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        block = []
        for array in self._test:
            padded = np.zeros((rows, *array.shape[1:]), array.dtype)
            padded[: len(ids)] = array[ids]
            block.append(padded)
        return tuple(block)

    def _block_dtypes(self, random: bool) -> list[type]:
        return [np.uint8, np.int32]

    def _finish(self, blocks: tf.data.Dataset, rows: int, *, random: bool, masked: bool) -> tf.data.Dataset:
        import tensorflow as tf

        shapes = [(rows, *self.image_shape), (rows,), (rows,)]
        return blocks.map(
            lambda *block: tuple(tf.ensure_shape(part, shape) for part, shape in zip(block, shapes, strict=False))
        )


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, exact, from a histogram."""
    values = np.arange(256)
    means, stds = [], []
    for channel in np.moveaxis(images, -1, 0):
        counts = np.bincount(channel.reshape(-1), minlength=256)
        mean = counts @ values / counts.sum()
        means.append(float(mean))
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())))
    return tuple(means), tuple(stds)
