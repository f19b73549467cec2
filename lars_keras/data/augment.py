"""Crops and flips of images in memory, from random numbers that are given."""

import numpy as np

from lars_keras.data.keyed import Array


def pad_crop_flip(images: Array, draws: Array, pad: int = 4) -> Array:
    """Pads with black, crops at random back to the same size, and flips half of the images.

    Source: He, Zhang, Ren and Sun 2015 (arXiv 1512.03385), section 4.2.

    Args:
        images: uint8 of shape `(n, height, width, channels)`, a NumPy array or a tensor.
        draws: float32 of shape `(n, 3)`, uniform in [0, 1): row, column, flip.
        pad: pixels of border on each side.

    Returns:
        uint8, of the kind and shape of `images`.
    """
    n, height, width, _ = images.shape
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    up, left = np.arange(height), np.arange(width)
    if isinstance(images, np.ndarray):
        start = (draws[:, :2] * np.float32(2 * pad + 1)).astype(np.int64)
        rows = start[:, :1] + up
        columns = start[:, 1:] + np.where(draws[:, 2:] < 0.5, left[::-1], left)
        return np.pad(images, border)[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

    import tensorflow as tf

    start = tf.cast(draws[:, :2] * np.float32(2 * pad + 1), tf.int64)
    rows = start[:, :1] + up
    columns = start[:, 1:] + tf.where(draws[:, 2:] < 0.5, left[::-1], left)
    return tf.gather(tf.gather(tf.pad(images, border), rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
