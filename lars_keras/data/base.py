"""What a data set offers to training and evaluation: exactly ordered batches."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.augment import MIXES, alternating, mix_pairs
from lars_keras.data.keyed import Array, keys, uniforms
from lars_keras.data.parallel_map import cores, each_row
from lars_keras.data.shuffle import example_ids
from lars_keras.data.unreadable import UnreadableImages

if TYPE_CHECKING:
    import tensorflow as tf


AUGMENTS = ("none", "crop_flip", "alternating_flip", "randaugment", *MIXES)
_EXTRA_DRAWS = 3  # beside those of crop and flip


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
        augment: what happens to training images, one of `AUGMENTS`: nothing; the data set's random crop and flip;
            reflected shifts by up to 2 pixels and a flip in every second epoch, of images in memory; or, after crop and
            flip if the data set has them, RandAugment, mixup or cutmix.
        description: one line for people.
        reading: how images are made, one line for people.
        unreadable_images: the images that could not be read so far.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    description: str
    reading: str
    unreadable_images: UnreadableImages

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
        batches = np.arange(first, first + count, dtype=np.uint64)[:, None]
        ids, _ = example_ids(positions(batches, batch_size, shard), self.num_train, seed)
        return ids.astype(np.int64)

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
            augment: whether to augment, which depends on (seed, epoch, example id) alone.

        Returns:
            A `tf.data.Dataset` of `(images, labels, mask)`: uint8 `(batch_size / W, h, w, c)`, int32 and
            float32 `(batch_size / W,)`, with static shapes. `mask` is 1 for a real image, 0 for one that could not be
            read (see `ImageFileData`). Where images are mixed, labels are float32 `(batch_size / W, num_classes)`.

        Raises:
            ValueError: an argument is out of range, or `W` does not divide `batch_size`; images are to be mixed, which
                is done in pairs, but a worker's part of a batch is odd.
        """
        check_arguments(batch_size, shard, seed, first)
        kind = self.augment if augment else "none"
        if kind in MIXES and batch_size // shard[1] % 2:
            raise ValueError(
                f"`augment` {kind} mixes two and two images, so each worker must take an even number. "
                f"Received: batch_size={batch_size}, shard={shard}"
            )
        if kind == "randaugment":
            from lars_keras.data.randaugment import randaugment

        def block(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
            ids, draws = self._train_draws(index, batch_size, seed, shard, kind)
            images, labels, mask = self._train_examples(ids, draws[:, : self._num_draws])
            if kind == "randaugment":
                images = each_row(randaugment, (images, draws[:, self._num_draws :]), self.threads)
            elif kind in MIXES:
                images, labels = mix_pairs(kind, images, labels, mask, draws[:, self._num_draws :], self.num_classes)
            return images, labels, mask

        return _dataset(block, first, count)

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

        def block(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return self._test_examples(positions(index, batch_size, shard))

        return _dataset(block, 0, -(-self.num_test // batch_size))

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

    def _train_draws(
        self, index: Array, batch_size: int, seed: int, shard: tuple[int, int], kind: str
    ) -> tuple[Array, Array]:
        """The example ids of batch `index`, and the random numbers of each."""
        ids, epochs = example_ids(positions(index, batch_size, shard), self.num_train, seed)
        usual = {"none": 0, "crop_flip": self._num_draws, "alternating_flip": self._num_draws}
        draws = uniforms(keys(seed, epochs, ids), usual.get(kind, self._num_draws + _EXTRA_DRAWS))
        if kind == "alternating_flip":
            first = uniforms(keys(seed, np.uint64(0) * epochs, ids), self._num_draws)
            draws = alternating(draws, first, epochs)
        return ids, draws

    threads: int | None = cores()  # that make images; None: tf.data decides
    _num_draws: int  # how many random numbers the crop and flip of one example takes

    @abc.abstractmethod
    def _train_examples(self, ids: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Images, labels and mask of training examples: TensorFlow operations only, so that any host can run them.

        `ids` is uint64 `(rows,)`, `draws` float32 `(rows, _num_draws)`, or `(rows, 0)` for no augmentation.
        """

    @abc.abstractmethod
    def _test_examples(self, ids: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Images, labels and mask of test examples; an id beyond the last is padding."""


def positions(index: Array, batch_size: int, shard: tuple[int, int]) -> Array:
    """Positions in the stream of a worker's rows of batch `index`, uint64."""
    worker, workers = shard
    rows = batch_size // workers
    return index * np.uint64(batch_size) + np.arange(worker * rows, (worker + 1) * rows, dtype=np.uint64)


def _dataset(block: Callable[[Any], Any], first: int, count: int | None) -> tf.data.Dataset:
    """The batches that `block` makes of the numbers from `first` on, in this order."""
    import tensorflow as tf

    indices = tf.data.Dataset.counter(first)
    if count is not None:
        indices = indices.take(count)
    batches = indices.map(lambda index: block(tf.cast(index, tf.uint64)), num_parallel_calls=2)
    options = tf.data.Options()
    options.deterministic = True
    # Each worker already reads its own rows.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.with_options(options).prefetch(2)


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
