"""The TensorFlow engine: the loop over micro-batches and updates, state and evaluation, under `tf.distribute`."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lars_keras._keras_internals import inner_optimizer, layers_of, supports_jit
from lars_keras.compiled import has_accelerator
from lars_keras.files import atomic_path
from lars_keras.training.engine import EngineOptions, Scores, StepResult, as_log, check_supported
from lars_keras.training.forward import build_model
from lars_keras.training.inputs import Data
from lars_keras.training.loss_terms import check_scored_terms
from lars_keras.training.metric_terms import MetricTerms
from lars_keras.training.padding_terms import check_padding
from lars_keras.training.scoring import score_batch, summary
from lars_keras.training.state import EmaWeights, restore_variables, variables_by_name
from lars_keras.training.tensorflow.cluster import TensorFlowCluster
from lars_keras.training.tensorflow.inputs import errors_of_data, first_input, pads, scoring_batches, training_iterator
from lars_keras.training.tensorflow.step import TensorFlowStep
from lars_keras.training.tensorflow.update import check_rule

Tensor = Any


class TensorFlowEngine:
    """The compiled functions of a model under its `tf.distribute` strategy; see `lars_keras.training.engine.Engine`.

    Attributes:
        step: the functions of one replica.
        loss_terms: the terms of the loss.
        metric_terms: which metrics may be split.
    """

    def __init__(self, model: keras.Model, cluster: TensorFlowCluster, options: EngineOptions, element_spec: Any):
        self.model, self.optimizer = model, model.optimizer
        self.strategy, self.replicas, self.options = cluster.strategy, cluster.replicas, options
        auto = options.jit_compile == "auto"
        jit_compile = has_accelerator() and supports_jit(model) if auto else bool(options.jit_compile)
        with self.strategy.scope():
            self.loss_terms = build_model(model, element_spec, options.microbatch_size)
        self.metric_terms = MetricTerms(model, self.loss_terms.batch)
        masked = self.loss_terms.masked and self.replicas * options.accumulation_steps > 1
        self.step = TensorFlowStep(model, self.replicas, options, jit_compile, masked)
        with self.strategy.scope():
            if not self.optimizer.built:
                self.optimizer.build(self.step.forward.trainable)
            self._scored = tf.Variable(np.zeros(5), trainable=False, **_LOCAL)  # float64: n may be above 2**24
        self._ghost_sums = self._on_replicas(self.step.ghost_sums, jit_compile)
        self._accumulate = self._on_replicas(self.step.accumulate, jit_compile)
        self._train_fn = tf.function(self._train)
        self._score_fn = tf.function(self._score)  # one program a shape: `_score_replica` asks for it
        self._results_fn = tf.function(self._results)
        self._metrics_fn = tf.function(self._metric_values)
        self._assign_fn = tf.function(self._assign_metrics)  # TPUs run no function outside of a `tf.function`

    @classmethod
    def check(cls, model: keras.Model, cluster: TensorFlowCluster, options: EngineOptions) -> None:
        """Raise ValueError if this engine does not support the model or an option, before anything is built."""
        check_supported(model.optimizer)
        check_rule(model.optimizer)
        if options.reduce_dtype != "float32":
            raise ValueError(
                "On TensorFlow gradients are reduced in float32; `reduce_dtype` is for KERAS_BACKEND=jax. Received: "
                f"reduce_dtype={options.reduce_dtype}"
            )
        synchronized = any(getattr(layer, "synchronized", False) for layer in layers_of(model))
        if options.jit_compile is True and synchronized and cluster.replicas > 1 and not has_accelerator():
            raise ValueError(
                "XLA compiles no traffic between CPU replicas, as batch normalization with `synchronized=True` needs. "
                "Turn off `jit_compile`. Received: jit_compile=True"
            )

    # -- training ------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        """Do nothing: the program of an update finds the variables that the loss does not reach."""

    def training_iterator(self, data: Data, first_update: int, updates: int) -> Any:
        """Return an iterator over the data of `updates` updates from `first_update` on, for `train`."""
        sizes = self.options.microbatch_size, self.options.accumulation_steps
        return training_iterator(data, self.strategy, *sizes, first_update, updates)

    def train(self, iterator: Any, updates: int) -> StepResult:
        """Take `updates` updates without returning to Python between them."""
        with errors_of_data():
            losses, rates, metrics, norms, waited = self._train_fn(iterator, tf.constant(updates))
        return StepResult(
            losses=losses.numpy().tolist(),
            learning_rates=rates.numpy().tolist(),
            metrics={name: as_log(value) for name, value in metrics.items()},
            measures=dict(zip(self.step.measures, norms.numpy().transpose(1, 0, 2), strict=True))
            if self.step.measures
            else {},
            data_wait=float(waited),
        )

    def _on_replicas(self, function: Callable, jit_compile: bool) -> Callable:
        """Return a function that runs `function`, of the step of one replica, on every replica.

        On a CPU without XLA, TensorFlow must not inline it into the loops around it. In a graph with a loop, memory
        addresses decide whether max pooling gets oneDNN's gradient or Eigen's, and their last bits differ.
        """

        def run(*args: Any) -> Any:
            return self.strategy.run(function, args=args)

        if jit_compile or has_accelerator():
            return run
        return tf.function(run, experimental_attributes={"_noinline": True})

    def _train(self, iterator: Any, updates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Run the body of `train`, in cross-replica context."""
        losses = tf.TensorArray(self.step.forward.loss_dtype, size=updates)
        rates = tf.TensorArray(tf.float32, size=updates)
        norms = tf.TensorArray(tf.float32, size=updates)
        waited = tf.constant(0.0, tf.float64)
        idle = tf.timestamp()  # the time since which the devices are idle
        for u in tf.range(updates):
            rates = rates.write(u, tf.cast(self.optimizer.learning_rate, tf.float32))
            # The sums are values, not variables: nothing but the data's own way orders the micro-batches.
            if self.options.accumulation_steps == 1:  # a loop would add an operation or five for each variable
                data = next(iterator)
                waited += tf.maximum(_time_of(data) - idle, 0.0)
                sums = self._ghost_sums(data, tf.constant(0))
            else:
                sums = self.strategy.run(self.step.zero_sums)
                for i in tf.range(self.options.accumulation_steps):
                    data = next(iterator)
                    waited += tf.maximum(_time_of(data) - idle, 0.0)
                    sums = self._accumulate(sums, data, i)
                    idle = _time_of(sums)
            outcome = self.strategy.run(self.step.finish, args=(sums,))
            loss, taken, norm = (self.strategy.experimental_local_results(o)[0] for o in outcome)
            iterations = inner_optimizer(self.optimizer).iterations
            iterations.assign_add(tf.cast(taken, iterations.dtype))
            losses = losses.write(u, loss)
            norms = norms.write(u, norm)
            idle = _time_of(outcome)
        return losses.stack(), rates.stack(), self.model.get_metrics_result(), norms.stack(), waited

    # -- state ---------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return a copy of all state that the next update depends on. Collective: call it on every host.

        Weights and slots are the same on every replica; each replica has its own variables of the metrics.
        """
        state = {name: np.array(v.numpy()) for name, v in variables_by_name(self.model).items()}
        return state | {f"metric/{i}": value for i, value in enumerate(self._gathered_metrics())}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a snapshot from either engine.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """
        values = restore_variables(self.model, state)
        if values and len(values[0]) != self.replicas:  # other replicas than before: one of them takes all
            values = [
                np.concatenate([[v.sum(0)], np.zeros((self.replicas - 1, *v.shape[1:]), v.dtype)]) for v in values
            ]
        if values:
            self._assign_fn(values)

    @contextlib.contextmanager
    def kept_metrics(self) -> Iterator[None]:
        """Set the metrics back at the end of the context. Collective."""
        values = self._gathered_metrics()
        try:
            yield
        finally:
            self._assign_fn(values)

    def _gathered_metrics(self) -> list[np.ndarray]:
        """Return the values of the metrics, with a first dimension for the replica. Collective."""
        # gather, not the variables' own value: that would sum what must stay apart.
        return [self.strategy.gather(v, axis=0).numpy() for v in self._metrics_fn()]

    def _metric_values(self) -> list[Tensor]:
        """Return the metrics' variables, with a first dimension for the replica."""
        return self.strategy.run(lambda: [tf.convert_to_tensor(v)[tf.newaxis] for v in self.step.forward.metrics])

    def _assign_metrics(self, values: list[Tensor]) -> None:
        def assign(values: list[Tensor]) -> None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            for variable, value in zip(self.step.forward.metrics, values, strict=True):
                variable.assign(tf.gather(value, replica))

        self.strategy.run(assign, args=(values,))

    def save_model(self, path: str | os.PathLike, write: bool) -> None:
        """Write a `.keras` file if `write` is true."""
        if write:
            with atomic_path(path) as temporary:
                self.model.save(temporary)

    def ema_weights(self) -> EmaWeights:
        """Return a context in which the model has the EMA weights, if the optimizer keeps them."""
        return EmaWeights(self.optimizer, lambda v: np.array(v.numpy()))

    # -- evaluation ----------------------------------------------------------------------------

    def check_scoring(self, examples: int | None = None) -> None:
        """Check that the model can be scored over batches; see `lars_keras.training.engine.Engine.check_scoring`."""
        if pads(self.strategy):
            check_padding(self.model, self.loss_terms)
        self._check_batches(math.ceil((examples or 1) / (self.options.microbatch_size * self.replicas)))

    def _check_batches(self, count: int) -> None:
        parts = count * self.replicas
        check_scored_terms(self.model, self.loss_terms, parts)
        self.metric_terms.check(parts, self.replicas)

    def evaluate(
        self, data: Data, before_batch: Callable[[int], None], after_batch: Callable[[int, Scores], None]
    ) -> dict[str, Any]:
        """Return loss, metrics and the number of examples `n`, each example scored once."""
        self.check_scoring()
        self.model.reset_metrics()
        self._scored.assign(np.zeros(5))
        with errors_of_data():
            for i, batch in enumerate(scoring_batches(data, self.strategy, self.options.microbatch_size)):
                self._check_batches(i + 1)
                before_batch(i)
                self._score_fn(batch)
                after_batch(i, self._scores)
        return self._scores()

    def _scores(self) -> dict[str, Any]:
        metrics, sums = self._results_fn()
        return {name: as_log(value) for name, value in metrics.items()} | summary(*sums.numpy().tolist())

    def _score(self, batch: Any) -> None:
        """Score one batch on each replica."""
        self.strategy.run(self._score_replica, args=(batch,))

    def _score_replica(self, batch: Any) -> None:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if first_input(x).shape[0] != 0:  # at the end, nothing may be left for some replicas
            scores = score_batch(self.model, x, y, weight, pads(self.strategy))
            self._scored.assign_add(tf.stack([tf.cast(s, tf.float64) for s in scores]))

    def _results(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the metrics, and the summed results of `score_batch` since the start of the evaluation."""

        def sums() -> Tensor:
            local = tf.identity(self._scored)
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, local)

        return self.model.get_metrics_result(), self.strategy.experimental_local_results(self.strategy.run(sums))[0]


# Every replica reads and writes its own copy, and no write waits for another replica.
_LOCAL: dict[str, Any] = {"aggregation": tf.VariableAggregation.NONE}


def _time_of(values: Any) -> Tensor:
    """Return the time, in seconds, when all of `values` are computed."""
    tensors = [t for t in tf.nest.flatten(values, expand_composites=True) if t is not None]
    with tf.control_dependencies(tensors):
        # An accelerator's program has ended when a number of its last result is in the host's memory.
        last = tf.reshape(tensors[-1], [-1])[:1]
    with tf.device("CPU:0"), tf.control_dependencies([tf.identity(last)]):
        return tf.timestamp()
