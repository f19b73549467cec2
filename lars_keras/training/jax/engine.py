"""The JAX engine: connects a live model's state and its data with `JaxStep`."""

import contextlib
import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from lars_keras._keras_internals import backend_value, backend_values, set_backend_value, set_backend_values
from lars_keras.files import atomic_path
from lars_keras.training import inputs
from lars_keras.training.engine import EngineOptions, Scores, StepResult, as_log, check_supported
from lars_keras.training.forward import build_model
from lars_keras.training.inputs import Batch, Data
from lars_keras.training.jax.cluster import JaxCluster
from lars_keras.training.jax.prefetch import Prefetcher
from lars_keras.training.jax.staging import Staging
from lars_keras.training.jax.step import JaxStep, State
from lars_keras.training.loss_terms import check_scored_terms
from lars_keras.training.metric_terms import MetricTerms
from lars_keras.training.padding_terms import check_padding
from lars_keras.training.recording import RecordingScope
from lars_keras.training.scoring import score_batch, summary
from lars_keras.training.state import EmaWeights, restore_variables, variables_by_name

Tensor = Any

_REDUCE_DTYPES = ("float32", "bfloat16", "float16")


class JaxEngine:
    """The compiled functions of a model over the devices of a cluster; see `lars_keras.training.engine.Engine`.

    Attributes:
        step: the programs of an update.
        loss_terms: the terms of the loss.
        metric_terms: which metrics may be split.
    """

    def __init__(self, model: keras.Model, cluster: JaxCluster, options: EngineOptions, element_spec: Any):
        self.model, self.optimizer, self.cluster, self.options = model, model.optimizer, cluster, options
        self._context = cluster.input_context()
        with cluster.scope():
            self.loss_terms = build_model(model, element_spec, options.microbatch_size)
            if not self.optimizer.built:
                self.optimizer.build(model.trainable_variables)
        masked = self.loss_terms.masked
        self.step = JaxStep(model, cluster.mesh, options, cluster.shard_optimizer_state, masked)
        self._element_spec, self._knows_unreached = element_spec, False
        self.metric_terms = MetricTerms(model, self.loss_terms.batch)
        self._written: list[weakref.ref] = []  # the arrays of the last update, which are the variables' own
        self._scoring_assigns: list[int] = []  # numbers of the state that scoring a batch changes, once that is traced
        self._score_fn = jax.jit(self._score)
        self._results_fn = jax.jit(self._results, out_shardings=self.step.replicated)
        self._replicate_fn = jax.jit(lambda values: values, out_shardings=self.step.replicated)

    @classmethod
    def check(cls, model: keras.Model, cluster: JaxCluster, options: EngineOptions) -> None:
        """Raise ValueError if this engine does not support the model or an option, before anything is built."""
        cluster.check()
        check_supported(model.optimizer)
        if not options.jit_compile:
            raise ValueError("On JAX every update is compiled. Received: jit_compile=False")
        if options.reduce_dtype not in _REDUCE_DTYPES:
            raise ValueError(
                f"`reduce_dtype` must be one of {', '.join(_REDUCE_DTYPES)}. Received: "
                f"reduce_dtype={options.reduce_dtype}"
            )
        if options.trust_ratios and isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "On JAX `trust_ratios` does not support dynamic loss scaling, which the dtype policy mixed_float16 "
                "brings. Received: an optimizer of type LossScaleOptimizer"
            )

    # -- training ------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        """Find the variables that the loss does not reach, once. An evaluation does not need this.

        Raises:
            ValueError: if the loss depends on no trainable variable.
        """
        if not self._knows_unreached:
            self.step.find_unreached(self._element_spec, self.options.microbatch_size)
            self._knows_unreached = True

    def training_iterator(self, data: Data, first_update: int, updates: int) -> Prefetcher:
        """Return the batches of `updates` updates on the devices, for `train`: one for each micro-batch."""
        self.prepare_training()
        sizes = self.options.microbatch_size, self.options.accumulation_steps
        data, as_arrays = self._opened(data, first_update)
        staging = self._staging(as_arrays)
        batches: Iterator[Batch]
        if as_arrays:
            batches = map(staging.copied, inputs.training_batches(data, self._context, *sizes, first_update))
        else:
            from lars_keras.training.tensorflow.inputs import numpy_training_batches

            batches = numpy_training_batches(data, self._context, *sizes, first_update, updates)

        def batch() -> Any:
            for arrays in batches:
                return arrays
            raise inputs.DataEnded

        def put(arrays: Batch) -> Any:
            return staging.send(self.on_devices, arrays)

        return Prefetcher(batch, put, updates * self.options.accumulation_steps)

    def train(self, iterator: Prefetcher, updates: int) -> StepResult:
        """Take `updates` updates; the host waits only for the last of them."""
        state, outcomes, before = self.read_state(), [], iterator.idle
        outcome: Any = ()  # the outcome of the last call was fetched
        try:
            for _ in range(updates):
                state, outcome = self.step.update(state, iterator, outcome)
                outcomes.append(outcome)
        finally:
            self._write_state(state)
        read = [value for group in self.step.READ for value in state[group]] if self._results_read_weights else []
        metrics = self._results_fn(read, state["metrics"], self.step.scalars_of(state))
        outcomes, metrics = jax.device_get((outcomes, metrics))
        norms = np.stack([o["norms"] for o in outcomes], axis=1)
        return StepResult(
            losses=[float(o["loss"]) for o in outcomes],
            learning_rates=[float(o["learning_rate"]) for o in outcomes],
            metrics={name: as_log(value) for name, value in metrics.items()},
            measures=dict(zip(self.step.measures, norms, strict=True)),
            data_wait=iterator.idle - before,
        )

    def _opened(self, data: Data, *first_update: int) -> tuple[Data, bool]:
        """Return the data, with a function of data called, and True if their batches are NumPy arrays."""
        batches = data(self._context, *first_update) if callable(data) else data
        if not callable(data) and not inputs.is_dataset(data):
            inputs.check_readable_again(data)
        return (lambda *_: batches) if callable(data) else data, not inputs.is_dataset(batches)

    def _staging(self, as_arrays: bool) -> Staging:
        """Return memory for batches. A CPU computes on it, and those of a `tf.data.Dataset` have their own."""
        copies = all(device.platform in ("gpu", "tpu") for device in self.step.mesh.local_devices)
        return Staging(again=as_arrays and copies)

    def on_devices(self, arrays: Any) -> Any:
        """Return this process's rows of a batch as arrays over all devices."""
        put = jax.make_array_from_process_local_data
        return jax.tree.map(lambda a: put(self.step.batch_sharding, a), tuple(arrays))

    # -- state ---------------------------------------------------------------------------------

    def read_state(self) -> State:
        """Return the values of all variables for `JaxStep`. Copy aliased arrays, because the step donates its inputs.

        Donated arrays are gone after the update; `train` then assigns the new ones to the variables.
        """
        state = {group: backend_values(variables) for group, variables in self.step.variables.items()}
        arrays = itertools.chain.from_iterable(state.values())
        if self._written and all(last() is array for last, array in zip(self._written, arrays, strict=True)):
            return state  # nobody has assigned since, so the checks below would find nothing
        seen: set[int] = set()

        def value(variable: keras.Variable, sharding: jax.sharding.Sharding) -> Tensor:
            array = backend_value(variable)
            ids = {id(array)}
            there = getattr(array, "sharding", None)
            if there is not sharding and there != sharding:  # `device_put` takes longer to find out
                array = jax.device_put(variable.value, sharding)
            ids.add(id(array))  # `device_put` may make another object of the same memory
            if ids & seen:
                array = jnp.copy(array)
            seen.update(ids)
            return array

        return {
            group: [value(v, s) for v, s in zip(variables, self.step.state_shardings[group], strict=True)]
            for group, variables in self.step.variables.items()
        }

    def _write_state(self, state: State) -> None:
        written: dict[int, weakref.ref] = {}
        for group, variables in self.step.variables.items():
            set_backend_values(variables, state[group])  # `assign` would look at dtype, shape and layout of each
            written.update((id(array), weakref.ref(array)) for array in state[group])
        are_distinct = len(written) == sum(map(len, state.values()))
        self._written = list(written.values()) if are_distinct else []

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return a copy of all state that the next update depends on. Collective: call it on every host.

        The names and shapes are as in `TensorFlowEngine.snapshot`, with the metrics of one replica.
        """
        for variable in variables_by_name(self.model).values():
            if variable.value.is_fully_replicated:
                variable.value.copy_to_host_async()  # all at once
        state = {name: self._numpy(v) for name, v in variables_by_name(self.model).items()}
        metrics = self.step.variables["metrics"]
        return state | {f"metric/{i}": self._numpy(v)[np.newaxis] for i, v in enumerate(metrics)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a snapshot from either engine.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """
        values = restore_variables(self.model, state, _set_to_own)
        if values:
            for variable, value in zip(self.step.variables["metrics"], values, strict=True):
                _set_to_own(variable, value.sum(0).astype(variable.dtype))

    @contextlib.contextmanager
    def kept_metrics(self) -> Iterator[None]:
        """Set the metrics back at the end of the context."""
        values = backend_values(self.step.variables["metrics"])
        try:
            yield
        finally:
            set_backend_values(self.step.variables["metrics"], values)

    def save_model(self, path: str | os.PathLike, write: bool) -> None:
        """Write a `.keras` file if `write` is true. Collective: call it on every host."""
        spread = [v for v in variables_by_name(self.model).values() if not v.value.is_fully_addressable]
        values = [v.value for v in spread]
        distribution = keras.distribution.distribution()
        # Otherwise Keras, which makes a variable while it saves, would wait for all processes to agree on its value.
        keras.distribution.set_distribution(None)
        try:
            for variable in spread:
                set_backend_value(variable, self._numpy(variable))
            if write:
                with atomic_path(path) as temporary:
                    self.model.save(temporary)
        finally:
            keras.distribution.set_distribution(distribution)
            for variable, value in zip(spread, values, strict=True):
                set_backend_value(variable, value)

    def _numpy(self, variable: keras.Variable) -> np.ndarray:
        value = variable.value
        return np.array(value if value.is_fully_replicated else self._replicate_fn(value))

    def ema_weights(self) -> EmaWeights:
        """Return a context in which the model has the EMA weights, if the optimizer keeps them."""
        return EmaWeights(self.optimizer, lambda v: v.value)  # JAX's arrays do not change

    # -- evaluation ----------------------------------------------------------------------------

    def check_scoring(self, examples: int | None = None) -> None:
        """Check that the model can be scored over batches; see `lars_keras.training.engine.Engine.check_scoring`."""
        if self._context.num_input_pipelines > 1:
            check_padding(self.model, self.loss_terms)
        self._check_batches(math.ceil((examples or 1) / (self.options.microbatch_size * self.cluster.replicas)))

    def _check_batches(self, count: int) -> None:
        check_scored_terms(self.model, self.loss_terms, count)
        self.metric_terms.check(count, replicas=1)

    def evaluate(
        self, data: Data, before_batch: Callable[[int], None], after_batch: Callable[[int, Scores], None]
    ) -> dict[str, Any]:
        """Return loss, metrics and the number of examples `n`, each example scored once."""
        data, as_arrays = self._opened(data)
        staging, size = self._staging(as_arrays), self.options.microbatch_size
        batches: Iterator[Batch]
        if as_arrays:
            batches = map(staging.copied, inputs.scoring_batches(data, self._context, size))
        else:
            from lars_keras.training.tensorflow.inputs import numpy_scoring_batches

            batches = numpy_scoring_batches(data, self._context, size)
        self.check_scoring()
        self.model.reset_metrics()
        state = self._model_state()
        weights = [jax.device_put(v.value, s) for v, s in state]
        metrics, scalars = (
            [jax.device_put(v.value, self.step.replicated) for v in variables]
            for variables in (self.step.variables["metrics"], self.step.scalars)
        )
        scores: list[Tensor] = []
        sums = np.zeros(5)

        def results() -> dict[str, Any]:
            for score in jax.device_get(scores):
                np.add(sums, score, out=sums)
            scores.clear()
            values = self._results_fn(weights if self._results_read_weights else [], metrics, scalars)
            return {name: as_log(value) for name, value in values.items()} | summary(*sums.tolist())

        for i, batch in enumerate(self._shareable(batches)):
            self._check_batches(i + 1)
            before_batch(i)
            jax.block_until_ready(scores[-2:-1])  # or all batches would wait on the devices
            metrics, changed, score = self._score_fn(weights, metrics, scalars, staging.send(self._for_scoring, batch))
            for place, value in zip(self._scoring_assigns, changed, strict=True):
                weights[place] = jax.device_put(value, state[place][1])
            scores.append(score)
            after_batch(i, results)
        final = results()
        for place in self._scoring_assigns:  # counters, and the state of random numbers
            state[place][0].assign(weights[place])
        for variable, value in zip(self.step.variables["metrics"], metrics, strict=True):
            variable.assign(value)
        return final

    def _shareable(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches that this host's devices share evenly, and the remainder of the last one by itself.

        If the model has to be scored in one batch, the first batch is left whole.
        """
        devices = self._context.local_replicas
        for i, batch in enumerate(batches):
            size = inputs.count_in(batch)
            shared = size - size % devices
            if shared in (0, size) or (i == 0 and not self._scores_in_parts()):
                yield batch
            else:
                yield inputs.sliced(batch, 0, shared)
                yield inputs.sliced(batch, shared, size)

    def _scores_in_parts(self) -> bool:
        try:
            self._check_batches(2)
        except ValueError:
            return False
        return True

    def _for_scoring(self, batch: Batch) -> Any:
        """Return a batch on the devices. Each device has the whole batch if they cannot share it evenly."""
        if inputs.count_in(batch) % self._context.local_replicas:  # not with several hosts, where batches are filled up
            return jax.device_put(tuple(batch), self.step.replicated)
        return self.on_devices(batch)

    def _model_state(self) -> list[tuple[keras.Variable, jax.sharding.Sharding]]:
        return [
            pair
            for g in self.step.READ
            for pair in zip(self.step.variables[g], self.step.state_shardings[g], strict=True)
        ]

    def _score(
        self, weights: list[Tensor], metrics: list[Tensor], scalars: list[Tensor], batch: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Score a batch over all devices.

        Returns:
            The metrics' variables after the batch, the variables of the model that it assigns, and the result of
            `score_batch`.
        """
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        state = [v for v, _ in self._model_state()]
        variables = [*state, *self.step.variables["metrics"], *self.step.scalars]
        with RecordingScope(list(zip(variables, [*weights, *metrics, *scalars], strict=True))) as scope:
            scores = score_batch(self.model, x, y, weight, self._context.num_input_pipelines > 1)
            metrics = [scope.get_current_value(v) for v in self.step.variables["metrics"]]
        self._scoring_assigns = [i for i, v in enumerate(state) if id(v) in scope.assigned]
        changed = [scope.get_current_value(state[i]) for i in self._scoring_assigns]
        return metrics, changed, jnp.stack(scores)

    @functools.cached_property
    def _results_read_weights(self) -> bool:
        """True if the result of a metric reads the model's state. Few do, and its arrays would slow down each call."""
        unknown: dict[int, keras.Variable] = {}

        def results(*values: Tensor) -> None:
            variables = [*self.step.variables["metrics"], *self.step.scalars]
            with RecordingScope(list(zip(variables, values, strict=True))) as scope:
                self.model.get_metrics_result()
            unknown.update(scope.unknown)

        jax.eval_shape(results, *(v.value for v in (*self.step.variables["metrics"], *self.step.scalars)))
        return any(id(v) in unknown for v, _ in self._model_state())

    def _results(self, weights: list[Tensor], metrics: list[Tensor], scalars: list[Tensor]) -> dict[str, Tensor]:
        state = [v for v, _ in self._model_state()] if weights else []
        variables = [*state, *self.step.variables["metrics"], *self.step.scalars]
        with keras.StatelessScope(list(zip(variables, [*weights, *metrics, *scalars], strict=True))):
            return self.model.get_metrics_result()


def _set_to_own(variable: keras.Variable, value: np.ndarray) -> None:
    """Set a variable to a value that every host has. `assign` would send it from the first host to the others."""
    sharding = backend_value(variable).sharding
    set_backend_value(variable, jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]))
