"""Augmentation of whole batches, as a function of given random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lars_keras.data.keyed import Array, to_float32

if TYPE_CHECKING:
    import tensorflow as tf

MIXES = ("mixup", "cutmix")
_ALPHA = {"mixup": 0.2, "cutmix": 1.0}  # of the Beta distribution of the weight; the sources' values for ImageNet
_QUANTILES = 4096


def pad_crop_flip(
    images: Array, draws: Array, pad: int = 4, mode: Literal["constant", "reflect"] = "constant"
) -> Array:
    """Pad, crop at random back to the same size, and flip half of the images.

    Source: He, Zhang, Ren and Sun 2015 (arXiv 1512.03385), section 4.2.

    Args:
        images: uint8 `(n, height, width, channels)`, an array or a tensor.
        draws: float32 `(n, 3)`, uniform in [0, 1): row, column, flip.
        pad: width of the border on each side, in pixels.
        mode: `"constant"` for a black border, `"reflect"` for a reflection of the image.

    Returns:
        uint8 images of the same type and shape.
    """
    n, height, width, _ = images.shape
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    up, left = np.arange(height), np.arange(width)
    if isinstance(images, np.ndarray):
        start = (draws[:, :2] * np.float32(2 * pad + 1)).astype(np.int64)
        rows = start[:, :1] + up
        columns = start[:, 1:] + np.where(draws[:, 2:] < 0.5, left[::-1], left)
        return np.pad(images, border, mode)[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

    import tensorflow as tf

    start = tf.cast(draws[:, :2] * np.float32(2 * pad + 1), tf.int64)
    rows = start[:, :1] + up
    columns = start[:, 1:] + tf.where(draws[:, 2:] < 0.5, left[::-1], left)
    return tf.gather(tf.gather(tf.pad(images, border, mode), rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def shift_flip(images: Array, draws: Array) -> Array:
    """Shift images by up to 2 pixels in each direction, with reflected borders, and flip half of them.

    Source: airbench (Jordan 2024, arXiv 2404.00498). Arguments and result are as in `pad_crop_flip`.
    """
    return pad_crop_flip(images, draws, pad=2, mode="reflect")


def alternating(draws: Array, first: Array, epochs: Array) -> Array:
    """Replace the last draw of each example, so that its outcome alternates from epoch to epoch.

    A draw below 1/2 is one outcome, and a draw of at least 1/2 the other. The outcome is random in epoch 0. All even
    epochs repeat it, and all odd epochs have the opposite.

    Source: airbench (Jordan 2024, arXiv 2404.00498), section 3.6.

    Args:
        draws: float32 `(n, k)`, uniform in [0, 1); the last column is replaced.
        first: draws of the same shape, of epoch 0.
        epochs: uint64 `(n,)`.
    """
    odd = to_float32(epochs % np.uint64(2))[:, None]
    # Exact: draws are multiples of 2^-24, and one below 1/2 changes places with one that is not.
    last = first[:, -1:] + odd * (np.float32(1 - 2.0**-24) - 2 * first[:, -1:])
    if isinstance(draws, np.ndarray):
        return np.concatenate([draws[:, :-1], last], 1)
    import tensorflow as tf

    return tf.concat([draws[:, :-1], last], 1)


def mix_pairs(
    kind: str, images: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor, draws: tf.Tensor, num_classes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mix the images of each pair: 0 with 1, 2 with 3, and so on. Every image has its own weight `s`.

    - mixup: `x = s x + (1 - s) x'`, and the same for labels. `s` follows Beta(0.2, 0.2).
    - cutmix: a box of `x'` covers the fraction `1 - s` of `x`, or less where the border cuts the box. Labels are mixed
      by area. `s` is uniform.

    An unreadable image is not mixed into its neighbor.

    Source: Zhang et al. 2017 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899), section 3.

    Args:
        kind: `"mixup"` or `"cutmix"`.
        images: uint8 `(n, height, width, channels)`, `n` even.
        labels: int32 `(n,)`.
        mask: float32 `(n,)`, 0 for an unreadable image.
        draws: float32 `(n, 3)`, uniform in [0, 1): weight; row and column of the center of the box.
        num_classes: number of classes.

    Returns:
        uint8 images of the same shape, and float32 labels `(n, num_classes)`.
    """
    import tensorflow as tf
    from scipy.special import betaincinv

    def other(x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.reverse(tf.reshape(x, [-1, 2, *x.shape[1:]]), [1]), x.shape)

    quantiles = betaincinv(_ALPHA[kind], _ALPHA[kind], (np.arange(_QUANTILES) + 0.5) / _QUANTILES).astype(np.float32)
    weight = tf.gather(quantiles, tf.cast(draws[:, 0] * _QUANTILES, tf.int32))
    weight = tf.where(mask * other(mask) > 0, weight, 1.0)
    if kind == "mixup":
        own = weight[:, None, None, None]
        mixed = own * tf.cast(images, tf.float32) + (1 - own) * tf.cast(other(images), tf.float32)
        images = tf.cast(mixed + 0.5, tf.uint8)
    else:
        _, height, width, _ = images.shape
        side = tf.sqrt(1 - weight)[:, None]
        inside = []
        for length, center in ((height, draws[:, 1:2]), (width, draws[:, 2:3])):
            start, end = (center - side / 2) * length, (center + side / 2) * length
            pixel = np.arange(length, dtype=np.float32) + 0.5
            inside.append((start <= pixel) & (pixel < end))
        box = inside[0][:, :, None] & inside[1][:, None, :]
        images = tf.where(box[..., None], other(images), images)
        weight = 1 - tf.reduce_mean(tf.cast(box, tf.float32), axis=[1, 2])
    one_hot = tf.one_hot(labels, num_classes)
    return images, weight[:, None] * one_hot + (1 - weight[:, None]) * other(one_hot)
