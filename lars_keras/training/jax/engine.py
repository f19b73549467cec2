"""The JAX engine: a live model's state, its data and `JaxStep` brought together."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf
from jax.sharding import NamedSharding, PartitionSpec

from lars_keras._keras_internals import set_backend_value
from lars_keras.layerwise import MEASURES, LayerwiseOptimizer
from lars_keras.training.forward import build_model
from lars_keras.training.inputs import Feed, ghost_batches, scoring_examples
from lars_keras.training.jax.cluster import ShardedDataParallel
from lars_keras.training.jax.mesh import mesh_of
from lars_keras.training.jax.step import JaxStep
from lars_keras.training.state import ema_weights, inner_optimizer, restore_shared, shared_state
from lars_keras.training.tensorflow.update import check_options

Tensor = Any


class JaxEngine:
    """The compiled functions of a model over the devices of the current `keras.distribution`, or on one device.

    Args:
        model: compiled; created under the same distribution.
        element_spec: shapes and dtypes of the batches to train or evaluate on.
        accumulation_steps: k, passes per update.
        layer_norms: measure the norms of gradients and weights.
        layer_ratios: measure the trust ratios and effective rates, where the optimizer has them.
        reduce_dtype: of the gradients on their way between devices.

    Raises:
        ValueError: for `gradient_accumulation_steps`, if the distribution is not data parallel, or if trainable
            variables have no effect on the loss.

    Attributes:
        data_wait: seconds that the devices stood idle for want of data in the last `train`.
    """

    def __init__(
        self,
        model: keras.Model,
        element_spec: Any,
        *,
        accumulation_steps: int,
        layer_norms: bool = False,
        layer_ratios: bool = False,
        reduce_dtype: str = "float32",
    ):
        check_options(model.optimizer)
        distribution = keras.distribution.distribution()
        if distribution is not None and not isinstance(distribution, keras.distribution.DataParallel):
            raise ValueError(
                f"The distribution must be a keras.distribution.DataParallel. Received: {type(distribution).__name__}"
            )
        self.mesh = mesh_of(
            distribution.device_mesh.backend_mesh.devices.flat if distribution else jax.local_devices()[:1]
        )
        self.model, self.optimizer = model, model.optimizer
        self.replicas = self.mesh.devices.size
        self.accumulation_steps = accumulation_steps
        self.data_wait = 0.0
        layer_ratios = layer_ratios and isinstance(inner_optimizer(self.optimizer), LayerwiseOptimizer)
        self._names = ["gradient", "weight"] * layer_norms + [*MEASURES] * layer_ratios
        build_model(model, element_spec)
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self.step = JaxStep(
            model,
            self.mesh,
            accumulation_steps=accumulation_steps,
            layer_norms=layer_norms,
            layer_ratios=layer_ratios,
            shard_optimizer_state=isinstance(distribution, ShardedDataParallel),
            reduce_dtype=reduce_dtype,
        )
        self.step.check_every_weight_is_used(element_spec)
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._score_fn = jax.jit(self._score)
        self._results_fn = jax.jit(self._results)
        self._replicate_fn = jax.jit(lambda values: values, out_shardings=self._replicated)

    # -- training ------------------------------------------------------------------------------

    def training_iterator(self, feed: Feed, microbatch_size: int, first_update: int = 0) -> "Prefetcher":
        """The batches of `feed` on the devices, from an update on, for `train`: one for each pass."""
        own = ghost_batches(feed, self._input_context(), microbatch_size, self.accumulation_steps, first_update)
        numpy = own.as_numpy_iterator()
        count = len(self.mesh.local_devices)

        def batch() -> Any:
            return self._on_devices(jax.tree.map(lambda *a: np.concatenate(a), *[next(numpy) for _ in range(count)]))

        return Prefetcher(batch)

    def train(
        self, iterator: "Prefetcher", updates: int
    ) -> tuple[list[float], list[float], dict[str, float], dict[str, np.ndarray]]:
        """Runs `updates` updates; the host waits for the last of them only. Sets `data_wait`.

        Returns:
            The loss and the learning rate of each update, the metrics since their last reset, and the norms of each
            update, if they are measured.
        """
        state, outcomes, before = self._read(), [], iterator.idle
        try:
            for _ in range(updates):
                state, outcome = self.step.update(state, iterator)
                outcomes.append(outcome)
        finally:
            self._write(state)
        metrics = self._results_fn(state["metrics"])
        outcomes, metrics = jax.device_get((outcomes, metrics))
        self.data_wait = iterator.idle - before
        norms = np.stack([o["norms"] for o in outcomes], axis=1)
        return (
            [float(o["loss"]) for o in outcomes],
            [float(o["learning_rate"]) for o in outcomes],
            {name: float(value) for name, value in metrics.items()},
            dict(zip(self._names, norms, strict=True)),
        )

    def _input_context(self) -> tf.distribute.InputContext:
        processes = sorted({device.process_index for device in self.mesh.devices.flat})
        return tf.distribute.InputContext(len(processes), processes.index(jax.process_index()), self.replicas)

    def _on_devices(self, arrays: Any) -> Any:
        """This process's rows as arrays over all devices."""
        put = jax.make_array_from_process_local_data
        return jax.tree.map(lambda a: put(self.step.batch_sharding, a), tuple(arrays))

    # -- state ---------------------------------------------------------------------------------

    def _read(self) -> dict[str, list[Tensor]]:
        """The values of all variables, as `JaxStep` takes them. None comes twice, because they are donated."""
        seen: set[int] = set()

        def value(variable: keras.Variable, sharding: NamedSharding) -> Tensor:
            array = jax.device_put(variable.value, sharding)
            if id(array) in seen:
                array = jnp.copy(array)
            seen.add(id(array))
            return array

        return {
            group: [value(v, s) for v, s in zip(variables, self.step.state_shardings[group], strict=True)]
            for group, variables in self.step.variables.items()
        }

    def _write(self, state: dict[str, list[Tensor]]) -> None:
        for group, variables in self.step.variables.items():
            for variable, value in zip(variables, state[group], strict=True):
                variable.assign(value)

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of all that the next update depends on, and of the metrics since their last reset.

        The names and shapes are those of `TensorFlowEngine.snapshot`; the metrics are those of one replica.
        """
        state = {name: self._numpy(v) for name, v in shared_state(self.model).items()}
        metrics = self.step.variables["metrics"]
        return state | {f"metric/{i}": self._numpy(v)[np.newaxis] for i, v in enumerate(metrics)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `snapshot` returned, of either engine.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """
        parts = restore_shared(self.model, state)
        for variable, part in zip(self.step.variables["metrics"], parts, strict=False):
            variable.assign(part.sum(0).astype(variable.dtype))

    def save_model(self, path: str | os.PathLike, write: bool) -> None:
        """Writes a `.keras` file, where `write`. It is for the end of a run: what lay in shares is whole after it."""
        for variable in shared_state(self.model).values():
            if not variable.value.is_fully_addressable:
                set_backend_value(variable, self._numpy(variable))
        distribution = keras.distribution.distribution()
        # Or Keras, which makes a variable while it saves, would wait for all processes to agree on its value.
        keras.distribution.set_distribution(None)
        try:
            if write:
                self.model.save(path)
        finally:
            keras.distribution.set_distribution(distribution)

    def _numpy(self, variable: keras.Variable) -> np.ndarray:
        value = variable.value
        return np.array(value if value.is_fully_replicated else self._replicate_fn(value))

    def ema_weights(self) -> AbstractContextManager[None]:
        """Meanwhile the model has the moving average of its weights, where the optimizer keeps one."""
        return ema_weights(self.optimizer, lambda v: v.value)  # JAX's arrays do not change

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, feed: Feed, batch_size: int, after_batch: Callable[[int], None]) -> dict[str, float]:
        """Loss, metrics and the number of examples, each scored once; calls `after_batch` after each batch."""
        self.model.reset_metrics()
        weights = [jax.device_put(v.value, s) for v, s in self._weights()]
        metrics = [jax.device_put(v.value, self._replicated) for v in self.step.variables["metrics"]]
        totals = jax.device_put((metrics, jnp.zeros([]), jnp.zeros([])), self._replicated)
        for i, data in enumerate(scoring_examples(feed, self._input_context(), batch_size).as_numpy_iterator()):
            totals = self._score_fn(weights, totals, self._on_devices(data))
            after_batch(i)
        metrics, loss, n = totals
        for variable, value in zip(self.step.variables["metrics"], metrics, strict=True):
            variable.assign(value)
        results = self._results_fn(metrics)
        return {name: float(value) for name, value in {**results, "loss": loss / n, "n": n}.items()}

    def _weights(self) -> list[tuple[keras.Variable, NamedSharding]]:
        groups = ("trainable", "batch_stats", "rng_state")
        return [pair for g in groups for pair in zip(self.step.variables[g], self.step.state_shardings[g], strict=True)]

    def _score(self, weights: list[Tensor], totals: Any, batch: Any) -> Any:
        """Adds a padded batch over all devices to the totals; padding has weight 0."""
        metrics, total_loss, n = totals
        x, y, weight = batch
        variables = [v for v, _ in self._weights()] + self.step.variables["metrics"]
        mapping = list(zip(variables, [*weights, *metrics], strict=True))
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            y_pred = self.model(x, training=False)
            loss = self.model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weight)
            own = sum((jnp.asarray(term, loss.dtype) for term in self.model.losses), jnp.zeros([], loss.dtype))
            self.model.compute_metrics(x, y, y_pred, weight)
            metrics = [scope.get_current_value(v) for v in self.step.variables["metrics"]]
        here = jnp.sum(weight.astype(loss.dtype))
        # Keras's loss is the sum over the batch, padding included, divided by its size.
        return metrics, total_loss + (loss - own) * weight.shape[0] + own * here, n + here

    def _results(self, metrics: list[Tensor]) -> dict[str, Tensor]:
        with keras.StatelessScope(list(zip(self.step.variables["metrics"], metrics, strict=True))):
            return self.model.get_metrics_result()


class Prefetcher:
    """What `make` makes, again and again, always one ahead: the next batch is made while an update runs.

    Attributes:
        idle: seconds in all that the devices had nothing to do because a batch was not there.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self.idle = make, 0.0
        self._maker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming = self._maker.submit(make)

    def __call__(self, at_work_on: Any) -> Any:
        """The next batch; the devices are idle from the time when `at_work_on` is computed."""
        if not self._coming.done():
            jax.block_until_ready(at_work_on)  # nothing can be given to them before the batch is there anyway
            since = time.perf_counter()
            self._coming.exception()  # waits
            self.idle += time.perf_counter() - since
        batch = self._coming.result()
        self._coming = self._maker.submit(self._make)
        return batch
