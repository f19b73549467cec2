"""Shard weights over devices, gather them, and reduce the gradients.

Source: Xu et al. 2020, "Automatic cross-replica sharding of weight update in data-parallel training" (arXiv
2004.13336). Between updates the same state is sharded as in ZeRO stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lars_keras import _keras_internals as keras_internals

Tensor = Any

# Thinner shards are not worth their own traffic, and lie badly in a TPU's tiles of 8 x 128.
_THINNEST = 8
_SMALLEST = 2**14  # elements of a weight that is sharded


def shard_dims(shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...] | None:
    """Return, for each axis of the mesh, the dimension of a weight that is sharded along it; None if it is replicated.

    Each axis in turn shards the dimension whose shards are the longest so far.
    """
    if mesh.devices.size == 1 or math.prod(shape) < _SMALLEST:
        return None
    left, chosen = list(shape), []
    for length in mesh.devices.shape:
        able = [d for d, size in enumerate(left) if size % length == 0 and size // length >= _THINNEST]
        if not able:
            return None
        dimension = max(able, key=lambda d: left[d])
        left[dimension] //= length
        chosen.append(dimension)
    return tuple(chosen)


def shard_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the specification of a sharded weight, or of a replicated one."""
    chosen = shard_dims(shape, mesh)
    if chosen is None:
        return PartitionSpec()
    names = [tuple(name for name, c in zip(mesh.axis_names, chosen, strict=True) if c == d) for d in range(len(shape))]
    return PartitionSpec(*(name or None for name in names))


def shard_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of a weight, sharded or replicated."""
    return NamedSharding(mesh, shard_spec(shape, mesh))


class WeightSharding:
    """The sharding of a model's trainable variables on a mesh. Call its methods inside `jax.shard_map`.

    Args:
        model: built.
        variables: its trainable variables.
        mesh: mesh of the replicas.
        sharded: shard the weights that are large enough; else every device has all weights.
        reduce_dtype: dtype of the gradients on their way between devices.
        overwritten: for each variable, True if its gradient is its new value: it is never sharded.

    Attributes:
        shardings: sharding of each variable.
        specs: the same without the mesh.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: Sequence[keras.Variable],
        mesh: Mesh,
        sharded: bool,
        reduce_dtype: str,
        overwritten: Sequence[bool],
    ):
        self.axes, self.sharded, self._reduce_dtype = mesh.axis_names, sharded, reduce_dtype
        self._overwritten = overwritten
        shared = [sharded and not o for o in overwritten]
        self._dims = [shard_dims(v.shape, mesh) if s else None for v, s in zip(variables, shared, strict=True)]
        self.specs = [
            shard_spec(v.shape, mesh) if s else PartitionSpec() for v, s in zip(variables, shared, strict=True)
        ]
        self.shardings = [NamedSharding(mesh, spec) for spec in self.specs]
        low_precision = _low_precision_weights(model) if sharded else {}
        self._sent_dtypes = [
            low_precision.get(id(v), v.dtype) if dims else v.dtype
            for v, dims in zip(variables, self._dims, strict=True)
        ]

    def round(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Round the shards that every layer rounds anyway, before they are sent: this halves their bytes."""
        return [shard.astype(dtype) for shard, dtype in zip(shards, self._sent_dtypes, strict=True)]

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return the full weights on each device."""
        weights = []
        for shard, weight, dims in zip(shards, self.round(shards), self._dims, strict=True):
            for name, dimension in reversed(list(zip(self.axes, dims or (), strict=False))):
                weight = lax.all_gather(weight, name, axis=dimension, tiled=True)
            weights.append(weight.astype(shard.dtype))
        return weights

    def reduce(self, gradients: Sequence[Tensor], others: Any) -> tuple[list[Tensor], Any]:
        """Sum over the devices, the only reduction of an update.

        Args:
            gradients: gradients of one device, in full.
            others: a tree of further arrays.

        Returns:
            The sums of the gradients, in float32 or float64, and of `others`. For a sharded weight, only this device's
            shard of the sum. For a variable that is overwritten, the largest of the new values.
        """
        low = self._reduce_dtype != "float32"  # else float64 for such weights
        reduced = [
            None if o else g.astype(self._reduce_dtype) if low else g
            for g, o in zip(gradients, self._overwritten, strict=True)
        ]
        replicated, others = lax.psum(
            ([None if dims else g for g, dims in zip(reduced, self._dims, strict=True)], others), self.axes
        )
        results = []
        for new, g, total, dims in zip(gradients, reduced, replicated, self._dims, strict=True):
            total = lax.pmax(new, self.axes) if g is None else self._scatter(g, dims) if dims else total
            results.append(total.astype(jnp.promote_types(total.dtype, jnp.float32)))
        return results, others

    def _scatter(self, gradient: Tensor, dims: Sequence[int]) -> Tensor:
        """Return this device's shard of a gradient, summed over the devices.

        Kernels of 1 x 1 convolutions go without their dimensions of 1: with them, the compiler of libtpu 0.0.52 ends in
        "AllReduceScatterFusion not implemented".
        """
        ones = tuple(d for d, size in enumerate(gradient.shape) if size == 1)
        gradient = jnp.squeeze(gradient, ones)
        for name, dimension in zip(self.axes, dims, strict=True):
            place = dimension - sum(d < dimension for d in ones)
            gradient = lax.psum_scatter(gradient, name, scatter_dimension=place, tiled=True)
        return jnp.expand_dims(gradient, ones)


def _low_precision_weights(model: keras.Model) -> dict[int, str]:
    """Return, by the `id` of a weight, the dtype to which all of its layers cast it before they use it."""
    dtypes: dict[int, set[str]] = {}
    for layer in keras_internals.layers_of(model):
        for v in keras_internals.own_trainable_variables(layer):
            rounded = keras_internals.has_autocast(v) and getattr(v, "regularizer", None) is None
            dtypes.setdefault(id(v), set()).add(layer.compute_dtype if rounded else v.dtype)
    return {key: next(iter(found)) for key, found in dtypes.items() if len(found) == 1}
