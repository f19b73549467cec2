"""Data sets of JPEG records: decoding fused with the crop, in TensorFlow's parallel map."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lars_keras.data.bad_images import BadImages
from lars_keras.data.image_data import ImageData

if TYPE_CHECKING:
    import tensorflow as tf

# Over the ImageNet training images, pixel values 0 to 255.
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)

_TRIES = 10
NUM_DRAWS = 2 * _TRIES + 3  # area and ratio of each try; then row, column, flip


class Records(Protocol):
    """Random access to serialised examples."""

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> list[bytes]: ...

    def record(self, i: tf.Tensor) -> tf.Tensor: ...

    def where(self, i: int) -> str: ...


class JpegData(ImageData):
    """JPEG records, decoded as they are used.

    Training images are cut by a random resized crop and flipped (see `random_crop`), test images by
    a central crop (see `central_crop`); both are resized to `image_size` squared, bilinear, and
    delivered as uint8 RGB. Grayscale and CMYK files become RGB. A rotation in the EXIF tag is
    ignored.

    An image that cannot be read is delivered in the mean colour with label 0 and mask 0, so that it counts in no
    loss, gradient or score, and is noted in `bad_images`.

    Args:
        name: name of the data set.
        train, test: random access to the serialised examples of the split.
        parse: a TensorFlow function from a serialised example to (JPEG bytes, integer label).
        num_classes: number of classes.
        image_size: height and width of the images delivered, in pixels.
        description: one line for people.
        remote: whether batches are made on other hosts than this process's, as for a TPU pod. No Python function can
            run there, so a host prints on its own terminal which image it could not read.
    """

    def __init__(
        self,
        name: str,
        train: Records,
        test: Records,
        parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        num_classes: int,
        *,
        image_size: int = 227,
        description: str = "",
        remote: bool = False,
    ):
        if image_size < 1:
            raise ValueError(f"`image_size` must be positive. Received: image_size={image_size}")
        self._train, self._test, self._parse = train, test, parse
        self.name = name
        self.num_classes = num_classes
        self.image_shape = (image_size, image_size, 3)
        self.num_train, self.num_test = len(train), len(test)
        self.mean, self.std = _IMAGENET_MEAN, _IMAGENET_STD
        self.description = description or name
        self.bad_images = BadImages()
        self._remote = remote

    _num_draws = NUM_DRAWS

    def _train_examples(self, ids: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
        size = self.image_shape[0]

        def load(i, draw):
            jpeg, label = self._parse(self._train.record(i))
            image = random_crop(jpeg, draw, size) if draw.shape[0] else central_crop(jpeg, size)
            return image, label, 1.0

        return self._block(load, (ids, draws), self._train)

    def _test_examples(self, ids: tf.Tensor) -> tuple[tf.Tensor, ...]:
        import tensorflow as tf

        def decode(i):
            jpeg, label = self._parse(self._test.record(i))
            return central_crop(jpeg, self.image_shape[0]), label, 1.0

        def load(i):
            padding = lambda: (tf.zeros(self.image_shape, tf.uint8), tf.zeros((), tf.int64), 0.0)  # noqa: E731
            return tf.cond(i < self.num_test, lambda: decode(i), padding)

        return self._block(load, (ids,), self._test)

    def _block(
        self, load: Callable[..., Any], arguments: tuple[tf.Tensor, ...], records: Records
    ) -> tuple[tf.Tensor, ...]:
        """`load` of each row of `arguments`, in parallel; row by row where that fails, to see which of them it is."""
        import tensorflow as tf

        mean = np.broadcast_to(np.round(self.mean), self.image_shape).astype(np.uint8)

        def example(i, *draw):
            image, label, mask = load(tf.cast(i, tf.int64), *draw)
            return tf.ensure_shape(image, self.image_shape), tf.cast(label, tf.int32), mask

        def note(i, *draw):
            self.bad_images.note(records.where(int(i)), lambda: example(i, *draw))
            return np.float32(0.0)

        def instead(*row):
            if self._remote:
                tf.print("left out an image that cannot be read, number", row[0], output_stream=sys.stderr)
                return mean, 0, 0.0
            return mean, 0, tf.ensure_shape(tf.numpy_function(note, row, tf.float32), [])

        def example_or_instead(*row):
            one = tf.data.Dataset.from_tensors(row)
            return one.map(example).ignore_errors().concatenate(one.map(instead)).take(1)

        rows = arguments[0].shape[0]
        examples = tf.data.Dataset.from_tensor_slices(arguments)
        fast = examples.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(
            rows, drop_remainder=True
        )
        careful = examples.flat_map(example_or_instead).batch(rows, drop_remainder=True)
        return fast.ignore_errors().concatenate(careful).take(1).get_single_element()


def random_crop(jpeg: tf.Tensor, draws: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes a random window of a JPEG, resizes it, and flips it with probability one half.

    The window covers 8 to 100 % of the image at an aspect ratio between 3/4 and 4/3; of ten tries
    the first that fits is taken, and if none fits (a panorama) the first, cut to the image.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), section 6.

    Args:
        jpeg: scalar string.
        draws: float32 `(NUM_DRAWS,)`, uniform in [0, 1).
        size: height and width of the result.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    shape = tf.image.extract_jpeg_shape(jpeg)[:2]
    limits = tf.cast(shape, tf.float32)
    area = limits[0] * limits[1] * (0.08 + 0.92 * draws[:_TRIES])
    ratio = tf.exp(np.log(4 / 3).astype(np.float32) * (2 * draws[_TRIES : 2 * _TRIES] - 1))
    sides = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)], axis=1))
    fits = tf.reduce_all(sides <= limits, axis=1)
    side = tf.clip_by_value(sides[tf.argmax(tf.cast(fits, tf.int32))], 1.0, limits)
    start = tf.floor(draws[-3:-1] * (limits - side + 1))
    window = tf.cast(tf.concat([start, side], axis=0), tf.int32)
    image = _decode_window(jpeg, window, size)
    return tf.cond(draws[-1] < 0.5, lambda: image[:, ::-1], lambda: image)


def central_crop(jpeg: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes the central square of a JPEG and resizes it.

    The square's side is `size / 256` of the image's shorter side (227/256 as in AlexNet, 224/256 as
    is common since), but at least 7/8 of it, and at most all.

    Args:
        jpeg: scalar string.
        size: height and width of the result.

    Returns:
        uint8 `(size, size, 3)`.
    """
    import tensorflow as tf

    shape = tf.image.extract_jpeg_shape(jpeg)[:2]
    fraction = min(max(size / 256, 7 / 8), 1.0)
    shorter = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.maximum(tf.cast(tf.round(shorter * fraction), tf.int32), 1)
    window = tf.concat([(shape - side) // 2, [side, side]], axis=0)
    return _decode_window(jpeg, window, size)


def _decode_window(jpeg: tf.Tensor, window: tf.Tensor, size: int) -> tf.Tensor:
    import tensorflow as tf

    image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)
    image = tf.image.resize(image, (size, size), method="bilinear")
    return tf.cast(image + 0.5, tf.uint8)  # rounds; bilinear values never leave 0 to 255
