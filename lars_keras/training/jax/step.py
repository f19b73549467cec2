"""One update over any number of devices and micro-batches, on JAX: pure functions.

An update of R devices and k micro-batches takes R * k ghost batches, R in a pass (`jax_mesh.ghost_numbers`). A device
sums what its passes give; after the last, the sums are reduced over the devices, once, and the optimizer runs.
With k = 1 that is one program; else one for a pass, run k times without waiting for it, and one for the rest, so that
the devices hold the images of a pass or two, never of an update. (A loop inside one program is seven times slower on a
CPU, where XLA does not hand the convolutions of a loop's body to its fast ones.)

With `shard_optimizer_state` the weights and the optimizer's slots lie in shards: each device keeps one R-th of every
kernel and slot. It gathers the weights for its passes, gets its share of the summed gradients (a reduce-scatter), and
updates its share. The norms of LARS are sums over the shares, which the compiler adds up. Source: Xu et al. 2020,
"Automatic cross-replica sharding of weight update in data-parallel training" (arXiv 2004.13336); what lies in shares
between updates is that of ZeRO stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lars_keras import _keras_internals as keras_internals
from lars_keras._jax_internals import used_inputs
from lars_keras.layerwise import measuring
from lars_keras.training.forward import StatelessForward
from lars_keras.training.jax.mesh import ghost_numbers, shard_dims, shard_sharding
from lars_keras.training.state import inner_optimizer

Tensor = Any
State = dict[str, list[Any]]


class JaxStep:
    """The functions of a built model and its optimizer, over the devices of a mesh.

    Args:
        model: compiled and built, with a built optimizer.
        mesh: of the replicas; see `jax_mesh`.
        accumulation_steps: k, passes of an update.
        layer_norms: measure the norms of gradients and weights.
        layer_ratios: measure what a `LayerwiseOptimizer` does to each variable.
        shard_optimizer_state: keep and update shares of the weights.
        reduce_dtype: of the gradients on their way between devices.

    Attributes:
        variables: the Keras variables of the state, in its order.
        state_shardings: where the state lies, in the same order; `whole`: what each device has all of.
        batch_sharding: where the arrays of a pass lie; their first dimension has R * microbatch_size examples.
    """

    def __init__(
        self,
        model: keras.Model,
        mesh: Mesh,
        *,
        accumulation_steps: int,
        layer_norms: bool = False,
        layer_ratios: bool = False,
        shard_optimizer_state: bool = False,
        reduce_dtype: str = "float32",
    ):
        self.model, self.optimizer, self.mesh = model, model.optimizer, mesh
        self.axes = mesh.axis_names
        self.devices = mesh.devices.size
        self.accumulation_steps = accumulation_steps
        self.reduce_dtype = reduce_dtype
        self._sharded = shard_optimizer_state
        self._measure, self._measure_ratios = layer_norms, layer_ratios
        self.forward = StatelessForward(model, compiled=True, over_replicas=lambda sums: lax.psum(sums, self.axes))
        self.variables = {
            "trainable": self.forward.trainable,
            "batch_stats": self.forward.batch_stats,
            "rng_state": self.forward.rng_state,
            "optimizer": list(self.optimizer.variables),
            "metrics": [v for metric in model.metrics for v in metric.variables],
        }
        self._shard_dims = [
            shard_dims(v.shape, mesh) if shard_optimizer_state else None for v in self.forward.trainable
        ]
        self._low_precision = _computed_in_low_precision(model) if shard_optimizer_state else {}
        self.replicated = whole = NamedSharding(mesh, _REPLICATED)
        self.state_shardings = {group: [whole] * len(variables) for group, variables in self.variables.items()}
        if shard_optimizer_state:
            for group in ("trainable", "optimizer"):
                self.state_shardings[group] = [shard_sharding(v.shape, mesh) for v in self.variables[group]]
        self._shard_specs = [s.spec for s in self.state_shardings["trainable"]]
        self._batch_sharded = PartitionSpec(self.axes)
        self.batch_sharding = self.sums_sharding = NamedSharding(mesh, self._batch_sharded)
        self.single_update = jax.jit(self._single_update, donate_argnums=0, out_shardings=(self.state_shardings, whole))
        self.begin = jax.jit(self._begin, out_shardings=(whole, whole, self.sums_sharding))
        self.accumulate = jax.jit(self._accumulate, donate_argnums=0, out_shardings=(self.sums_sharding, whole))
        self.finish = jax.jit(self._finish, donate_argnums=0, out_shardings=(self.state_shardings, whole))

    def update(self, state: State, next_batch: Callable[[Any], Any]) -> tuple[State, dict[str, Tensor]]:
        """Takes the next k batches; the state is donated.

        Args:
            state: of all variables.
            next_batch: makes a batch, given arrays that the devices are still at work on.

        Returns:
            The new state, and the outcome: `loss`, `learning_rate` and `norms`, float32 of shape `(rows, variables)`.
            With `layer_norms` two rows: of the gradients, 0 if the update is skipped, and of the weights after it. With
            `layer_ratios` those of `MEASURES`.
        """
        if self.accumulation_steps == 1:
            return self.single_update(state, next_batch(state["trainable"]))
        weights, scale, sums = self.begin(state)
        for i in range(self.accumulation_steps):
            batch = next_batch(sums)
            sums, rng_state = self.accumulate(
                sums, weights or state["trainable"], state["batch_stats"], state["rng_state"], scale, batch, np.int32(i)
            )
        return self.finish(state, sums, rng_state)

    def check_every_weight_is_used(self, element_spec: Any) -> None:
        """Raises ValueError if the loss does not depend on a trainable variable: JAX would take 0 for its gradient."""
        shapes = {group: [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in vs] for group, vs in self.variables.items()}
        data = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype.as_numpy_dtype), element_spec)

        def loss(trainable: list[Tensor], batch_stats: list[Tensor], rng_state: list[Tensor], data: Any) -> Tensor:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            return self.forward.loss(trainable, batch_stats, rng_state, x, y, sample_weight, jnp.int32(0))[0]

        arguments = (shapes["trainable"], shapes["batch_stats"], shapes["rng_state"], data)
        used = used_inputs(loss, list(zip(self.axes, self.mesh.devices.shape, strict=True)), *arguments)
        unused = [v.path for v, u in zip(self.forward.trainable, used, strict=False) if not u]
        if unused:
            raise ValueError(
                "The loss does not depend on these trainable variables; set `trainable = False` on their layers: "
                + ", ".join(unused)
            )

    # -- the programs --------------------------------------------------------------------------

    def _single_update(self, state: State, data: Any) -> tuple[State, dict[str, Tensor]]:
        """An update of one pass."""

        def on_device(
            shares: list[Tensor], batch_stats: list[Tensor], rng_state: list[Tensor], scale: Tensor, data: Any
        ) -> tuple[list[Tensor], Any, list[Tensor]]:
            weights = [
                self._gathered(*each) for each in zip(shares, self._shard_dims, self.forward.trainable, strict=True)
            ]
            index = self._ghost_number()
            sums, rng_state = self._ghost_sums(weights, batch_stats, rng_state, data, index, scale)
            return *self._reduced(sums), rng_state

        arguments = (state["trainable"], state["batch_stats"], state["rng_state"], self._loss_scale(state), data)
        specs = (self._shard_specs, _REPLICATED, _REPLICATED, _REPLICATED, self._batch_sharded)
        gradients, others, rng_state = self._on_devices(
            on_device, specs, (self._shard_specs, _REPLICATED, _REPLICATED)
        )(*arguments)
        return self._applied(state, gradients, others, rng_state)

    def _begin(self, state: State) -> tuple[list[Tensor], Tensor, Any]:
        """Of an update of several passes: the whole weights, the scale of the loss, and sums of nothing.

        No weights where none lie in shares: the state has them, and a copy would take as much again.
        """
        parts = zip(state["trainable"], self._shard_dims, self.forward.trainable, strict=True)
        weights = [self._rounded(*each) for each in parts] if self._sharded else []
        groups = (self.forward.trainable, self.forward.batch_stats, self.variables["metrics"])
        gradients, batch_stats, metrics = (
            [jnp.zeros((self.devices, *v.shape), "float32" if group < 2 else v.dtype) for v in variables]
            for group, variables in enumerate(groups)
        )
        return weights, self._loss_scale(state), (gradients, (batch_stats, metrics, jnp.zeros(self.devices)))

    def _accumulate(
        self,
        sums: Any,
        weights: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        scale: Tensor,
        data: Any,
        i: Tensor,
    ) -> tuple[Any, list[Tensor]]:
        """Adds pass `i` to each device's sums, without any traffic between them; and the rng_state after it."""

        def on_device(sums: Any, weights: list[Tensor], *arguments: Any) -> tuple[Any, list[Tensor]]:
            batch_stats, rng_state, scale, data, i = arguments
            whole = [w.astype(v.dtype) for w, v in zip(weights, self.forward.trainable, strict=True)]
            index = i * self.devices + self._ghost_number()
            own, rng_state = self._ghost_sums(whole, batch_stats, rng_state, data, index, scale)
            return jax.tree.map(lambda total, value: total + value[None], sums, own), rng_state

        specs = (
            self._batch_sharded,
            _REPLICATED,
            _REPLICATED,
            _REPLICATED,
            _REPLICATED,
            self._batch_sharded,
            _REPLICATED,
        )
        on_devices = self._on_devices(on_device, specs, (self._batch_sharded, _REPLICATED))
        return on_devices(sums, weights, batch_stats, rng_state, scale, data, i)

    def _finish(self, state: State, sums: Any, rng_state: list[Tensor]) -> tuple[State, dict[str, Tensor]]:
        """The reduction after the last pass, and the update."""

        def on_device(sums: Any) -> tuple[list[Tensor], Any]:
            return self._reduced(jax.tree.map(lambda total: total[0], sums))

        on_devices = self._on_devices(on_device, self._batch_sharded, (self._shard_specs, _REPLICATED))
        gradients, others = on_devices(sums)
        return self._applied(state, gradients, others, rng_state)

    def _on_devices(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        arguments = (in_specs,) if isinstance(in_specs, PartitionSpec) else in_specs
        return jax.shard_map(function, mesh=self.mesh, in_specs=arguments, out_specs=out_specs, check_vma=False)

    def _applied(
        self, state: State, gradients: list[Tensor], others: Any, rng_state: list[Tensor]
    ) -> tuple[State, dict[str, Tensor]]:
        """Keras's own update. All devices have the same sums, or their shares of them: as the arguments are dims, the
        compiler shard_dims the update."""
        batch_stats, metrics, loss = others
        with measuring() as measures:  # what nobody asks for, the compiler leaves out
            trainable, optimizer = self.optimizer.stateless_apply(
                state["optimizer"],
                [g.astype(v.dtype) for g, v in zip(gradients, self.forward.trainable, strict=True)],
                state["trainable"],
            )
        iterations = inner_optimizer(self.optimizer).iterations
        i = next(i for i, v in enumerate(self.variables["optimizer"]) if v is iterations)
        taken = optimizer[i] > state["optimizer"][i]
        new = {
            "trainable": trainable,
            "batch_stats": [a.astype(v.dtype) for a, v in zip(batch_stats, self.forward.batch_stats, strict=True)],
            "rng_state": rng_state,
            "optimizer": optimizer,
            "metrics": [total + own for total, own in zip(state["metrics"], metrics, strict=True)],
        }
        norms = jnp.zeros([0, len(trainable)])
        if self._measure:
            scale = self._loss_scale(state)
            norms = jnp.stack([jnp.where(taken, _norms(gradients) / scale, 0.0), _norms(trainable)])
        if self._measure_ratios:
            norms = jnp.concatenate([norms, jnp.stack(measures, axis=1)])
        with keras.StatelessScope(self._mapping("optimizer", state)):
            rate = jnp.asarray(self.optimizer.learning_rate, jnp.float32)
        return new, {"loss": loss, "learning_rate": rate, "norms": norms}

    # -- their parts ---------------------------------------------------------------------------

    def _mapping(self, group: str, state: State) -> list[tuple[keras.Variable, Tensor]]:
        return list(zip(self.variables[group], state[group], strict=True))

    def _loss_scale(self, state: State) -> Tensor:
        with keras.StatelessScope(self._mapping("optimizer", state)):
            return jnp.asarray(self.optimizer.scale_loss(jnp.float32(1.0)), jnp.float32)

    def _ghost_sums(
        self,
        weights: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        data: Any,
        index: Tensor,
        scale: Tensor,
    ) -> tuple[Any, list[Tensor]]:
        """What one ghost batch adds to `(gradients, (batch_stats, metrics, loss))`, and the rng_state after it."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        ghosts = self.devices * self.accumulation_steps

        def loss_of(weights: list[Tensor]) -> tuple[Tensor, Any]:
            loss, y_pred, *state = self.forward.loss(weights, batch_stats, rng_state, x, y, sample_weight, index)
            loss = loss / ghosts
            return loss * scale.astype(loss.dtype), (loss, y_pred, *state)

        (_, (loss, y_pred, new_batch_stats, new_rng_state)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            weights
        )
        gradients = [g.astype(jnp.float32) for g in gradients]
        new_batch_stats = [a.astype(jnp.float32) / ghosts for a in new_batch_stats]
        metrics = self._metrics_from_nothing(x, y, y_pred, sample_weight)
        return (gradients, (new_batch_stats, metrics, loss.astype(jnp.float32))), new_rng_state

    def _ghost_number(self) -> Tensor:
        """The place of this device's ghost batch in its pass."""
        return jnp.asarray(ghost_numbers(list(self.mesh.devices.flat)))[lax.axis_index(self.axes)]

    def _metrics_from_nothing(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> list[Tensor]:
        """What a batch adds to the metrics' variables, which are sums."""
        variables = self.variables["metrics"]
        nothing = [(v, jnp.zeros(v.shape, v.dtype)) for v in variables]
        with keras.StatelessScope(nothing) as scope:
            self.model.compute_metrics(x, y, y_pred, sample_weight)
            return [scope.get_current_value(v) for v in variables]

    def _rounded(self, share: Tensor, dims: Any, variable: keras.Variable) -> Tensor:
        """A share as it is sent: where the layer rounds the weight anyway, it is rounded before, and half as long."""
        return share.astype(self._low_precision.get(id(variable), share.dtype)) if dims else share

    def _gathered(self, share: Tensor, dims: Any, variable: keras.Variable) -> Tensor:
        """The whole weight, on each device."""
        weight = self._rounded(share, dims, variable)
        for name, dimension in reversed(list(zip(self.axes, dims or (), strict=False))):
            weight = lax.all_gather(weight, name, axis=dimension, tiled=True)
        return weight.astype(share.dtype)

    def _reduced(self, sums: Any) -> tuple[list[Tensor], Any]:
        """The only reduction over devices in an update: of each gradient the whole, or this device's share."""
        gradients, others = sums
        sent = [g.astype(self.reduce_dtype) for g in gradients]
        whole, others = lax.psum(
            ([g for g, dims in zip(sent, self._shard_dims, strict=True) if dims is None], others), self.axes
        )
        rest = iter(whole)
        summed = [
            next(rest) if dims is None else self._scattered(g, dims)
            for g, dims in zip(sent, self._shard_dims, strict=True)
        ]
        return [g.astype(jnp.float32) for g in summed], others

    def _scattered(self, gradient: Tensor, dims: Sequence[int]) -> Tensor:
        """This device's share of a gradient, summed over the devices.

        Kernels of 1 x 1 convolutions go without their dimensions of 1: with them, the compiler of libtpu 0.0.52 ends in
        "AllReduceScatterFusion not implemented".
        """
        ones = tuple(d for d, size in enumerate(gradient.shape) if size == 1)
        gradient = jnp.squeeze(gradient, ones)
        for name, dimension in zip(self.axes, dims, strict=True):
            place = dimension - sum(d < dimension for d in ones)
            gradient = lax.psum_scatter(gradient, name, scatter_dimension=place, tiled=True)
        return jnp.expand_dims(gradient, ones)


_REPLICATED = PartitionSpec()


def _norms(tensors: list[Tensor]) -> Tensor:
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(t.astype(jnp.float32)))) for t in tensors])


def _computed_in_low_precision(model: keras.Model) -> dict[int, str]:
    """The dtype of weights, by `id`, that every layer which has them rounds before it uses them."""
    dtypes: dict[int, set[str]] = {}
    for layer in keras_internals.layers_of(model):
        for v in keras_internals.own_trainable_variables(layer):
            rounded = keras_internals.has_autocast(v) and getattr(v, "regularizer", None) is None
            dtypes.setdefault(id(v), set()).add(layer.compute_dtype if rounded else v.dtype)
    return {key: next(iter(found)) for key, found in dtypes.items() if len(found) == 1}
