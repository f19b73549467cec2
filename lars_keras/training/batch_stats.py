"""The batch statistics of batch normalization, in one pass over its inputs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from lars_keras import _keras_internals as keras_internals

Tensor = Any


@contextlib.contextmanager
def one_pass_moments(
    model: keras.Model, over_replicas: Callable[[list[Tensor]], list[Tensor]] | None
) -> Iterator[None]:
    """Temporarily let the model's batch normalization compute its moments in one pass over its inputs.

    Keras computes the mean, then the mean of the squared differences from it, so a compiled program reads the
    activations twice. Here, with s near the mean, the sums of x - s and of its squares are computed together, where the
    activations are made:

        mean = s + E[x - s]        variance = E[(x - s)^2] - E[x - s]^2

    The shift s is the moving mean, taken as a constant. With s = 0, as at the start, the variance has the error of
    float32 relative to E[x^2]. Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"
    (shifted data).

    Args:
        model: built.
        over_replicas: returns each tensor of a list summed over the replicas, for layers with `synchronized=True`. If
            None, those layers keep Keras's own moments.
    """
    layers = [
        layer
        for layer in keras_internals.layers_of(model)
        if keras_internals.has_keras_moments(layer) and (over_replicas or not layer.synchronized)
    ]

    def moments_of(layer: keras.layers.BatchNormalization) -> Any:
        def moments(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            axes = keras_internals.reduction_axes(layer)
            near = ops.stop_gradient(ops.cast(layer.moving_mean, inputs.dtype))
            shape = [1 if axis in axes else size for axis, size in enumerate(inputs.shape)]
            x = inputs - ops.reshape(near, shape)
            counted = ops.ones_like(x)
            if mask is not None:
                counted = ops.broadcast_to(ops.cast(mask, x.dtype)[..., None], ops.shape(x))
                x = ops.where(counted > 0, x, 0.0)
            sums = [ops.sum(t, axes) for t in (counted, x, x * x)]
            count, total, squares = over_replicas(sums) if over_replicas and layer.synchronized else sums
            mean = total / ops.maximum(count, 1.0)
            variance = ops.maximum(squares / ops.maximum(count, 1.0) - mean * mean, 0.0)
            return near + mean, variance

        return moments

    for layer in layers:
        keras_internals.replace_moments(layer, moments_of(layer))
    try:
        yield
    finally:
        for layer in layers:
            keras_internals.restore_moments(layer)
