"""What a data set offers to training and evaluation: exactly ordered batches."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.data.augment import uniforms
from lars_keras.data.order import example_ids

if TYPE_CHECKING:
    import tensorflow as tf


class ImageData(abc.ABC):
    """A train and a test split of labelled images.

    The training stream is endless: one permutation per epoch, one after the other, cut into batches
    without regard to the epochs' ends, so that every example is used exactly once an epoch at any
    batch size. A batch's content depends on (seed, position) alone: start at `first` and the stream
    continues as if it had never stopped.

    At most a few batches are held at a time. For a large update ask for micro-batches and take
    several: update `s` of batch B made of k micro-batches is elements `s*k` to `(s+1)*k - 1` of the
    batches of size B/k.

    Attributes:
        name: name of the data set.
        num_classes: labels are in `range(num_classes)`.
        image_shape: `(height, width, channels)` of every image delivered.
        num_train, num_test: number of examples of each split.
        mean, std: per channel, over the training split, of pixel values 0 to 255.
        description: one line for people.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str

    def train_ids(
        self,
        batch_size: int,
        *,
        first: int = 0,
        count: int = 1,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> np.ndarray:
        """Returns the example ids of training batches: int64, shape `(count, batch_size / W)`.

        Arguments are those of `train_batches`.
        """
        check_arguments(batch_size, shard, seed, first)
        rows = [_positions(first + i, batch_size, shard) for i in range(count)]
        ids, _ = example_ids(np.reshape(rows, (count, -1)), self.num_train, seed)
        return ids

    def train_batches(
        self,
        batch_size: int,
        *,
        first: int = 0,
        count: int | None = None,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        augment: bool = True,
    ) -> tf.data.Dataset:
        """Returns the training batches from number `first` on.

        Args:
            batch_size: examples per element, over all workers.
            first: number of elements already used.
            count: number of elements; `None` for an endless stream.
            seed: non-negative integer; fixes order and augmentation.
            shard: `(w, W)`: deliver the rows of worker `w` of `W`, which are the contiguous rows
                `w * batch_size / W` to `(w + 1) * batch_size / W` of each batch.
            augment: whether to apply the data set's random crop and flip, which depend on
                (seed, epoch, example id) alone.

        Returns:
            A `tf.data.Dataset` of `(images, labels)`: uint8 `(batch_size / W, h, w, c)` and int32
            `(batch_size / W,)`, with static shapes.

        Raises:
            ValueError: an argument is out of range, or `W` does not divide `batch_size`.
        """
        check_arguments(batch_size, shard, seed, first)
        block = functools.partial(self._train_block, batch_size, seed, shard, augment)
        return self._dataset(block, first, count, batch_size // shard[1], random=augment)

    def test_batches(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> tf.data.Dataset:
        """Returns the test split, every image exactly once, in order.

        Args:
            batch_size: examples per element, over all workers.
            shard: as in `train_batches`. All workers get the same number of elements.

        Returns:
            A `tf.data.Dataset` of `(images, labels, mask)`. The last batch is filled up with black
            images, label 0, mask 0; `mask` is float32 `(batch_size / W,)`, 1 for a real image.

        Raises:
            ValueError: an argument is out of range, or `W` does not divide `batch_size`.
        """
        check_arguments(batch_size, shard)
        block = functools.partial(self._test_block, batch_size, shard)
        count = -(-self.num_test // batch_size)
        return self._dataset(block, 0, count, batch_size // shard[1], masked=True)

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
        """Yields the batches of `train_batches` as NumPy arrays."""
        batches = self.train_batches(batch_size, first=first, count=count, seed=seed, shard=shard, augment=augment)
        return batches.as_numpy_iterator()

    def test_numpy(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the batches of `test_batches` as NumPy arrays."""
        return self.test_batches(batch_size, shard=shard).as_numpy_iterator()

    # A block is what NumPy contributes to a batch: tuples of arrays with equal first dimension.
    # `_dataset` runs blocks inside tf.data and `_finish` makes batches of them there.

    def _train_block(
        self, batch_size: int, seed: int, shard: tuple[int, int], augment: bool, index: int
    ) -> tuple[np.ndarray, ...]:
        positions = _positions(int(index), batch_size, shard)
        ids, epochs = example_ids(positions, self.num_train, seed)
        draws = uniforms(seed, epochs, ids, self._num_draws) if augment else None
        return self._read_train(ids, draws)

    def _test_block(self, batch_size: int, shard: tuple[int, int], index: int) -> tuple[np.ndarray, ...]:
        ids = _positions(int(index), batch_size, shard)
        mask = ids < self.num_test
        return *self._read_test(ids[mask], len(ids)), mask.astype(np.float32)

    def _dataset(
        self,
        block: Callable[[int], tuple[np.ndarray, ...]],
        first: int,
        count: int | None,
        rows: int,
        *,
        random: bool = False,
        masked: bool = False,
    ) -> tf.data.Dataset:
        import tensorflow as tf

        indices = tf.data.Dataset.counter(first)
        if count is not None:
            indices = indices.take(count)
        dtypes = [*self._block_dtypes(random), *([np.float32] if masked else [])]
        blocks = indices.map(lambda index: tf.numpy_function(block, [index], dtypes), num_parallel_calls=2)
        batches = self._finish(blocks, rows, random=random, masked=masked)
        options = tf.data.Options()
        options.deterministic = True
        # Each worker already reads its own rows.
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        return batches.with_options(options).prefetch(2)

    @property
    @abc.abstractmethod
    def _num_draws(self) -> int:
        """How many random numbers the augmentation of one example takes."""

    @abc.abstractmethod
    def _read_train(self, ids: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Returns a block of training examples."""

    @abc.abstractmethod
    def _read_test(self, ids: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        """Returns a block of test examples, filled up to `rows`."""

    @abc.abstractmethod
    def _block_dtypes(self, random: bool) -> list[type]:
        """Returns the dtypes of a block."""

    @abc.abstractmethod
    def _finish(self, blocks: tf.data.Dataset, rows: int, *, random: bool, masked: bool) -> tf.data.Dataset:
        """Makes batches of static shape from blocks."""


def _positions(index: int, batch_size: int, shard: tuple[int, int]) -> np.ndarray:
    worker, workers = shard
    rows = batch_size // workers
    start = index * batch_size + worker * rows
    return np.arange(start, start + rows)


def check_arguments(batch_size: int, shard: tuple[int, int], seed: int = 0, first: int = 0) -> None:
    worker, workers = shard
    if not 0 <= worker < workers:
        raise ValueError(f"`shard` must be (w, W) with 0 <= w < W. Received: shard={shard}")
    if batch_size < 1 or batch_size % workers:
        raise ValueError(
            "`batch_size` must be a positive multiple of the number of workers. "
            f"Received: batch_size={batch_size}, shard={shard}"
        )
    if seed < 0 or first < 0:
        raise ValueError(f"`seed` and `first` must not be negative. Received: seed={seed}, first={first}")
