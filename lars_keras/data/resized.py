"""Store images at one size, as AlexNet's authors did, so that training decodes and resizes less.

Sources: Krizhevsky, Sutskever and Hinton 2012, section 2 (crop the center); `create_imagenet.sh` of BVLC Caffe
(squash).
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from lars_keras.data.decode import DCT, decode_window
from lars_keras.data.tracing import traced_once

if TYPE_CHECKING:
    import tensorflow as tf

_FORM = re.compile(r"(crop|squash)([1-9]\d{1,3})(?:_(png|raw|q([1-9]\d?|100)))?")
_USUAL_QUALITY = 95
_BORDER = 2  # pixels of a window of a JPEG that are not those of the whole image


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form in which images are stored, written as in `crop256`, `squash256_q90`, `crop384_png` or `crop256_raw`.

    Attributes:
        mode: `"crop"` resizes the shorter side and keeps the central square; `"squash"` ignores the aspect ratio.
        size: height and width, in pixels.
        encoding: `"jpeg"`, `"png"` or `"raw"`.
        quality: JPEG quality, 1 to 100.
    """

    mode: str
    size: int
    encoding: str = "jpeg"
    quality: int = _USUAL_QUALITY

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Return the storage that `text` names.

        Raises:
            ValueError: if the text has another form.
        """
        found = _FORM.fullmatch(text)
        if not found:
            raise ValueError(
                "`resized` must be crop or squash and a size in pixels, as in crop256, then for another encoding than "
                f"JPEG of quality 95: _png, _raw or _q and the quality, as in squash256_q90. Received: resized={text}"
            )
        mode, size, encoding, quality = found.groups()
        return cls(mode, int(size), "jpeg" if quality or not encoding else encoding, int(quality or _USUAL_QUALITY))

    def __str__(self) -> str:
        suffix = "" if self.encoding == "jpeg" else f"_{self.encoding}"
        return f"{self.mode}{self.size}{suffix}" + (f"_q{self.quality}" if self.quality != _USUAL_QUALITY else "")


@traced_once
def resized(image: tf.Tensor, storage: Storage) -> tf.Tensor:
    """Return an image in the form of `storage`: a scalar string, or for raw uint8 pixels `(size, size, 3)`.

    The resize is bilinear with antialiasing, like Pillow's, because images become several times smaller.

    Args:
        image: scalar string, as in `lars_keras.data.decode.random_crop`.
        storage: the form.
    """
    import tensorflow as tf

    pixels = decode_window(image, lambda shape: tf.concat([[0, 0], shape], 0))
    if storage.mode == "crop":  # of the whole image, because the border of a decoded window differs
        shape = tf.shape(pixels)[:2]
        side = tf.reduce_min(shape)
        pixels = tf.slice(pixels, tf.concat([(shape - side) // 2, [0]], 0), tf.stack([side, side, 3]))
    pixels = tf.image.resize(pixels, (storage.size, storage.size), method="bilinear", antialias=True)
    pixels = tf.saturate_cast(tf.round(pixels), tf.uint8)
    if storage.encoding == "raw":
        return pixels
    return tf.io.encode_png(pixels) if storage.encoding == "png" else tf.io.encode_jpeg(pixels, quality=storage.quality)


@traced_once
def mirrored_window(image: tf.Tensor, draws: tf.Tensor, size: int, storage: Storage) -> tf.Tensor:
    """Decode a random window of a stored image, and flip it with probability one half. Nothing is resized.

    Source: Krizhevsky, Sutskever and Hinton 2012, section 4.1.

    Args:
        image: scalar string, a stored image.
        draws: float32 `(n,)`, uniform in [0, 1): the first two choose row and column, the last one the flip.
        size: height and width of the window, in pixels.
        storage: the form of the image.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    start = tf.cast(draws[:2] * float(storage.size - size + 1), tf.int32)
    pixels = _window(image, start, size, storage)
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(pixels, [1]), lambda: pixels)


@traced_once
def central_window(image: tf.Tensor, size: int, storage: Storage) -> tf.Tensor:
    """Decode the central window of a stored image; arguments and result are as in `mirrored_window`."""
    import tensorflow as tf

    return _window(image, tf.fill([2], (storage.size - size) // 2), size, storage)


def _window(image: tf.Tensor, start: tf.Tensor, size: int, storage: Storage) -> tf.Tensor:
    import tensorflow as tf

    if storage.encoding == "raw":
        pixels = tf.reshape(tf.io.decode_raw(image, tf.uint8), (storage.size, storage.size, 3))
    elif storage.encoding == "png":
        pixels = tf.io.decode_png(image, channels=3)
    else:
        # A JPEG decoder interpolates the colors at the border of a window without the pixels beyond it.
        first = tf.maximum(start - _BORDER, 0)
        sides = tf.minimum(start + size + _BORDER, storage.size) - first
        pixels = tf.io.decode_and_crop_jpeg(image, tf.concat([first, sides], 0), channels=3, dct_method=DCT)
        start -= first
    return tf.ensure_shape(tf.slice(pixels, tf.concat([start, [0]], 0), (size, size, 3)), (size, size, 3))
