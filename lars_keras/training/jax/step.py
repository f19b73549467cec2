"""One update over any number of devices and micro-batches, on JAX: pure functions.

An update of R devices and k micro-batches each takes R * k ghost batches, R at a time; `lars_keras.training.jax.mesh`
numbers them. A device sums the results of its ghost batches. After the last one, the sums are reduced over the devices,
once, and the optimizer runs. With k = 1 an update is one program. Otherwise there is one program for a micro-batch, run
k times without waiting, and one for the rest. So the devices hold the images of one or two micro-batches, never of an
update. (A loop inside one program is seven times slower on a CPU, where XLA does not use its fast convolutions in the
body of a loop.)

With `shard_optimizer_state` each device keeps one R-th of every large weight and slot. It gathers the weights for its
micro-batches, gets its shard of the summed gradients (a reduce-scatter), and updates its shard. The norms of LARS are
sums over the shards, which the compiler adds up. `lars_keras.training.jax.sharding` has the sources.
"""

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lars_keras._jax_internals import used_inputs
from lars_keras._keras_internals import inner_optimizer
from lars_keras.layerwise import MEASURES, LayerwiseOptimizer, measuring
from lars_keras.training.engine import EngineOptions
from lars_keras.training.forward import StatelessForward
from lars_keras.training.inputs import spec_of
from lars_keras.training.jax.mesh import ghost_numbers
from lars_keras.training.jax.sharding import WeightSharding, shard_sharding
from lars_keras.training.state import sum_dtype

Tensor = Any
State: TypeAlias = dict[str, list[Any]]
"""The values of all variables, by group; see `JaxStep.variables`."""
Sums: TypeAlias = dict[str, Any]
"""The sums over ghost batches: `gradients` and moving `statistics`, lists in the order of their variables; `loss`;
`squares` of the gradients of ghost batches, to measure noise; `valid`, their entries, if they are masked. Beside them
`metrics`, the newest variables of the metrics."""

_REPLICATED = PartitionSpec()
_NOTHING = np.zeros(len(MEASURES), "float32")
"""The measures of a variable that the optimizer does not update."""


class JaxStep:
    """The functions of a built model and its built optimizer, over the devices of a mesh.

    Args:
        model: compiled and built.
        mesh: mesh of the replicas; see `lars_keras.training.jax.mesh`.
        options: how to take a step.
        shard_optimizer_state: keep and update shards of the weights.
        masked: weight ghost batches by their valid entries.

    Attributes:
        variables: the Keras variables of the state, by group, in its order.
        scalars: the optimizer's variables of rank 0, such as `iterations`, which a loss, layer or metric may read.
        measures: names of the rows of `norms` in the outcome of an update.
        state_shardings: sharding of the state, in the same order.
        replicated: sharding of an array that each device has in full.
        batch_sharding: sharding of the arrays of R micro-batches; their first dimension has R * microbatch_size
            examples.
        sums_sharding: sharding of the sums over micro-batches; their first dimension is the device.
        single_update: the program of an update with k = 1: `(state, batch) -> (state, outcome)`.
        begin, accumulate, finish: the programs of an update with k > 1; `update` calls them.
    """

    READ = ("trainable", "batch_stats", "rng_state")
    """The groups of the model's own state."""

    def __init__(
        self,
        model: keras.Model,
        mesh: Mesh,
        options: EngineOptions,
        shard_optimizer_state: bool,
        masked: bool,
    ):
        self.model, self.optimizer, self.mesh = model, model.optimizer, mesh
        self.axes, self.devices = mesh.axis_names, mesh.devices.size
        self.accumulation_steps = options.accumulation_steps
        self._masked = masked and self.devices * self.accumulation_steps > 1
        self._measure_norms, self._measure_noise = options.variable_norms, options.noise_scale
        self._measure_ratios = options.trust_ratios and isinstance(inner_optimizer(self.optimizer), LayerwiseOptimizer)
        self.measures = ["gradient", "weight"] * self._measure_norms + ["ghost_gradient"] * self._measure_noise
        self.measures += [*MEASURES] * self._measure_ratios
        self.forward = StatelessForward(model, compiled=True, over_replicas=lambda sums: lax.psum(sums, self.axes))
        self.variables = {
            "trainable": self.forward.trainable,
            "batch_stats": self.forward.batch_stats,
            "rng_state": self.forward.rng_state,
            "optimizer": list(self.optimizer.variables),
            "metrics": self.forward.metrics,
        }
        self.scalars = [v for v in self.variables["optimizer"] if not v.shape]
        self._overwritten = self.forward.overwritten
        self._weights = WeightSharding(
            model, self.forward.trainable, mesh, shard_optimizer_state, options.reduce_dtype, self._overwritten
        )
        self.replicated = everywhere = NamedSharding(mesh, _REPLICATED)
        self.state_shardings = {group: [everywhere] * len(variables) for group, variables in self.variables.items()}
        self.state_shardings["trainable"] = self._weights.shardings
        if shard_optimizer_state:
            self.state_shardings["optimizer"] = [shard_sharding(v.shape, mesh) for v in self.variables["optimizer"]]
        self._batch_spec = PartitionSpec(self.axes)
        self.batch_sharding = self.sums_sharding = NamedSharding(mesh, self._batch_spec)
        new = (self.state_shardings, everywhere)
        self.single_update = jax.jit(self._single_update, donate_argnums=0, out_shardings=new)
        self.begin = jax.jit(self._begin, out_shardings=(everywhere, self.sums_sharding))
        sums = (self.sums_sharding, everywhere, everywhere)
        self.accumulate = jax.jit(self._accumulate, donate_argnums=0, out_shardings=sums)
        self.finish = jax.jit(self._finish, donate_argnums=0, out_shardings=new)

    def update(self, state: State, next_batch: Callable[[Any], Any], last: Any) -> tuple[State, dict[str, Tensor]]:
        """Take an update on the next k batches; the state is donated.

        Args:
            state: values of all variables.
            next_batch: returns a batch; takes arrays that the devices are still computing.
            last: the outcome of the previous update, if the devices may still be computing it.

        Returns:
            The new state, and the outcome: `loss`, `learning_rate` and `norms`, float32 of shape `(rows, variables)`.
            With `variable_norms` two rows: the norms of the gradients, 0 if the update is skipped, and of the weights
            after it. With `noise_scale` a row: the root mean square of the norms of the ghost-batch gradients. With
            `trust_ratios` the rows of `MEASURES`. All but the weights are 0 for variables that are overwritten.
        """
        if self.accumulation_steps == 1:
            return self.single_update(state, next_batch(last))
        weights, sums = self.begin(state)
        read = (weights or state["trainable"], state["batch_stats"], state["rng_state"], self.scalars_of(state))
        for i in range(self.accumulation_steps):
            sums, rng_state, last = self.accumulate(sums, *read, next_batch(last), np.int32(i))
        return self.finish(state, sums, rng_state)

    def scalars_of(self, state: State) -> list[Tensor]:
        """Return the values of `scalars`."""
        return [value for v, value in zip(self.variables["optimizer"], state["optimizer"], strict=True) if not v.shape]

    def find_unreached(self, element_spec: Any, examples: int) -> None:
        """Find the variables that the loss does not depend on, and leave them alone: JAX gives them a gradient of 0.

        Raises:
            ValueError: if the loss depends on no variable.
        """
        shapes = {group: [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in vs] for group, vs in self.variables.items()}
        data = jax.tree.map(lambda s: jax.ShapeDtypeStruct((examples, *s.shape[1:]), s.dtype), spec_of(element_spec))

        def loss(trainable: list[Tensor], state: State, data: Any) -> Tensor:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            groups, others = (state["batch_stats"], state["rng_state"]), self._read(self.scalars_of(state))
            batch = (x, y, sample_weight, jnp.int32(0))
            return self.forward.loss(trainable, *groups, *batch, state["metrics"], others)[0]

        arguments = (shapes["trainable"], shapes, data)
        used = used_inputs(loss, list(zip(self.axes, self.mesh.devices.shape, strict=True)), *arguments)
        self.forward.leave_alone([not o and not u for o, u in zip(self._overwritten, used, strict=False)])

    # -- the programs --------------------------------------------------------------------------

    def _single_update(self, state: State, data: Any) -> tuple[State, dict[str, Tensor]]:
        """Take an update of one micro-batch."""

        def on_device(
            shards: list[Tensor],
            batch_stats: list[Tensor],
            rng_state: list[Tensor],
            metrics: list[Tensor],
            scalars: list[Tensor],
            data: Any,
        ) -> tuple[Sums, list[Tensor]]:
            weights = self._weights.gather(shards)
            index = self._ghost_number()
            sums, rng_state = self._ghost_sums(weights, batch_stats, rng_state, metrics, scalars, data, index)
            return self._reduced(sums), rng_state

        arguments = (
            *(state[group] for group in ("trainable", "batch_stats", "rng_state")),
            self._first_metrics(state["metrics"]),
            self.scalars_of(state),
            data,
        )
        specs = (self._weights.specs, *[_REPLICATED] * 4, self._batch_spec)
        on_devices = self._on_devices(on_device, specs, (self._reduced_specs(), _REPLICATED))
        return self._applied(state, *on_devices(*arguments))

    def _begin(self, state: State) -> tuple[list[Tensor], Sums]:
        """Return the full weights, and zero sums, for an update of several micro-batches.

        If no weight is sharded, return no weights: the state has them, and a copy would take as much memory again.
        """
        weights = self._weights.round(state["trainable"]) if self._weights.sharded else []
        gradients, statistics = (
            [jnp.zeros((self.devices, *v.shape), sum_dtype(v.dtype)) for v in variables]
            for variables in (self.forward.trainable, self.forward.averaged)
        )
        sums: Sums = {
            "gradients": [jnp.full_like(g, -jnp.inf) if o else g for g, o in self._and_overwritten(gradients)],
            "statistics": statistics,
            "loss": jnp.zeros(self.devices, self.forward.loss_dtype),
            "metrics": [jnp.repeat(v[None], self.devices, 0) for v in self._first_metrics(state["metrics"])],
        }
        if self._measure_noise:
            sums["squares"] = jnp.zeros((self.devices, len(gradients)), "float32")
        if self._masked:
            sums["valid"] = jnp.zeros(self.devices, "float32")
        return weights, sums

    def _accumulate(
        self,
        sums: Sums,
        weights: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        scalars: list[Tensor],
        data: Any,
        i: Tensor,
    ) -> tuple[Sums, list[Tensor], Tensor]:
        """Add micro-batch `i` to each device's sums, without traffic between devices.

        Returns:
            The sums, which the next call overwrites; the new `rng_state`; and the number of micro-batches so far, which
            is ready when the devices are done.
        """

        def on_device(sums: Sums, weights: list[Tensor], *arguments: Any) -> tuple[Sums, list[Tensor]]:
            batch_stats, rng_state, scalars, data, i = arguments
            weights = [w.astype(v.dtype) for w, v in zip(weights, self.forward.trainable, strict=True)]
            index = i * self.devices + self._ghost_number()
            sums = jax.tree.map(lambda total: total[0], sums)
            new, rng_state = self._ghost_sums(weights, batch_stats, rng_state, sums["metrics"], scalars, data, index)
            return jax.tree.map(lambda total: total[None], self._added(sums, new)), rng_state

        specs = (self._batch_spec, *[_REPLICATED] * 4, self._batch_spec, _REPLICATED)
        on_devices = self._on_devices(on_device, specs, (self._batch_spec, _REPLICATED))
        return *on_devices(sums, weights, batch_stats, rng_state, scalars, data, i), i + 1

    def _finish(self, state: State, sums: Sums, rng_state: list[Tensor]) -> tuple[State, dict[str, Tensor]]:
        """Reduce the sums after the last micro-batch, and apply the update."""

        def on_device(sums: Sums) -> Sums:
            return self._reduced(jax.tree.map(lambda total: total[0], sums))

        on_devices = self._on_devices(on_device, (self._batch_spec,), self._reduced_specs())
        return self._applied(state, on_devices(sums), rng_state)

    def _on_devices(self, function: Any, in_specs: tuple[Any, ...], out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _applied(self, state: State, sums: Sums, rng_state: list[Tensor]) -> tuple[State, dict[str, Tensor]]:
        """Apply Keras's own update to gradients that are reduced over the devices, and sharded like the weights.

        The compiler shards the update like its arguments.
        """
        gradients, loss, metrics = sums["gradients"], sums["loss"], sums["metrics"]
        if self._masked:
            ghosts, valid = self.devices * self.accumulation_steps, sums["valid"]
            mean = jnp.where(valid > 0, ghosts / jnp.where(valid > 0, valid, 1.0), 0.0)
            gradients, loss = self._weighted(gradients, mean), loss * mean.astype(loss.dtype)
        own = [g.astype(v.dtype) for g, v in zip(gradients, self.forward.trainable, strict=True)]
        own = [None if unreached else g for g, unreached in zip(own, self.forward.unreached, strict=True)]
        # The compiler drops measures that nobody asks for.
        with measuring() as measures, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")  # named by `find_unreached`
            trainable, optimizer = self.optimizer.stateless_apply(state["optimizer"], own, state["trainable"])
        iterations = inner_optimizer(self.optimizer).iterations
        i = next(i for i, v in enumerate(self.variables["optimizer"]) if v is iterations)
        taken = optimizer[i] > state["optimizer"][i]
        triples = zip(self.forward.averaged, sums["statistics"], self.forward.assigned, strict=True)
        moved = {id(v): mean.astype(v.dtype) for v, mean, assigned in triples if assigned}
        new = {
            "trainable": trainable,
            "batch_stats": [moved.get(id(v), old) for v, old in self._mapping("batch_stats", state)],
            "rng_state": rng_state,
            "optimizer": optimizer,
            "metrics": metrics
            if self.devices == 1
            else [total + own for total, own in zip(state["metrics"], metrics, strict=True)],
        }
        rows, scale = [], self._loss_scale(self.scalars_of(state))
        if self._measure_norms:
            norms = jnp.sqrt(self._gradient_squares(gradients)) / scale
            rows += [jnp.where(taken, norms, 0.0), jnp.sqrt(_squares(trainable))]
        if self._measure_noise:  # each is of a gradient divided by the number of ghost batches
            rows += [jnp.where(taken, jnp.sqrt(self.devices * self.accumulation_steps * sums["squares"]) / scale, 0.0)]
        if self._measure_ratios:
            found = iter(measures)
            left = map(operator.or_, self._overwritten, self.forward.unreached)
            rows += [*jnp.stack([_NOTHING if skipped else next(found) for skipped in left], axis=1)]
        norms = jnp.stack(rows) if rows else jnp.zeros([0, len(trainable)])
        with keras.StatelessScope(self._read(self.scalars_of(state))):
            rate = jnp.asarray(self.optimizer.learning_rate, jnp.float32)
        return new, {"loss": loss, "learning_rate": rate, "norms": norms}

    # -- their parts ---------------------------------------------------------------------------

    def _mapping(self, group: str, state: State) -> list[tuple[keras.Variable, Tensor]]:
        return list(zip(self.variables[group], state[group], strict=True))

    def _read(self, scalars: list[Tensor]) -> list[tuple[keras.Variable, Tensor]]:
        return list(zip(self.scalars, scalars, strict=True))

    def _loss_scale(self, scalars: list[Tensor]) -> Tensor:
        with keras.StatelessScope(self._read(scalars)):
            return jnp.asarray(self.optimizer.scale_loss(jnp.float32(1.0)), jnp.float32)

    def _ghost_sums(
        self,
        weights: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        metrics: list[Tensor],
        scalars: list[Tensor],
        data: Any,
        index: Tensor,
    ) -> tuple[Sums, list[Tensor]]:
        """Return the terms that a ghost batch adds to the sums, with its new `metrics`; and the new `rng_state`."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        ghosts, scale, others = self.devices * self.accumulation_steps, self._loss_scale(scalars), self._read(scalars)

        def loss_of(weights: list[Tensor]) -> tuple[Tensor, Any]:
            loss, y_pred, *state = self.forward.loss(
                weights, batch_stats, rng_state, x, y, sample_weight, index, metrics, others
            )
            loss = loss / ghosts
            return loss * scale.astype(loss.dtype), (loss, y_pred, *state)

        (_, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        loss, y_pred, new_batch_stats, new_rng_state, new_metrics, valid = aux
        gradients = [g.astype(sum_dtype(g.dtype.name)) for g in gradients]
        new_batch_stats = [a.astype(sum_dtype(a.dtype.name)) / ghosts for a in new_batch_stats]
        read = dict(zip(self.READ, (weights, batch_stats, rng_state), strict=True))
        others = [*others, *(pair for group in self.READ for pair in self._mapping(group, read))]
        new_metrics = self._with_compiled_metrics(new_metrics, others, x, y, y_pred, sample_weight)
        loss = loss.astype(self.forward.loss_dtype)
        sums: Sums = {"gradients": gradients, "statistics": new_batch_stats, "loss": loss, "metrics": new_metrics}
        if self._measure_noise:
            sums["squares"] = self._gradient_squares(gradients)
        if self._masked:  # by their weight only here: the scaled loss may be in float16
            weighted = {"gradients": self._weighted(gradients, valid), "loss": loss * valid.astype(loss.dtype)}
            sums |= {**weighted, "valid": valid}
        return sums, new_rng_state

    def _added(self, sums: Sums, new: Sums) -> Sums:
        """Return the sums with the terms of one more ghost batch, which has counted in the metrics itself."""
        pairs = zip(self._and_overwritten(sums["gradients"]), new["gradients"], strict=True)
        gradients = [jnp.maximum(g, own) if o else g + own for (g, o), own in pairs]
        others = [name for name in new if name not in ("gradients", "metrics")]
        added = {name: jax.tree.map(jnp.add, sums[name], new[name]) for name in others}
        return {"gradients": gradients, **added, "metrics": new["metrics"]}

    def _reduced(self, sums: Sums) -> Sums:
        """Sum over the devices; see `WeightSharding.reduce`."""
        others = {name: value for name, value in sums.items() if name != "gradients"}
        gradients, others = self._weights.reduce(sums["gradients"], others)
        return {"gradients": gradients, **others}

    def _reduced_specs(self) -> dict[str, Any]:
        names = ["statistics", "loss", "metrics"] + ["squares"] * self._measure_noise + ["valid"] * self._masked
        return {"gradients": self._weights.specs, **dict.fromkeys(names, _REPLICATED)}

    def _and_overwritten(self, gradients: list[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        return zip(gradients, self._overwritten, strict=True)

    def _weighted(self, gradients: list[Tensor], weight: Tensor) -> list[Tensor]:
        return [g if o else g * weight.astype(g.dtype) for g, o in self._and_overwritten(gradients)]

    def _gradient_squares(self, gradients: list[Tensor]) -> Tensor:
        return _squares([jnp.zeros(()) if o else g for g, o in self._and_overwritten(gradients)])

    def _first_metrics(self, metrics: list[Tensor]) -> list[Tensor]:
        """Return the metrics with which the devices begin an update: their own, or zeros if they will be added up."""
        return metrics if self.devices == 1 else [jnp.zeros_like(v) for v in metrics]

    def _ghost_number(self) -> Tensor:
        """Return the number of this device's ghost batch in its micro-batch."""
        return jnp.asarray(ghost_numbers(list(self.mesh.devices.flat)))[lax.axis_index(self.axes)]

    def _with_compiled_metrics(self, metrics: list[Tensor], others: Any, *batch: Any) -> list[Tensor]:
        """Return the metrics' variables after the compiled metrics have seen a batch."""
        variables = self.variables["metrics"]
        with keras.StatelessScope([*zip(variables, metrics, strict=True), *others]) as scope:
            self.model.compute_metrics(*batch)
            return [scope.get_current_value(v) for v in variables]


def _squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor, float32 of shape `(tensors,)`."""
    return jnp.stack([jnp.sum(jnp.square(t.astype(jnp.float32))) for t in tensors])
