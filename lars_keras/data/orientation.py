"""Read the orientation of encoded images by TensorFlow operations only, which hosts without Python can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.data.tracing import traced_once

if TYPE_CHECKING:
    import tensorflow as tf

_ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4
_TABLES = b"\xff\xdb"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_OF_PNG = b"XML:com.adobe.xmp\0"
_HEAD = 12  # bytes of a segment or chunk that tell what it is
_MOST_SEGMENTS = 4096  # a damaged file must not take minutes


def may_be_turned(jpeg: tf.Tensor) -> tf.Tensor:
    """Return False for a JPEG that has neither EXIF nor XMP, from a look at its beginning.

    In such a JPEG, tables follow a few application segments and comments, none of them APP1. The next 2 kB reach the
    pixels, without the marker of another such segment or comment, whose contents could look like the marker of the
    pixels.
    """
    import tensorflow as tf

    start = _substr(jpeg, 0, 22)
    after_jfif = (_substr(start, 2, 4) == b"\xff\xe0\x00\x10") & (_substr(start, 20, 2) == _TABLES)
    at = tf.cond(after_jfif, lambda: tf.constant(20, tf.int64), lambda: _end_of_applications(jpeg))

    def others_or_no_pixels() -> tf.Tensor:
        head = tf.io.decode_raw(_substr(jpeg, at, 2048), tf.uint8)
        code = tf.where(head[:-1] == 0xFF, head[1:], tf.zeros_like(head[1:]))
        return tf.reduce_any((code >= 0xE0) & (code != 0xFF)) | ~tf.reduce_any(code == 0xDA)

    return tf.cond(_substr(jpeg, at, 2) == _TABLES, others_or_no_pixels, lambda: tf.constant(True))


def _end_of_applications(jpeg: tf.Tensor) -> tf.Tensor:
    """Return the place, int64, behind the first segments APPn and COM of a JPEG: at most four, and none APP1."""
    import tensorflow as tf

    at = tf.constant(2, tf.int64)
    for _ in range(4):
        head = number(jpeg, at, 4, little=False)
        marker, length = head // 65536, head % 65536
        passed = ((marker == 0xFFE0) | ((marker > 0xFFE1) & (marker <= 0xFFEF)) | (marker == 0xFFFE)) & (length >= 2)
        at += tf.where(passed, length + 2, 0)
    return at


@traced_once
def orientation(image: tf.Tensor) -> tf.Tensor:
    """Read the orientation of a JPEG, PNG or WebP: int32, 1 to 8. Return 1 if there is none.

    The orientation is the tag 0x0112 of the first directory of the EXIF block, which may be anywhere before the pixels
    of a JPEG, and in any chunk of a PNG or WebP. Without that tag it is `tiff:Orientation` of the XMP block.

    Sources: CIPA DC-008-2012 (EXIF 2.3), section 4.6.4; PNG, third edition, section 11.3.3.6; RFC 9649 (WebP), section
    2.7.

    Args:
        image: scalar string.
    """
    import tensorflow as tf

    nothing = lambda: (tf.constant(b""), tf.constant(b""))  # noqa: E731
    png = lambda: tf.cond(_has_metadata_of_png(image), lambda: _blocks(image, 8, _png_chunk), nothing)  # noqa: E731
    exif, xmp = tf.cond(
        tf.io.is_jpeg(image),
        lambda: _blocks(image, 2, _jpeg_segment),
        lambda: tf.cond(
            is_webp(image),
            lambda: _blocks(image, 12, _webp_chunk),
            lambda: tf.cond(_substr(image, 0, 8) == b"\x89PNG\r\n\x1a\n", png, nothing),
        ),
    )
    turn = _of_exif(exif)
    turn = tf.cond(turn == 0, lambda: _of_xmp(xmp), lambda: turn)
    return tf.where((turn >= 1) & (turn <= 8), turn, 1)


def upright(pixels: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Turn an image `(height, width, channels)` of EXIF orientation `turn` upright."""
    import tensorflow as tf

    pixels = tf.cond(turn >= 5, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    upside_down = tf.reduce_any(turn == [3, 4, 7, 8])
    mirrored = tf.reduce_any(turn == [2, 3, 6, 7])
    return tf.raw_ops.Reverse(tensor=pixels, dims=tf.stack([upside_down, mirrored, False]))


def is_webp(image: tf.Tensor) -> tf.Tensor:
    """Return True for the content of a WebP file."""
    return (_substr(image, 0, 4) == b"RIFF") & (_substr(image, 8, 4) == b"WEBP")


def number(data: tf.Tensor, at: int | tf.Tensor, count: int, little: bool | tf.Tensor = True) -> tf.Tensor:
    """Return the unsigned number of `count` bytes at `at`, int64; missing bytes are 0."""
    import tensorflow as tf

    found = tf.io.decode_raw(_substr(data, at, count), tf.uint8)
    found = tf.pad(found, [[0, count - tf.size(found)]])
    return _numbers(tf.ensure_shape(found, [count]), little)


def _numbers(digits: tf.Tensor, little: bool | tf.Tensor) -> tf.Tensor:
    """Return the unsigned numbers, int64, whose bytes are in the last axis."""
    import tensorflow as tf

    weights = np.int64(256) ** np.arange(digits.shape[-1])
    return tf.reduce_sum(tf.cast(digits, tf.int64) * tf.where(little, weights, weights[::-1]), axis=-1)


def _substr(data: tf.Tensor, at: int | tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """Return at most `count` bytes of a scalar string; none beyond its end."""
    import tensorflow as tf

    at = tf.minimum(tf.cast(at, tf.int64), tf.cast(tf.strings.length(data), tf.int64))
    return tf.strings.substr(data, at, tf.cast(count, tf.int64))


Step = tuple["tf.Tensor", ...]


def _blocks(
    image: tf.Tensor, first: int, read: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Step]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Walk over the segments or chunks from byte `first` on. Return the EXIF block and the XMP block.

    Args:
        image: scalar string.
        first: place of the first segment.
        read: maps `image`, the place of a segment and its first 12 bytes to (the place of the next, whether the walk
            ends, the place and the end of its contents, whether these are EXIF, whether they are XMP).
    """
    import tensorflow as tf

    size = tf.cast(tf.strings.length(image), tf.int64)
    zero = tf.constant(0, tf.int64)

    def goes_on(at: tf.Tensor, ended: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
        return ~ended & (at + _HEAD <= size)

    def step(at: tf.Tensor, _: tf.Tensor, exif: tf.Tensor, xmp: tf.Tensor) -> tuple[tf.Tensor, ...]:
        head = tf.ensure_shape(tf.io.decode_raw(tf.strings.substr(image, at, _HEAD), tf.uint8), [_HEAD])
        after, ended, begin, end, is_exif, is_xmp = read(image, at, head)
        block = tf.stack([begin, end])
        exif = tf.where(is_exif & (exif[1] == 0), block, exif)  # the first one
        return after, ended, exif, tf.where(is_xmp, block, xmp)  # the last one

    none = tf.stack([zero, zero])
    _, _, exif, xmp = tf.while_loop(
        goes_on,
        step,
        (zero + first, tf.constant(False), none, none),
        parallel_iterations=1,
        maximum_iterations=_MOST_SEGMENTS,
    )
    return _substr(image, exif[0], exif[1] - exif[0]), _substr(image, xmp[0], xmp[1] - xmp[0])


def _is(found: tf.Tensor, expected: bytes) -> tf.Tensor:
    import tensorflow as tf

    return tf.reduce_all(found == np.frombuffer(expected, np.uint8))


def _jpeg_segment(image: tf.Tensor, at: tf.Tensor, head: tf.Tensor) -> Step:
    import tensorflow as tf

    code = tf.cast(head[1], tf.int64)
    is_marker = head[0] == 0xFF
    alone = (code == 0) | (code == 1) | ((code >= 0xD0) & (code <= 0xD8))  # without a length
    size = tf.where(alone, tf.zeros_like(at), tf.maximum(_numbers(head[2:4], False), 2))
    # Like libjpeg, skip all bytes between segments that are not a marker. Bytes of 0xFF may come before a marker.
    after = tf.where(is_marker & (code != 0xFF), at + 2 + size, at + 1)
    ends = is_marker & ((code == 0xDA) | (code == 0xD9))
    app1 = is_marker & (code == 0xE1)
    is_exif = app1 & _is(head[4:10], b"Exif\0\0")
    is_xmp = app1 & (_substr(image, at + 4, len(_XMP)) == _XMP)
    return after, ends, at + 4, after, is_exif, is_xmp


def _png_chunk(image: tf.Tensor, at: tf.Tensor, head: tf.Tensor) -> Step:
    end = at + 8 + _numbers(head[:4], False)
    is_xmp = _substr(image, at + 4, 4 + len(_XMP_OF_PNG)) == b"iTXt" + _XMP_OF_PNG
    return end + 4, _is(head[4:8], b"IEND"), at + 8, end, _is(head[4:8], b"eXIf"), is_xmp


def _webp_chunk(_: tf.Tensor, at: tf.Tensor, head: tf.Tensor) -> Step:
    import tensorflow as tf

    size = _numbers(head[4:8], True)
    end = at + 8 + size
    return end + size % 2, tf.constant(False), at + 8, end, _is(head[:4], b"EXIF"), _is(head[:4], b"XMP ")


def _has_metadata_of_png(image: tf.Tensor) -> tf.Tensor:
    """Return False for a PNG that has neither EXIF nor XMP, faster than a walk over its chunks."""
    import tensorflow as tf

    return tf.strings.regex_full_match(image, r"\C*(?:eXIf|XML:com\.adobe\.xmp)\C*")


def _of_exif(block: tf.Tensor) -> tf.Tensor:
    """Return the orientation in the first directory of an EXIF block, int32; 0 if it has none.

    The second directory belongs to a thumbnail.
    """
    import tensorflow as tf

    prefix = tf.where(_substr(block, 0, 6) == b"Exif\0\0", 6, 0)
    block = _substr(block, prefix, tf.strings.length(block))
    order = _substr(block, 0, 2)
    little = order == b"II"
    directory = number(block, 4, 4, little)
    length = 12 * number(block, directory, 2, little)
    entries = tf.io.decode_raw(_substr(block, directory + 2, length), tf.uint8)
    entries = tf.reshape(entries[: tf.size(entries) // 12 * 12], [-1, 12])
    tag, kind, count, short, long = (
        _numbers(entries[:, a:b], little) for a, b in ((0, 2), (2, 4), (4, 8), (8, 10), (8, 12))
    )
    value = tf.where(kind == _LONG, long, short)
    fits = ((kind == _SHORT) & (count >= 1) & (count <= 2)) | ((kind == _LONG) & (count == 1))
    found = (tag == _ORIENTATION) & fits
    found &= little | (order == b"MM")
    value = tf.boolean_mask(value, found)
    # A value out of range stays one: it must not be 0, which would ask the XMP block.
    return tf.cast(tf.clip_by_value(tf.concat([[0], value], 0)[-1], 0, 9), tf.int32)


def _of_xmp(block: tf.Tensor) -> tf.Tensor:
    """Return the orientation in an XMP block, int32; 0 if it has none."""
    import tensorflow as tf

    text = tf.strings.regex_replace(block, r"^\C*?tiff:Orientation(?:=\"|>)([0-9])\C*$", r"\1", replace_global=False)
    is_digit = tf.strings.regex_full_match(text, "[0-9]")
    return tf.strings.to_number(tf.where(is_digit, text, "0"), tf.int32)
