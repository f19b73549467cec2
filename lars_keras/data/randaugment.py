"""RandAugment by KerasCV, driven by the random numbers of each example in place of KerasCV's generators."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

try:
    import keras_cv
    from keras_cv.core import ConstantFactorSampler, FactorSampler, NormalFactorSampler, UniformFactorSampler
except ImportError as e:
    raise ImportError("`augment` randaugment needs keras-cv: install this project with its extra [augment]") from e

_LAYERS = 2  # applied in sequence; N in the source
_MAGNITUDE = 0.3  # on a scale of 1; M = 9 on a scale of 30 in the source
_SPREAD = 0.15  # standard deviation of the magnitude


def randaugment(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Apply two random layers of random strength, from color, contrast, shear and shift.

    Source: Cubuk et al. 2019 (arXiv 1909.13719), with the ten layers and the scales of KerasCV.

    Args:
        image: uint8 `(height, width, 3)`.
        draws: float32 of at least 2 numbers, uniform in [0, 1), multiples of 2^-24. They are the seed.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: if the image does not have 3 channels.
    """
    if image.shape[-1] != 3:
        raise ValueError(f"RandAugment needs images of 3 channels. Received: shape {image.shape}")
    numbers = _Numbers(tf.cast(draws[:2] * 2.0**24, tf.int32))
    layers = keras_cv.layers.RandAugment.get_standard_policy((0, 255), _MAGNITUDE, _SPREAD)
    for layer in layers:
        numbers.replace_generators(layer)

    def apply(layer: Any, pixels: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.cast(layer(pixels[None], training=True)[0], tf.float32), image.shape)

    pixels = tf.cast(image, tf.float32)
    for _ in range(_LAYERS):
        choice = numbers.uniform((), 0, len(layers), tf.int32)
        branches = [lambda layer=layer, pixels=pixels: apply(layer, pixels) for layer in layers]
        pixels = tf.switch_case(choice, branches)
    return tf.saturate_cast(pixels + 0.5, tf.uint8)


class _Numbers:
    """A stateless stream of random numbers, in place of a `tf.random.Generator`.

    Args:
        seed: int32 `(2,)`.
    """

    def __init__(self, seed: tf.Tensor):
        self._seed = seed
        self._taken = 0

    def _next(self) -> tf.Tensor:
        self._taken += 1
        return self._seed + tf.constant([0, self._taken << 24])  # the seed has 24 bits

    def uniform(self, shape: Any, minval: Any = 0, maxval: Any = 1, dtype: Any = tf.float32) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, self._next(), minval, maxval, dtype)

    def normal(self, shape: Any, mean: Any, stddev: Any, dtype: Any = tf.float32) -> tf.Tensor:
        return tf.random.stateless_normal(shape, self._next(), mean, stddev, dtype)

    def replace_generators(self, layer: Any) -> None:
        """Replace all random generators of a KerasCV layer by this stream, and make the layer compute in float32."""
        layer.dtype_policy = "float32"  # also under a half-precision policy: the sum of a float16 image overflows
        layer._random_generator = self
        for name, value in list(vars(layer).items()):
            if isinstance(value, FactorSampler) and not isinstance(value, ConstantFactorSampler):
                setattr(layer, name, _Sampler(value, self))


class _Sampler(FactorSampler):
    """A KerasCV sampler that draws from a given stream."""

    def __init__(self, distribution: NormalFactorSampler | UniformFactorSampler, numbers: _Numbers):
        self._distribution, self._numbers = distribution, numbers

    def __call__(self, shape: Any = (), dtype: Any = "float32") -> tf.Tensor:
        d = self._distribution
        if isinstance(d, NormalFactorSampler):
            return tf.clip_by_value(self._numbers.normal(shape, d.mean, d.stddev, dtype), d.min_value, d.max_value)
        return self._numbers.uniform(shape, d.lower, d.upper, dtype)
