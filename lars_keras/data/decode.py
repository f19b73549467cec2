"""Decode images: the crops of training and evaluation, without decoding more pixels than they need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.data.orientation import is_webp, may_be_turned, number, orientation, upright
from lars_keras.data.tracing import traced_once

if TYPE_CHECKING:
    import tensorflow as tf

DCT = "INTEGER_ACCURATE"  # bit for bit what other JPEG readers use, and no slower; TensorFlow's default differs
_TRIES = 10
NUM_DRAWS = 2 * _TRIES + 3  # area and aspect ratio of each try; then row, column, flip


@traced_once
def random_crop(image: tf.Tensor, draws: tf.Tensor, size: int) -> tf.Tensor:
    """Decode a random window of an image, resize it, and flip it with probability one half.

    The window covers 8 to 100 % of the image at an aspect ratio between 3/4 and 4/3. It is the first of ten tries that
    fits. If none fits, as in a panorama, the first try is cut to the image.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), section 6.

    Args:
        image: scalar string, the content of a JPEG, PNG, WebP, BMP or GIF file.
        draws: float32 `(NUM_DRAWS,)`, uniform in [0, 1).
        size: height and width of the result, in pixels.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    pixels = _decode(image, lambda shape: random_window(shape, draws), size)
    # A slice of step -1 would take as long as the decoding.
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(pixels, [1]), lambda: pixels)


@traced_once
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
    """Decode a window as `decode_window` does, and resize it to `size` squared by bilinear interpolation."""
    import tensorflow as tf

    pixels = tf.image.resize(decode_window(image, window_of), (size, size), method="bilinear")
    return tf.cast(pixels + 0.5, tf.uint8)  # rounds; bilinear values stay within 0 to 255


def decode_window(image: tf.Tensor, window_of: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Decode a window of an image that is turned upright.

    Args:
        image: scalar string.
        window_of: maps the int32 `(height, width)` of the upright image to int32 `(top, left, height, width)`.

    Returns:
        uint8 `(height, width, 3)`, of unknown height and width.
    """
    import tensorflow as tf

    def part_of_jpeg() -> tf.Tensor:
        window = window_of(tf.image.extract_jpeg_shape(image)[:2])
        return tf.io.decode_and_crop_jpeg(image, window, channels=3, dct_method=DCT)

    def part_of_pixels(turn: tf.Tensor) -> tf.Tensor:
        pixels = tf.cond(
            tf.io.is_jpeg(image),
            lambda: tf.io.decode_jpeg(image, channels=3, dct_method=DCT),
            lambda: tf.cond(
                is_webp(image),
                lambda: _decode_webp(image),
                lambda: tf.cond(_is_indexed_bmp(image), lambda: _decode_indexed_bmp(image), lambda: _decode_any(image)),
            ),
        )
        pixels = upright(tf.ensure_shape(pixels, [None, None, 3]), turn)
        top, left, height, width = tf.unstack(window_of(tf.shape(pixels)[:2]))
        return pixels[top : top + height, left : left + width]

    # Another format, or a JPEG with tags, which may say that it is turned. A function that is not inlined is optimized
    # when it is first used: most data have no such image, and this takes longer than all the rest.
    @functools.partial(tf.function, autograph=False, experimental_attributes={"_noinline": True})
    def uncommon() -> tf.Tensor:
        turn = orientation(image)
        return tf.cond(tf.io.is_jpeg(image) & (turn == 1), part_of_jpeg, lambda: part_of_pixels(turn))

    common = tf.cond(tf.io.is_jpeg(image), lambda: ~may_be_turned(image), lambda: tf.constant(False))
    return tf.ensure_shape(tf.cond(common, part_of_jpeg, uncommon), [None, None, 3])


def _decode_any(image: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    return tf.io.decode_image(image, channels=3, expand_animations=False)


def _decode_webp(image: tf.Tensor) -> tf.Tensor:
    """Decode a WebP that is not animated. Drop its transparency, as for other formats."""
    import tensorflow as tf

    extended = tf.strings.substr(image, 12, 4) == b"VP8X"
    animated = extended & (number(image, 20, 1) // 2 % 2 == 1)
    # TensorFlow 2.21 frees memory twice when it decodes an animated one.
    with tf.control_dependencies([tf.debugging.Assert(~animated, ["an animated WebP"])]):
        # It refuses three channels for an image that has four.
        return tf.io.decode_image(tf.identity(image), channels=0, expand_animations=False)[:, :, :3]


def _is_indexed_bmp(image: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    return tf.strings.regex_full_match(image, r"BM\C*") & (number(image, 28, 2) == 8)


def _decode_indexed_bmp(image: tf.Tensor) -> tf.Tensor:
    """Decode a BMP of one byte a pixel by its table of colors; TensorFlow would read it as grayscale."""
    import tensorflow as tf

    header, compression, offset = number(image, 14, 4), number(image, 30, 4), number(image, 10, 4)
    with tf.control_dependencies([tf.debugging.Assert((header >= 40) & (compression == 0), ["a compressed BMP"])]):
        indices = tf.io.decode_bmp(tf.identity(image), channels=0)[:, :, 0]
    colors = tf.minimum(tf.maximum(offset - 14 - header, 0) // 4, 256)
    table = tf.io.decode_raw(tf.strings.substr(image, 14 + header, 4 * colors), tf.uint8)
    table = tf.pad(tf.reshape(table, [-1, 4])[:, 2::-1], [[0, 256 - colors], [0, 0]])
    return tf.gather(table, tf.cast(indices, tf.int32))
