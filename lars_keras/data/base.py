"""The interface of a data set: batches in an exact order, for training and evaluation."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.augment import MIXES, alternating, mix_pairs
from lars_keras.data.keyed import Array, keys, uniforms
from lars_keras.data.limits import cores
from lars_keras.data.parallel_map import map_rows
from lars_keras.data.shuffle import example_ids
from lars_keras.data.unreadable import UnreadableImages

if TYPE_CHECKING:
    import tensorflow as tf


AUGMENTS = ("none", "crop_flip", "crop_mirror", "alternating_flip", "randaugment", *MIXES)
_EXTRA_DRAWS = 3  # for the augmentations that follow crop and flip


class ImageData(abc.ABC):
    """A training split and a test split of labeled images.

    The training stream is endless. It concatenates one permutation per epoch, and cuts batches across the borders of
    epochs, so that each epoch uses every example exactly once at any batch size. The content of a batch depends on
    (seed, position) alone: a stream that starts at batch `first` continues as if it had never stopped.

    A stream holds a few batches at a time. For a large global batch, ask for micro-batches: update `s` of global batch
    size B with k accumulation steps takes the elements `s * k` to `(s + 1) * k - 1` of the batches of size B / k.

    Attributes:
        name: name of the data set.
        num_classes: number of classes; labels are in `range(num_classes)`.
        class_names: the name of each class, in the order of the labels; empty if unknown.
        image_shape: `(height, width, channels)` of every image.
        num_train, num_test: number of examples in each split.
        mean, std: statistics of each channel over the training split, for pixel values 0 to 255.
        augment: augmentation of training images, one of `AUGMENTS`: none; the random crop and flip of the data set;
            a random window and flip of images that are stored at one size, without resizing; alternating flips,
            which for images in memory shift by up to 2 pixels with reflected borders and flip in every second epoch;
            or RandAugment, mixup or cutmix, which follow crop and flip if the data set has them.
        description: one line about the data.
        fingerprint: one line that differs for different images, labels or splits, wherever they are stored; empty if
            unknown. A held-out fraction of the training images, an argument of `load`, need not change it.
        reading: one line about how images are read.
        warnings: properties of the data that are probably mistakes, a sentence each.
        unreadable_images: the unreadable images found so far.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    description: str
    fingerprint: str = ""
    reading: str
    warnings: tuple[str, ...] = ()
    unreadable_images: UnreadableImages

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
        """Return the training batches from batch `first` on.

        Args:
            batch_size: examples per batch, over all workers.
            first: number of batches already consumed.
            count: number of batches; None for an endless stream.
            seed: non-negative integer that fixes order and augmentation.
            shard: `(w, W)` selects the rows of worker `w` of `W`: the contiguous rows `w * batch_size / W` to
                `(w + 1) * batch_size / W` of each batch.
            augment: whether to augment. Augmentation depends on (seed, epoch, example id) alone.

        Returns:
            A `tf.data.Dataset` of `(images, labels, mask)` with static shapes: uint8 `(batch_size / W, h, w, c)`, int32
            `(batch_size / W,)` and float32 `(batch_size / W,)`. `mask` is 1 for an image, and 0 for an unreadable one
            (see `ImageFileData`). Mixed labels are float32 `(batch_size / W, num_classes)`.

        Raises:
            ValueError: if an argument is out of range, if `W` does not divide `batch_size`, or if images are mixed in
                pairs and a worker has an odd number of rows.
        """
        check_arguments(batch_size, shard, seed, first, count)
        kind = self.augment if augment else "none"
        if kind in MIXES and batch_size // shard[1] % 2:
            raise ValueError(
                f"`augment` {kind} mixes images in pairs, so each worker needs an even number of examples. "
                f"Received: batch_size={batch_size}, shard={shard}"
            )
        if kind == "randaugment":
            import tensorflow as tf

            from lars_keras.data.randaugment import randaugment

            randaugment = tf.function(randaugment)  # the layers of KerasCV need AutoGraph

        def block(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
            ids, draws = self._train_draws(index, batch_size, seed, shard, kind)
            images, labels, mask = self._train_examples(ids, draws[:, : self._num_draws])
            if kind == "randaugment":
                images = map_rows(randaugment, (images, draws[:, self._num_draws :]), self.threads)
            elif kind in MIXES:
                images, labels = mix_pairs(kind, images, labels, mask, draws[:, self._num_draws :], self.num_classes)
            return images, labels, mask

        return _dataset(block, first, count)

    def test_batches(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> tf.data.Dataset:
        """Return the test split: every image exactly once, in order.

        Args:
            batch_size: examples per batch, over all workers.
            shard: as in `train_batches`. All workers get the same number of batches.

        Returns:
            A `tf.data.Dataset` of `(images, labels, mask)`, shaped as in `train_batches`. The last batch is padded with
            black images of label 0 and mask 0.

        Raises:
            ValueError: if an argument is out of range, or `W` does not divide `batch_size`.
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
        """Return an iterator over the batches of `train_batches` as arrays. Arguments are the same."""
        batches = self.train_batches(batch_size, first=first, count=count, seed=seed, shard=shard, augment=augment)
        return batches.as_numpy_iterator()

    def test_numpy(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, ...]]:
        """Return an iterator over the batches of `test_batches` as arrays. Arguments are the same."""
        return self.test_batches(batch_size, shard=shard).as_numpy_iterator()

    def _train_draws(
        self, index: Array, batch_size: int, seed: int, shard: tuple[int, int], kind: str
    ) -> tuple[Array, Array]:
        """Return the example ids of batch `index`, and the random numbers of each example."""
        ids, epochs = example_ids(positions(index, batch_size, shard), self.num_train, seed)
        extra = {"none": -self._num_draws, "crop_flip": 0, "crop_mirror": 0, "alternating_flip": 0}
        draws = uniforms(keys(seed, epochs, ids), self._num_draws + extra.get(kind, _EXTRA_DRAWS))
        if kind == "alternating_flip":
            first = uniforms(keys(seed, np.uint64(0) * epochs, ids), self._num_draws)
            draws = alternating(draws, first, epochs)
        return ids, draws

    threads: int | None = cores()  # threads that make images; None: tf.data decides
    _num_draws: int  # random numbers for the crop and flip of one example

    @abc.abstractmethod
    def _train_examples(self, ids: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Return images, labels and mask of training examples, by TensorFlow operations that any host can run.

        Args:
            ids: uint64 `(rows,)`.
            draws: float32 `(rows, _num_draws)`, or `(rows, 0)` for no augmentation.
        """

    @abc.abstractmethod
    def _test_examples(self, ids: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Return images, labels and mask of test examples. An id beyond the last example makes padding."""


def positions(index: Array, batch_size: int, shard: tuple[int, int]) -> Array:
    """Return the positions of a worker's rows of batch `index` in the stream, uint64."""
    worker, workers = shard
    rows = batch_size // workers
    return index * np.uint64(batch_size) + np.arange(worker * rows, (worker + 1) * rows, dtype=np.uint64)


def _dataset(block: Callable[[Any], Any], first: int, count: int | None) -> tf.data.Dataset:
    """Map `block` over the batch numbers from `first` on, in order."""
    import tensorflow as tf

    indices = tf.data.Dataset.counter(first)
    if count is not None:
        indices = indices.take(count)

    @tf.autograph.experimental.do_not_convert  # it would take a second to find nothing to convert
    def batch(index: tf.Tensor) -> Any:
        return block(tf.cast(index, tf.uint64))

    batches = indices.map(batch, num_parallel_calls=2)
    options = tf.data.Options()
    options.deterministic = True
    # Nothing is left to tune, and the end of a tuned iterator that a `tf.function` reads may wait for as long as it was
    # in use.
    options.autotune.enabled = False
    # Each worker already reads its own rows.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.with_options(options).prefetch(2)


def check_arguments(
    batch_size: int, shard: tuple[int, int], seed: int = 0, first: int = 0, count: int | None = None
) -> None:
    """Raise a `ValueError` for an argument of `train_batches` or `test_batches` that is out of range."""
    worker, workers = shard
    if not 0 <= worker < workers:
        raise ValueError(f"`shard` must be (w, W) with 0 <= w < W. Received: shard={shard}")
    if batch_size < 1 or batch_size % workers:
        raise ValueError(
            "`batch_size` must be a positive multiple of the number of workers. "
            f"Received: batch_size={batch_size}, shard={shard}"
        )
    for name, value in (("seed", seed), ("first", first), ("count", count or 0)):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative. Received: {name}={value}")
