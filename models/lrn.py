"""Local response normalization across channels."""

from typing import Any, Literal

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="lars_keras")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides each activation by a power of the squared activations of its neighbor channels.

    `y[c] = x[c] / (bias + a * sum(x[c - radius : c + radius + 1] ** 2)) ** beta`. The sum skips channels that do not
    exist. `alpha` has two conventions, which differ by the size of the window:

    - `"sum"`: `a = alpha`, as in the AlexNet paper and `tf.nn.local_response_normalization`.
    - `"mean"`: `a = alpha / (2 * radius + 1)`, as in Caffe and cuda-convnet.

    The defaults come from the AlexNet paper: window 5, bias ("k") 2, alpha 1e-4, beta 0.75. Caffe's AlexNet has
    `bias=1.0, alpha_convention="mean"`. Under a half-precision policy the statistics and the power are float32, and the
    result is cast back to the compute dtype.

    Source: Krizhevsky, Sutskever and Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks",
    section 3.3.

    Args:
        radius: int >= 0, number of neighbors on each side of a channel.
        bias: float > 0, the constant k.
        alpha: float >= 0, weight of the squared activations.
        beta: float, the exponent.
        alpha_convention: `"sum"` or `"mean"`, see above.
        **kwargs: arguments of the base layer, e.g. `name`, `dtype`.

    Input shape: `(..., channels)` with a static number of channels. Output shape: the same.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        radius: int = 2,
        bias: float = 2.0,
        alpha: float = 1e-4,
        beta: float = 0.75,
        alpha_convention: Literal["sum", "mean"] = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(radius, int) or radius < 0:
            raise ValueError(f"`radius` must be an integer >= 0. Received: radius={radius!r}")
        if bias <= 0:
            raise ValueError(f"`bias` must be > 0. Received: bias={bias}")
        if alpha < 0:
            raise ValueError(f"`alpha` must be >= 0. Received: alpha={alpha}")
        if alpha_convention not in ("sum", "mean"):
            raise ValueError(
                f"`alpha_convention` must be 'sum' or 'mean'. Received: alpha_convention={alpha_convention!r}"
            )
        self.radius = radius
        self.bias = bias
        self.alpha = alpha
        self.beta = beta
        self.alpha_convention = alpha_convention

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        # The product with a banded matrix of ones is the fastest sum over the window on a CPU, gradient included, with
        # XLA and without. Slices, pooling and a cumulative sum were slower.
        channel = np.arange(x.shape[-1])
        band = np.abs(channel[:, None] - channel) <= self.radius
        weight = self.alpha
        if self.alpha_convention == "mean":
            weight /= 2 * self.radius + 1
        scale = self.bias + ops.matmul(ops.square(x), (weight * band).astype("float32"))
        if self.beta == 0.75:  # scale ** -0.75 by square roots, because a power costs several times more
            root = ops.rsqrt(scale)
            factor = root * ops.sqrt(root)
        else:
            factor = ops.power(scale, -self.beta)
        return ops.cast(x * factor, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "radius": self.radius,
            "bias": self.bias,
            "alpha": self.alpha,
            "beta": self.beta,
            "alpha_convention": self.alpha_convention,
        }
