"""Hold-out validation: a fraction of the training images that takes the place of the test split."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples


def holdout(count: int, fraction: float, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Split the ids of the training images in two, evenly over their order.

    Args:
        count: number of images.
        fraction: fraction of the images to hold out, in (0, 1).
        group: number of originals; image `i` is a copy of original `i % group`, and all copies of an original land on
            one side. None means that every image is an original.

    Returns:
        Ids for training and ids for validation, both int64 and sorted.

    Raises:
        ValueError: if either part would be empty.
    """
    originals = np.arange(group or count)
    held_out = np.floor((originals + 1) * fraction) > np.floor(originals * fraction)
    if not 0 < held_out.sum() < len(held_out):
        raise ValueError(
            f"`validation_split` must leave images on both sides of the {len(held_out):,}. Received: "
            f"validation_split={fraction:g}"
        )
    chosen = held_out[np.arange(count) % len(held_out)]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class Subset:
    """Selects images of a split.

    Args:
        examples: the split.
        ids: the images to select, in their new order.
    """

    def __init__(self, examples: Examples, ids: np.ndarray):
        self._examples, self._ids = examples, ids

    def __len__(self) -> int:
        return len(self._ids)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the encoded image and the label of example `i`, in a graph."""
        return self._examples.example(self._table[i])

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        return self._examples.where(int(self._ids[i]))

    @property
    def nbytes(self) -> int:
        """Estimate the stored size of the selected images, in bytes, from their number."""
        return round(self._examples.nbytes * len(self._ids) / len(self._examples))

    @functools.cached_property
    def _table(self) -> tf.Tensor:
        """Hold the ids in TensorFlow's memory, outside the graphs."""
        import tensorflow as tf

        with tf.init_scope():
            return tf.constant(self._ids)
