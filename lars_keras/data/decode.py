"""Decoding of images: the crops of training and evaluation, which decode no more pixels than they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

_DCT = "INTEGER_ACCURATE"  # bit for bit what other JPEG readers use, and no slower; TensorFlow's default differs
_TRIES = 10
NUM_DRAWS = 2 * _TRIES + 3  # area and aspect ratio of each try; then row, column, flip


def random_crop(image: tf.Tensor, draws: tf.Tensor, size: int) -> tf.Tensor:
    """Decode a random window of an image, resize it, and flip it with probability one half.

    The window covers 8 to 100 % of the image at an aspect ratio between 3/4 and 4/3. The first of ten tries that fits
    is taken. If none fits, as in a panorama, the first try is cut to the image.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), section 6.

    Args:
        image: scalar string, the content of a JPEG, PNG, BMP or GIF file.
        draws: float32 `(NUM_DRAWS,)`, uniform in [0, 1).
        size: height and width of the result, in pixels.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    pixels = _decode(image, lambda shape: random_window(shape, draws), size)
    # A slice of step -1 would take as long as the decoding.
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(pixels, [1]), lambda: pixels)


def central_crop(image: tf.Tensor, size: int) -> tf.Tensor:
    """Decode the central square of an image, and resize it.

    The side of the square is `central_fraction(size)` times the shorter side of the image.

    Args:
        image: as in `random_crop`.
        size: height and width of the result, in pixels.

    Returns:
        uint8 `(size, size, 3)`.
    """
    return _decode(image, lambda shape: central_window(shape, size), size)


def random_window(shape: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Return the window of `random_crop`, int32 `(top, left, height, width)`, for an image of `(height, width)`."""
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
    """Return the window of `central_crop`, int32 `(top, left, height, width)`, for an image of `(height, width)`."""
    import tensorflow as tf

    shorter = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.maximum(tf.cast(tf.round(shorter * central_fraction(size)), tf.int32), 1)
    return tf.concat([(shape - side) // 2, [side, side]], axis=0)


def central_fraction(size: int) -> float:
    """Return the side of the central crop, as a fraction of the shorter side of the image.

    It is `size / 256`, limited to [7/8, 1]: 227/256 as in AlexNet, or 224/256 as is common since.
    """
    return min(max(size / 256, 7 / 8), 1.0)


def _decode(image: tf.Tensor, window_of: Callable[[tf.Tensor], tf.Tensor], size: int) -> tf.Tensor:
    """Decode a window of an image, turn it upright, and resize it to `size` squared by bilinear interpolation.

    Args:
        image: scalar string.
        window_of: maps the int32 `(height, width)` of the upright image to int32 `(top, left, height, width)`.
        size: height and width of the result, in pixels.
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

    def uncommon() -> tf.Tensor:  # another format, or a JPEG with EXIF tags, which may say that it is turned
        turn = orientation(image)
        return tf.cond(tf.io.is_jpeg(image) & (turn == 1), part_of_jpeg, lambda: part_of_pixels(turn))

    pixels = tf.cond(tf.io.is_jpeg(image) & ~_has_tags(image), part_of_jpeg, uncommon)
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    pixels = tf.image.resize(pixels, (size, size), method="bilinear")
    return tf.cast(pixels + 0.5, tf.uint8)  # rounds; bilinear values stay within 0 to 255


def orientation(image: tf.Tensor) -> tf.Tensor:
    """Read the orientation of a JPEG, its EXIF tag 0x0112: int32, 1 to 8. Return 1 if there is none.

    Source: CIPA DC-008-2012 (EXIF 2.3), section 4.6.4.
    """
    import tensorflow as tf

    def read() -> tf.Tensor:
        head = tf.io.decode_raw(tf.strings.substr(image, 0, 2048), tf.uint8)
        fields = tf.signal.frame(head, frame_length=10, frame_step=1)
        turns = [
            tf.where(tf.reduce_all(fields[:, : len(tag)] == tf.constant(tag, tf.uint8), axis=1), fields[:, at], 0)
            # tag, type SHORT, count 1, value; big-endian and little-endian
            for tag, at in (([1, 0x12, 0, 3, 0, 0, 0, 1, 0], 9), ([0x12, 1, 3, 0, 1, 0, 0, 0], 8))
        ]
        turns = tf.reduce_max(turns, axis=0)
        # The first tag is that of the image. A thumbnail may have a second one.
        turn = tf.cast(tf.concat([turns[turns > 0], tf.zeros([1], tf.uint8)], axis=0)[0], tf.int32)
        return tf.where((turn >= 1) & (turn <= 8), turn, 1)

    return tf.cond(_has_tags(image), read, lambda: tf.constant(1))


def _has_tags(image: tf.Tensor) -> tf.Tensor:
    """Return True for a JPEG with EXIF tags, which come first or after a JFIF header of 18 bytes."""
    import tensorflow as tf

    return tf.strings.regex_full_match(tf.strings.substr(image, 0, 28), r"\C{6}(\C{18})?Exif\C*")


def upright(pixels: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Turn an image `(height, width, channels)` of EXIF orientation `turn` upright."""
    import tensorflow as tf

    pixels = tf.cond(turn >= 5, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    upside_down = tf.reduce_any(turn == [3, 4, 7, 8])
    mirrored = tf.reduce_any(turn == [2, 3, 6, 7])
    return tf.raw_ops.Reverse(tensor=pixels, dims=tf.stack([upside_down, mirrored, False]))
