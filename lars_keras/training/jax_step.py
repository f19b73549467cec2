"""One update over any number of devices and micro-batches, on JAX: a pure function.

    update(state, batch) -> (state, outcome)

An update of R devices and k micro-batches takes R * k ghost batches, device r taking number `i * R + r` in pass i. A
device sums what its passes give; after the last, the sums are reduced over the devices, once, and the optimizer runs.

With `shard_update` the weights and the optimizer's slots lie in shares: each device keeps one R-th of every kernel and
slot. It gathers the weights for its passes, gets its share of the summed gradients (a reduce-scatter), and updates its
share. The norms of LARS are sums over the shares, which the compiler adds up. Source: Xu et al. 2020,
"Automatic cross-replica sharding of weight update in data-parallel training" (arXiv 2004.13336); what lies in shares
between updates is that of ZeRO stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lars_keras.training.ghost import GhostBatch

Tensor = Any
State = dict[str, list[Any]]

SMALLEST_SHARED = 2**14  # elements: below, a collective of its own costs more than it saves


def share_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """The axis along which a weight is cut into shares: the longest that divides; None if it stays whole.

    The longest, because a share keeps the layout of the whole then: no copy is made to cut it.
    """
    if devices == 1 or math.prod(shape) < SMALLEST_SHARED:
        return None
    divides = [axis for axis, size in enumerate(shape) if size % devices == 0]
    return max(divides, key=lambda axis: shape[axis], default=None)


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


class JaxStep:
    """The functions of a built model and its optimizer, over the devices of a mesh with one axis.

    Args:
        model: compiled and built, with a built optimizer.
        mesh: its only axis is that of the replicas.
        microbatches: k, passes of an update.
        layer_norms: measure the norms of gradients and weights.
        shard_update: keep and update shares of the weights.
        reduce_dtype: of the gradients on their way between devices.

    Attributes:
        variables: the Keras variables of the state, in its order.
        update: `(state, batch) -> (state, outcome)`, jitted; the state is donated. The arrays of `batch` have the
            shape `(k, R * microbatch_size, ...)`. `outcome` has `loss`, `learning_rate` and `norms`, float32 of
            shape `(2, variables)`: of the gradients, 0 if the update is skipped, and of the weights after it.
    """

    def __init__(
        self,
        model: keras.Model,
        mesh: Mesh,
        *,
        microbatches: int,
        layer_norms: bool = False,
        shard_update: bool = False,
        reduce_dtype: str = "float32",
    ):
        self.model, self.optimizer, self.mesh = model, model.optimizer, mesh
        (self.axis,) = mesh.axis_names
        self.devices = mesh.devices.size
        self.microbatches = microbatches
        self.reduce_dtype = reduce_dtype
        self._measure = layer_norms
        self.ghost = GhostBatch(model)
        self.variables = {
            "trainable": self.ghost.trainable,
            "averaged": self.ghost.averaged,
            "counters": self.ghost.counters,
            "optimizer": list(self.optimizer.variables),
            "metrics": [v for metric in model.metrics for v in metric.variables],
        }
        self._shares = [share_axis(v.shape, self.devices) if shard_update else None for v in self.ghost.trainable]
        self._low_precision = _computed_in_low_precision(model) if shard_update else {}
        shares = {"trainable", "optimizer"} if shard_update else set()
        self.state_shardings = {
            group: [self._sharding(v.shape, group in shares) for v in variables]
            for group, variables in self.variables.items()
        }
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, self.axis))
        self.update = jax.jit(
            self._update,
            donate_argnums=0,
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, NamedSharding(mesh, PartitionSpec())),
        )

    def check_every_weight_is_used(self, element_spec: Any) -> None:
        """Raises ValueError if the loss does not depend on some trainable variable: JAX would say 0 for its gradient."""
        shapes = {group: [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in vs] for group, vs in self.variables.items()}
        data = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype.as_numpy_dtype), element_spec)

        def loss(trainable: list[Tensor], averaged: list[Tensor], counters: list[Tensor], data: Any) -> Tensor:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with self._synchronized_moments():
                return self.ghost.loss(trainable, averaged, counters, x, y, sample_weight, jnp.int32(0))[0]

        arguments = (shapes["trainable"], shapes["averaged"], shapes["counters"], data)
        jaxpr = jax.make_jaxpr(loss, axis_env=[(self.axis, self.devices)])(*arguments).jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True])
        unused = [v.path for v, u in zip(self.ghost.trainable, used, strict=False) if not u]
        if unused:
            raise ValueError(
                "The loss does not depend on these trainable variables; set `trainable = False` on their layers: "
                + ", ".join(unused)
            )

    def _sharding(self, shape: tuple[int, ...], shared: bool) -> NamedSharding:
        axis = share_axis(shape, self.devices) if shared else None
        return NamedSharding(self.mesh, _spec(axis, self.axis))

    def _update(self, state: State, batch: Any) -> tuple[State, dict[str, Tensor]]:
        with keras.StatelessScope(list(zip(self.variables["optimizer"], state["optimizer"], strict=True))):
            rate = jnp.asarray(self.optimizer.learning_rate, jnp.float32)
            scale = jnp.asarray(self.optimizer.scale_loss(jnp.float32(1.0)), jnp.float32)

        weights, whole = [_spec(axis, self.axis) for axis in self._shares], PartitionSpec()
        gradients, (averaged, metrics, loss), counters = jax.shard_map(
            self._sums_over_devices,
            mesh=self.mesh,
            in_specs=(weights, whole, whole, whole, PartitionSpec(None, self.axis)),
            out_specs=(weights, whole, whole),
            check_vma=False,
        )(state["trainable"], state["averaged"], state["counters"], scale, batch)

        # Each device has the same sums, or its share of them: Keras's own update is the same everywhere, and the
        # compiler cuts it as its arguments are cut.
        trainable, optimizer = self.optimizer.stateless_apply(
            state["optimizer"],
            [g.astype(v.dtype) for g, v in zip(gradients, self.ghost.trainable, strict=True)],
            state["trainable"],
        )
        i = next(i for i, v in enumerate(self.variables["optimizer"]) if v is inner_optimizer(self.optimizer).iterations)
        taken = optimizer[i] > state["optimizer"][i]
        new = {
            "trainable": trainable,
            "averaged": [a.astype(v.dtype) for a, v in zip(averaged, self.ghost.averaged, strict=True)],
            "counters": counters,
            "optimizer": optimizer,
            "metrics": [total + own for total, own in zip(state["metrics"], metrics, strict=True)],
        }
        norms = jnp.zeros([2, 0])
        if self._measure:
            norms = jnp.stack([jnp.where(taken, _norms(gradients) / scale, 0.0), _norms(trainable)])
        return new, {"loss": loss, "learning_rate": rate, "norms": norms}

    def _sums_over_devices(
        self, shares: list[Tensor], averaged: list[Tensor], counters: list[Tensor], scale: Tensor, batch: Any
    ) -> tuple[list[Tensor], Any, list[Tensor]]:
        """On each device: gradients (its shares of them), and what else is summed, over all ghost batches."""
        weights = [
            self._gathered(share, axis, v)
            for share, axis, v in zip(shares, self._shares, self.ghost.trainable, strict=True)
        ]
        device = lax.axis_index(self.axis)

        def add_ghost_batch(sums: Any, inputs: Any) -> tuple[Any, list[Tensor]]:
            i, data = inputs
            own, new_counters = self._ghost_sums(
                weights, averaged, counters, data, i * self.devices + device, scale
            )
            return jax.tree.map(jnp.add, sums, own), new_counters

        first = jax.tree.map(lambda a: a[0], batch)
        if self.microbatches == 1:
            (gradients, others), counters = self._ghost_sums(weights, averaged, counters, first, device, scale)
        else:
            shapes, _ = jax.eval_shape(self._ghost_sums, weights, averaged, counters, first, device, scale)
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            numbers = jnp.arange(self.microbatches, dtype=jnp.int32)
            (gradients, others), every = lax.scan(add_ghost_batch, nothing, (numbers, batch))
            counters = [c[-1] for c in every]
        return self._reduced(gradients), lax.psum(others, self.axis), counters

    def _ghost_sums(
        self,
        weights: list[Tensor],
        averaged: list[Tensor],
        counters: list[Tensor],
        data: Any,
        index: Tensor,
        scale: Tensor,
    ) -> tuple[Any, list[Tensor]]:
        """What one ghost batch adds to `(gradients, (averaged, metrics, loss))`, and the counters after it."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        ghosts = self.devices * self.microbatches

        def loss_of(weights: list[Tensor]) -> tuple[Tensor, Any]:
            with self._synchronized_moments():
                loss, y_pred, *state = self.ghost.loss(weights, averaged, counters, x, y, sample_weight, index)
            loss = loss / ghosts
            return loss * scale.astype(loss.dtype), (loss, y_pred, *state)

        (_, (loss, y_pred, new_averaged, new_counters)), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        gradients = [g.astype(jnp.float32) for g in gradients]
        new_averaged = [a.astype(jnp.float32) / ghosts for a in new_averaged]
        metrics = self._metrics_from_nothing(x, y, y_pred, sample_weight)
        return (gradients, (new_averaged, metrics, loss.astype(jnp.float32))), new_counters

    def _metrics_from_nothing(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> list[Tensor]:
        """What a batch adds to the metrics' variables, which are sums."""
        variables = self.variables["metrics"]
        nothing = [(v, jnp.zeros(v.shape, v.dtype)) for v in variables]
        with keras.StatelessScope(nothing) as scope:
            self.model.compute_metrics(x, y, y_pred, sample_weight)
            return [scope.get_current_value(v) for v in variables]

    def _gathered(self, share: Tensor, axis: int | None, variable: keras.Variable) -> Tensor:
        """The whole weight. Where the layer rounds it anyway, the share is rounded before its way, half as long."""
        if axis is None:
            return share
        dtype = self._low_precision.get(id(variable), share.dtype)
        return lax.all_gather(share.astype(dtype), self.axis, axis=axis, tiled=True).astype(share.dtype)

    def _reduced(self, gradients: list[Tensor]) -> list[Tensor]:
        """The only reduction of the gradients in an update."""
        traffic = [g.astype(self.reduce_dtype) for g in gradients]
        whole = iter(lax.psum([g for g, axis in zip(traffic, self._shares, strict=True) if axis is None], self.axis))
        summed = [
            next(whole) if axis is None else lax.psum_scatter(g, self.axis, scatter_dimension=axis, tiled=True)
            for g, axis in zip(traffic, self._shares, strict=True)
        ]
        return [g.astype(jnp.float32) for g in summed]

    @contextlib.contextmanager
    def _synchronized_moments(self) -> Iterator[None]:
        """Keras's batch normalisation has no `synchronized=True` on JAX: meanwhile, it has."""
        layers = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
        ]

        def over_devices(layer: keras.layers.BatchNormalization) -> Any:
            def moments(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
                x = inputs.astype(jnp.float32)
                weight = jnp.ones([1] * x.ndim) if mask is None else mask[..., None].astype(jnp.float32)
                weight = jnp.broadcast_to(weight, x.shape)
                axes = layer._reduction_axes
                own = [jnp.sum(t * weight, axes) for t in (jnp.ones_like(x), x, x * x)]
                count, total, squares = lax.psum(own, self.axis)
                mean = total / jnp.maximum(count, 1.0)
                variance = jnp.maximum(squares / jnp.maximum(count, 1.0) - mean * mean, 0.0)
                return mean.astype(inputs.dtype), variance.astype(inputs.dtype)

            return moments

        for layer in layers:
            layer._moments = over_devices(layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer._moments


def _spec(axis: int | None, name: str) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)


def _norms(tensors: list[Tensor]) -> Tensor:
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(t.astype(jnp.float32)))) for t in tensors])


def _computed_in_low_precision(model: keras.Model) -> dict[int, str]:
    """The dtype of weights, by `id`, that every layer which has them rounds before it uses them."""
    dtypes: dict[int, set[str]] = {}
    for layer in model._flatten_layers():
        for v in layer._trainable_variables:
            rounded = getattr(v, "_autocast", False) and getattr(v, "regularizer", None) is None
            dtypes.setdefault(id(v), set()).add(layer.compute_dtype if rounded else v.dtype)
    return {key: next(iter(found)) for key, found in dtypes.items() if len(found) == 1}
