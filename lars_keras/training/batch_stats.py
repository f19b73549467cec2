"""Compute the batch statistics of batch normalization in one pass over its inputs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from lars_keras import _keras_internals as keras_internals

Tensor = Any

_FAR = 30.0  # squared distance of the shift from the mean, in units of the variance


@contextlib.contextmanager
def one_pass_moments(
    model: keras.Model, over_replicas: Callable[[list[Tensor]], list[Tensor]] | None
) -> Iterator[None]:
    """Temporarily make the model's batch normalization compute its moments in one pass over its inputs.

    Keras computes the mean, then the mean of the squared differences from it, so a compiled program reads the
    activations twice. Here, with s near the mean, the sums of x - s and of its squares are computed together, where the
    activations are made:

        mean = s + E[x - s]        variance = E[(x - s)^2] - E[x - s]^2

    The shift s is the moving mean, taken as a constant. The error of the variance grows by the factor
    1 + (mean - s)^2 / variance. If this factor is above 31 in a channel, as at the start and for inputs far from 0, the
    sums are taken again around the new mean, over the inputs in the layer's compute dtype, to which Keras casts
    floating-point inputs. Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance" (shifted
    data).

    A shift from the batch itself, such as the mean of some examples, would be near the mean from the start. But the
    sums would have to wait for the activations, and read them again: 2.21 GB for 1.29 GB in a network of four layers on
    a TPU v5e.

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
            axes = list(keras_internals.reduction_axes(layer))
            shape = [1 if axis in axes else size for axis, size in enumerate(inputs.shape)]
            if mask is not None:
                mask = ops.broadcast_to(ops.cast(mask, "bool")[..., None], ops.shape(inputs))

            def around(shift: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
                """Return the mean of x - s, and the variance."""
                x = ops.cast(inputs, shift.dtype) - ops.reshape(shift, shape)
                x = x if mask is None else ops.where(mask, x, 0)
                counted = ops.ones_like(x) if mask is None else ops.cast(mask, x.dtype)
                sums = [ops.sum(t, axes) for t in (counted, x, x * x)]
                count, total, squares = over_replicas(sums) if over_replicas and layer.synchronized else sums
                count = ops.maximum(count, 1)
                return total / count, squares / count - (total / count) ** 2

            shift = ops.stop_gradient(ops.cast(layer.moving_mean, inputs.dtype))
            offset, variance = around(shift, inputs)
            mean = shift + offset
            # Only the values: the gradients of the first sums have no larger error than the rounding of the inputs.
            x, near, first = (ops.stop_gradient(t) for t in (inputs, mean, variance))
            is_near = ops.all(ops.stop_gradient(offset) ** 2 <= _FAR * (first + layer.epsilon))
            x = ops.cast(x, layer.compute_dtype)  # or a TPU would write it in float32, for a branch seldom taken
            offset, again = ops.cond(is_near, lambda: (ops.zeros_like(near), first), lambda: around(near, x))
            return mean + offset, ops.maximum(again, 0) + (variance - first)

        return moments

    for layer in layers:
        keras_internals.replace_moments(layer, moments_of(layer))
    try:
        yield
    finally:
        for layer in layers:
            keras_internals.restore_moments(layer)
