"""The fast network for CIFAR-10 of airbench (Jordan 2024, arXiv 2404.00498), after cifar10-fast and hlb-CIFAR10."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from models.batch_norm import batch_normalization

WHITENING_IMAGES = 5000
_PATCH = 2


def fast_cifar(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    synchronized: bool,
    widths: tuple[int, int, int] = (64, 256, 256),
    activation: str = "relu",
) -> keras.KerasTensor:
    """Build a whitening convolution, three groups of two convolutions each, and a linear head.

    The whitening kernel is not trained: `whiten` computes it from training images. A group is convolution, max pooling,
    batch normalization, activation, convolution, batch normalization, activation. Every convolution of a group starts
    as the identity on its first channels. Batch normalization has a shift but no scale, and fast moving averages.
    Logits are divided by 9. The source uses GELU.

    Args:
        x: normalized images.
        num_classes: number of logits.
        seeds: one for each initial value.
        synchronized: whether to take batch statistics over all replicas.
        widths: channels of the three groups.
        activation: as for `keras.layers.Activation`.

    Returns:
        The logits.
    """
    x = layers.Conv2D(
        2 * _PATCH**2 * x.shape[-1],
        _PATCH,
        use_bias=False,
        kernel_initializer=_uniform(next(seeds)),
        trainable=False,
        name="whiten",
    )(x)
    x = layers.Activation(activation, name=f"whiten_{activation}")(x)
    for group, width in enumerate(widths, start=1):
        for half in "ab":
            x = layers.Conv2D(
                width,
                3,
                padding="same",
                use_bias=False,
                kernel_initializer=Dirac(next(seeds)),
                name=f"conv{group}{half}",
            )(x)
            if half == "a":
                x = layers.MaxPooling2D(2, name=f"pool{group}")(x)
            x = batch_normalization(
                momentum=0.6, epsilon=1e-12, scale=False, synchronized=synchronized, name=f"bn{group}{half}"
            )(x)
            x = layers.Activation(activation, name=f"{activation}{group}{half}")(x)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    x = layers.Dense(num_classes, use_bias=False, kernel_initializer=_uniform(next(seeds)), dtype="float32", name="fc")(
        x
    )
    return layers.Rescaling(1 / 9, dtype="float32", name="scale")(x)


def whiten(model: keras.Model, images: np.ndarray) -> None:
    """Set the whitening kernel of a `fast_cifar` model from training images.

    Args:
        model: built by `models.get`.
        images: uint8 `(n, height, width, channels)`.
    """
    layer = model.get_layer("whiten")
    normalized = ops.convert_to_numpy(model.get_layer("normalize")(images))
    layer.kernel.assign(whitening_kernel(normalized))


def whitening_kernel(images: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """Return the eigenvectors of the covariance of 2x2 patches, scaled to unit variance, and their negatives.

    Args:
        images: normalized, `(n, height, width, channels)`.
        epsilon: added to the eigenvalues, so that noise is not blown up.

    Returns:
        float32 of shape `(2, 2, channels, 8 * channels)`, largest eigenvalue first.
    """
    n, height, width, channels = images.shape
    size = _PATCH**2 * channels
    corners = [(row, column) for row in range(_PATCH) for column in range(_PATCH)]
    shifted = [images[:, r : height - _PATCH + 1 + r, c : width - _PATCH + 1 + c] for r, c in corners]
    covariance = np.zeros((size, size))
    for block in range(0, n, 500):  # all patches in float64 would take a gigabyte
        patches = np.concatenate([part[block : block + 500] for part in shifted], -1).reshape(-1, size)
        covariance += patches.T.astype("float64") @ patches
    covariance /= n * (height - _PATCH + 1) * (width - _PATCH + 1)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(size)])  # the sign is free
    filters = (vectors / np.sqrt(values + epsilon)).reshape(_PATCH, _PATCH, channels, size)
    return np.concatenate([filters, -filters], -1).astype("float32")


def _uniform(seed: int | None) -> keras.initializers.Initializer:
    """Return PyTorch's default: uniform within 1 / sqrt(fan in)."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seed)


@keras.saving.register_keras_serializable(package="lars_keras")
class Dirac(keras.initializers.Initializer):
    """Initialize the first filters of a convolution as the identity, one for each input channel.

    The other filters are uniform within 1 / sqrt(fan in).

    Args:
        seed: seed of the other filters.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        height, width, inputs, filters = shape
        identity = min(inputs, filters)
        kernel = np.zeros(shape, "float32")
        kernel[height // 2, width // 2, np.arange(identity), np.arange(identity)] = 1.0
        drawn = _uniform(self.seed)(shape, dtype)
        return ops.where(np.arange(filters) < identity, ops.cast(kernel, drawn.dtype), drawn)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed}
