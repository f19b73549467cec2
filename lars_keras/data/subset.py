"""A share of the training images kept apart, to choose settings by without looking at the test split."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples


def holdout(count: int, share: float, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Splits the ids of the training images in two, evenly over their order.

    Args:
        count: number of images.
        share: of the images that are kept apart, in (0, 1).
        group: image `i` is a copy of original `i % group`, and an original's copies stay together; `None`: each is its
            own original.

    Returns:
        Ids to train on and ids to validate on, both int64 and sorted.

    Raises:
        ValueError: if either part would be empty.
    """
    originals = np.arange(group or count)
    apart = np.floor((originals + 1) * share) > np.floor(originals * share)
    if not 0 < apart.sum() < len(apart):
        raise ValueError(
            f"--validation_split must leave images on both sides of the {len(apart):,}. Received: "
            f"--validation_split={share:g}"
        )
    chosen = apart[np.arange(count) % len(apart)]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class Subset:
    """Some of the images of a split.

    Args:
        examples: the split.
        ids: which images, in their new order.
    """

    def __init__(self, examples: Examples, ids: np.ndarray):
        self._examples, self._ids = examples, ids

    def __len__(self) -> int:
        return len(self._ids)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The bytes and the label of image `i` in a graph."""
        return self._examples.example(self._table[i])

    def where(self, i: int) -> str:
        """Which image `i` is, for people."""
        return self._examples.where(int(self._ids[i]))

    @property
    def nbytes(self) -> int:
        """Size of all images as they are stored, in bytes, in proportion."""
        return round(self._examples.nbytes * len(self._ids) / len(self._examples))

    @functools.cached_property
    def _table(self) -> tf.Tensor:
        """The ids in TensorFlow's memory, beside the graphs and not in them."""
        import tensorflow as tf

        with tf.init_scope():
            return tf.constant(self._ids)
