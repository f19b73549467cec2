"""From the bytes of an image to pixels: the crops of training and of evaluation, decoding no more than they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

_DCT = "INTEGER_ACCURATE"  # what other readers of JPEG use, to the bit, and no slower; TensorFlow's own is not
_TRIES = 10
NUM_DRAWS = 2 * _TRIES + 3  # area and ratio of each try; then row, column, flip


def random_crop(image: tf.Tensor, draws: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes a random window of an image, resizes it, and flips it with probability one half.

    The window covers 8 to 100 % of the image at an aspect ratio between 3/4 and 4/3; of ten tries
    the first that fits is taken, and if none fits (a panorama) the first, cut to the image.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), section 6.

    Args:
        image: scalar string: a JPEG, PNG, BMP or GIF file.
        draws: float32 `(NUM_DRAWS,)`, uniform in [0, 1).
        size: height and width of the result.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    pixels = _decode(image, lambda shape: random_window(shape, draws), size)
    # tf.reverse: a slice of step -1 takes as long as the decoding.
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(pixels, [1]), lambda: pixels)


def central_crop(image: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes the central square of an image and resizes it.

    The square's side is `central_fraction(size)` of the image's shorter side.

    Args:
        image: as in `random_crop`.
        size: height and width of the result.

    Returns:
        uint8 `(size, size, 3)`.
    """
    return _decode(image, lambda shape: central_window(shape, size), size)


def random_window(shape: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """The window of `random_crop`: int32 `(top, left, height, width)` for an image of int32 `(height, width)`."""
    import tensorflow as tf

    limits = tf.cast(shape, tf.float32)
    area = limits[0] * limits[1] * (0.08 + 0.92 * draws[:_TRIES])
    ratio = tf.exp(np.log(4 / 3).astype(np.float32) * (2 * draws[_TRIES : 2 * _TRIES] - 1))
    sides = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)], axis=1))
    fits = tf.reduce_all(sides <= limits, axis=1)
    side = tf.clip_by_value(sides[tf.argmax(tf.cast(fits, tf.int32))], 1.0, limits)
    start = tf.floor(draws[2 * _TRIES : 2 * _TRIES + 2] * (limits - side + 1))
    return tf.cast(tf.concat([start, side], axis=0), tf.int32)


def central_window(shape: tf.Tensor, size: int) -> tf.Tensor:
    """The window of `central_crop`: int32 `(top, left, height, width)` for an image of int32 `(height, width)`."""
    import tensorflow as tf

    shorter = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.maximum(tf.cast(tf.round(shorter * central_fraction(size)), tf.int32), 1)
    return tf.concat([(shape - side) // 2, [side, side]], axis=0)


def central_fraction(size: int) -> float:
    """Side of the central crop as a share of the image's shorter side.

    `size / 256`, which is 227/256 as in AlexNet and 224/256 as is common since, but at least 7/8 and at most 1.
    """
    return min(max(size / 256, 7 / 8), 1.0)


def _decode(image: tf.Tensor, window_of: Callable[[tf.Tensor], tf.Tensor], size: int) -> tf.Tensor:
    """The window of an upright image, resized to `size` squared, bilinear.

    Args:
        image: scalar string.
        window_of: from the int32 `(height, width)` of the image to int32 `(top, left, height, width)`.
        size: height and width of the result.
    """
    import tensorflow as tf

    def part_of_jpeg() -> tf.Tensor:
        window = window_of(tf.image.extract_jpeg_shape(image)[:2])
        return tf.io.decode_and_crop_jpeg(image, window, channels=3, dct_method=_DCT)

    def part_of_pixels(turn: tf.Tensor) -> tf.Tensor:
        pixels = tf.cond(
            tf.io.is_jpeg(image),
            lambda: tf.io.decode_jpeg(image, channels=3, dct_method=_DCT),
            lambda: tf.io.decode_image(image, channels=3, expand_animations=False),
        )
        pixels = upright(tf.ensure_shape(pixels, [None, None, 3]), turn)
        top, left, height, width = tf.unstack(window_of(tf.shape(pixels)[:2]))
        return pixels[top : top + height, left : left + width]

    def uncommon() -> tf.Tensor:  # another format, or a photograph with tags, perhaps taken with the camera turned
        turn = orientation(image)
        return tf.cond(tf.io.is_jpeg(image) & (turn == 1), part_of_jpeg, lambda: part_of_pixels(turn))

    pixels = tf.cond(tf.io.is_jpeg(image) & ~_has_tags(image), part_of_jpeg, uncommon)
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    pixels = tf.image.resize(pixels, (size, size), method="bilinear")
    return tf.cast(pixels + 0.5, tf.uint8)  # rounds; bilinear values never leave 0 to 255


def orientation(image: tf.Tensor) -> tf.Tensor:
    """How the camera was held, by the EXIF tag 0x0112 of a JPEG: an int32 in 1 to 8, 1 where there is none.

    Source: CIPA DC-008-2012 (EXIF 2.3), section 4.6.4.
    """
    import tensorflow as tf

    def read() -> tf.Tensor:
        head = tf.io.decode_raw(tf.strings.substr(image, 0, 2048), tf.uint8)
        fields = tf.signal.frame(head, frame_length=10, frame_step=1)
        turns = [
            tf.where(tf.reduce_all(fields[:, : len(tag)] == tf.constant(tag, tf.uint8), axis=1), fields[:, at], 0)
            # tag, type SHORT, count 1, value: in the two orders of bytes
            for tag, at in (([1, 0x12, 0, 3, 0, 0, 0, 1, 0], 9), ([0x12, 1, 3, 0, 1, 0, 0, 0], 8))
        ]
        turns = tf.reduce_max(turns, axis=0)
        # The first is the image's; a thumbnail may have one of its own.
        turn = tf.cast(tf.concat([turns[turns > 0], tf.zeros([1], tf.uint8)], axis=0)[0], tf.int32)
        return tf.where((turn >= 1) & (turn <= 8), turn, 1)

    return tf.cond(_has_tags(image), read, lambda: tf.constant(1))


def _has_tags(image: tf.Tensor) -> tf.Tensor:
    """Whether a JPEG has EXIF tags: they come first, or behind a JFIF header of 18 bytes."""
    import tensorflow as tf

    return tf.strings.regex_full_match(tf.strings.substr(image, 0, 28), r"\C{6}(\C{18})?Exif\C*")


def upright(pixels: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Turns an image of shape `(height, width, channels)` whose EXIF orientation is `turn`."""
    import tensorflow as tf

    pixels = tf.cond(turn >= 5, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    upside_down = tf.reduce_any(turn == [3, 4, 7, 8])
    mirrored = tf.reduce_any(turn == [2, 3, 6, 7])
    return tf.raw_ops.Reverse(tensor=pixels, dims=tf.stack([upside_down, mirrored, False]))
