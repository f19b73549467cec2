"""One update over any number of replicas and micro-batches, on TensorFlow."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lars_keras.compiled import has_accelerator
from lars_keras.layerwise import MEASURES, LayerwiseOptimizer
from lars_keras.training.forward import StatelessForward, build_model
from lars_keras.training.inputs import Feed, scoring_batches, training_iterator
from lars_keras.training.state import ema_weights, inner_optimizer, restore_shared, shared_state
from lars_keras.training.tensorflow.update import apply_update, check_options, check_rule

Tensor = Any


class TensorFlowEngine:
    """The compiled functions of a model under its `tf.distribute` strategy.

    An update of R replicas and k micro-batches takes R * k ghost batches from the iterator, replica r taking number
    `i * R + r` in pass i. Gradients are summed where they arise; once per update they are reduced over the replicas,
    together with the moving statistics and the loss, and each replica applies the same update to its own copy.

    Args:
        model: compiled, created under the strategy's scope.
        element_spec: shapes and dtypes of the batches to train or evaluate on.
        accumulation_steps: k, passes per update.
        jit_compile: compile the gradient computation with XLA: True, False, or "auto", on a GPU or TPU.
        layer_norms: measure the norms of gradients and weights.
        layer_ratios: measure the trust ratios and effective rates, where the optimizer has them.
    """

    def __init__(
        self,
        model: keras.Model,
        element_spec: Any,
        *,
        accumulation_steps: int,
        jit_compile: bool | str,
        layer_norms: bool = False,
        layer_ratios: bool = False,
    ):
        check_options(model.optimizer)
        check_rule(model.optimizer)
        self.model = model
        self.optimizer = model.optimizer
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        self.accumulation_steps = accumulation_steps
        self._measure = layer_norms
        self.data_wait = 0.0
        self._measure_ratios = layer_ratios and isinstance(inner_optimizer(self.optimizer), LayerwiseOptimizer)
        if jit_compile == "auto":
            jit_compile = has_accelerator()
        with self.strategy.scope():
            build_model(model, element_spec)
        self.forward = StatelessForward(model, compiled=bool(jit_compile))
        with self.strategy.scope():
            if not self.optimizer.built:
                self.optimizer.build(self.forward.trainable)
            self._scored_loss = tf.Variable(0.0, trainable=False, **_LOCAL)
            self._scored = tf.Variable(0.0, trainable=False, **_LOCAL)
        # A pure function: XLA can compile it inside the replica's step, which as a whole it could not.
        self._gradient = tf.function(self._gradient_fn, jit_compile=True) if jit_compile else self._gradient_fn
        self._train_fn = tf.function(self._train)
        self._score_fn = tf.function(self._score)
        self._results_fn = tf.function(self._results)
        self._snapshot_fn = tf.function(self._replica_values)

    # -- training ------------------------------------------------------------------------------

    def training_iterator(self, feed: Feed, microbatch_size: int, first_update: int = 0) -> Any:
        """An iterator over `feed`, from an update on, for `train`."""
        return training_iterator(feed, self.strategy, microbatch_size, self.accumulation_steps, first_update)

    def train(
        self, iterator: Any, updates: int
    ) -> tuple[list[float], list[float], dict[str, float], dict[str, np.ndarray]]:
        """Runs `updates` updates in one host call.

        Sets `data_wait`, the seconds that the replicas stood idle for want of data.

        Returns:
            The loss and the learning rate of each update, the metrics since their last reset, and the norms of each
            update, if they are measured.
        """
        losses, rates, metrics, norms, waited = self._train_fn(iterator, tf.constant(updates))
        self.data_wait = float(waited)
        names = ["gradient", "weight"] * self._measure + [*MEASURES] * self._measure_ratios
        return (
            losses.numpy().tolist(),
            rates.numpy().tolist(),
            {k: float(v) for k, v in metrics.items()},
            dict(zip(names, norms.numpy().transpose(1, 0, 2), strict=True)) if names else {},
        )

    def _train(self, iterator: Any, updates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
        """The body of `train`, in cross-replica context."""
        losses = tf.TensorArray(tf.float32, size=updates)
        rates = tf.TensorArray(tf.float32, size=updates)
        norms = tf.TensorArray(tf.float32, size=updates)
        waited = tf.constant(0.0, tf.float64)
        idle = tf.timestamp()  # since when the devices have nothing to do
        for u in tf.range(updates):
            rates = rates.write(u, tf.cast(self.optimizer.learning_rate, tf.float32))
            # The sums are values, not variables: nothing but the data's own way orders the passes.
            sums = self.strategy.run(self._no_sums)
            for i in tf.range(self.accumulation_steps):
                data = next(iterator)
                waited += tf.maximum(_time_of(data) - idle, 0.0)
                sums = self.strategy.run(self._add_ghost_batch, args=(sums, data, i))
                idle = _time_of(sums)
            outcome = self.strategy.run(self._reduce_and_apply, args=sums)
            loss, taken, norm = (self.strategy.experimental_local_results(o)[0] for o in outcome)
            iterations = inner_optimizer(self.optimizer).iterations
            iterations.assign_add(tf.cast(taken, iterations.dtype))
            losses = losses.write(u, loss)
            norms = norms.write(u, norm)
            idle = _time_of(outcome)
        return losses.stack(), rates.stack(), self.model.get_metrics_result(), norms.stack(), waited

    def _no_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """What `_add_ghost_batch` begins with."""
        shapes = [v.shape for v in self.forward.trainable + self.forward.batch_stats] + [()]
        return [tf.zeros(shape) for shape in shapes], [tf.convert_to_tensor(c) for c in self.forward.rng_state]

    def _add_ghost_batch(
        self, sums: tuple[list[Tensor], list[Tensor]], data: Any, i: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """This replica's sums with pass `i` added to them, and the rng_state after it."""
        values, rng_state = self._ghost_sums(data, i)
        return [total + value for total, value in zip(sums[0], values, strict=True)], rng_state

    def _ghost_sums(self, data: Any, i: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """This replica's part of pass `i`: what is summed over all ghost batches, and the rng_state after it."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        index = i * self.replicas + tf.cast(replica, tf.int32)
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        trainable, batch_stats, rng_state = ([tf.convert_to_tensor(v) for v in part] for part in self._state())
        gradients, batch_stats, rng_state, loss, y_pred = self._gradient(
            trainable, batch_stats, rng_state, x, y, sample_weight, index, scale
        )
        self.model.compute_metrics(x, y, y_pred, sample_weight)
        return [tf.cast(s, tf.float32) for s in [*gradients, *batch_stats, loss]], rng_state

    def _state(self) -> tuple[list[keras.Variable], list[keras.Variable], list[keras.Variable]]:
        return self.forward.trainable, self.forward.batch_stats, self.forward.rng_state

    def _gradient_fn(
        self,
        trainable: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        index: Tensor,
        scale: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            loss, y_pred, batch_stats, rng_state = self.forward.loss(
                trainable, batch_stats, rng_state, x, y, sample_weight, index
            )
            # Keras divides the loss by the number of replicas already.
            loss = loss / self.accumulation_steps
            scaled = loss * tf.cast(scale, loss.dtype)
        gradients = tape.gradient(scaled, trainable)
        missing = [v.path for v, g in zip(self.forward.trainable, gradients, strict=True) if g is None]
        if missing:
            raise ValueError(
                "The loss does not depend on these trainable variables; set `trainable = False` on their layers: "
                + ", ".join(missing)
            )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        batch_stats = [a / (self.replicas * self.accumulation_steps) for a in batch_stats]
        return gradients, batch_stats, rng_state, loss, y_pred

    def _reduce_and_apply(self, sums: list[Tensor], rng_state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The only reduction over replicas of an update, then the update, the same on every replica."""
        sums = [tf.identity(s) for s in sums]  # out of a loop they come without a device, which the reduction asks for
        sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sums)
        trainable, batch_stats, _ = self._state()
        gradients, values, loss = sums[: len(trainable)], sums[len(trainable) : -1], sums[-1]
        own = [tf.cast(g, v.dtype) for g, v in zip(gradients, trainable, strict=True)]
        scale = self.optimizer.scale_loss(tf.constant(1.0))  # the update may change it
        taken, measures = apply_update(self.optimizer, own, trainable, self._measure_ratios)
        for variable, value in zip(batch_stats, values, strict=True):
            variable.assign(tf.cast(value, variable.dtype))
        for variable, value in zip(self.forward.rng_state, rng_state, strict=True):
            variable.assign(value)
        norms = self._norms(gradients, trainable, taken, scale)
        return loss, taken, tf.concat([norms, tf.transpose(tf.stack(measures))], 0) if measures else norms

    def _norms(self, gradients: list[Tensor], variables: list[keras.Variable], taken: Tensor, scale: Tensor) -> Tensor:
        """Norms of the gradients, 0 if their update is skipped, and of the weights; nothing if not asked for."""
        if not self._measure:
            return tf.zeros([0, len(variables)])

        def norms(tensors: list[Any]) -> Tensor:
            return tf.stack([tf.sqrt(2.0 * tf.nn.l2_loss(tf.cast(t, tf.float32))) for t in tensors])

        own = tf.where(taken > 0, norms(gradients) / tf.cast(scale, tf.float32), 0.0)
        return tf.stack([own, norms([tf.convert_to_tensor(v) for v in variables])])

    # -- state ---------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of all that the next update depends on, and of the metrics since their last reset.

        Weights and slots are the same on every replica; of the metrics, each replica has its own part.
        """
        state = {name: np.array(v.numpy()) for name, v in shared_state(self.model).items()}
        # gather, not the variables' own value: that would sum what must stay apart.
        parts = self._snapshot_fn()
        return state | {f"metric/{i}": self.strategy.gather(part, axis=0).numpy() for i, part in enumerate(parts)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `snapshot` returned.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """
        parts = restore_shared(self.model, state)
        if parts and len(parts[0]) != self.replicas:  # other replicas than before: one of them takes all
            parts = [np.concatenate([[p.sum(0)], np.zeros((self.replicas - 1, *p.shape[1:]), p.dtype)]) for p in parts]
        self.strategy.run(self._put_back, args=(parts,))

    def _metric_variables(self) -> list[keras.Variable]:
        return [v for metric in self.model.metrics for v in metric.variables]

    def _replica_values(self) -> list[Tensor]:
        """The metrics' variables, with a first dimension for the replica."""
        return self.strategy.run(lambda: [tf.convert_to_tensor(v)[tf.newaxis] for v in self._metric_variables()])

    def _put_back(self, parts: list[np.ndarray]) -> None:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        for variable, part in zip(self._metric_variables(), parts, strict=True):
            variable.assign(tf.gather(tf.constant(part), replica))

    def save_model(self, path: str | os.PathLike, write: bool) -> None:
        """Writes a `.keras` file, where `write`."""
        if write:
            self.model.save(path)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Meanwhile the model has the moving average of its weights, where the optimizer keeps one."""
        return ema_weights(self.optimizer, lambda v: np.array(v.numpy()))

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, feed: Feed, batch_size: int, after_batch: Callable[[int], None]) -> dict[str, float]:
        """Loss, metrics and the number of examples, each scored once; calls `after_batch` after each batch."""
        self.model.reset_metrics()
        self._scored_loss.assign(0.0)
        self._scored.assign(0.0)
        for i, data in enumerate(scoring_batches(feed, self.strategy, batch_size)):
            self._score_fn(data)
            after_batch(i)
        return {name: float(value) for name, value in self._results_fn().items()}

    def _score(self, data: Any) -> None:
        """Scores one padded batch per replica; padding has weight 0."""
        self.strategy.run(self._score_replica, args=(data,))

    def _score_replica(self, data: Any) -> None:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self.model(x, training=False)
        loss = self.model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weight)
        own = tf.add_n([tf.cast(term, loss.dtype) for term in self.model.losses]) if self.model.losses else 0.0
        examples = tf.cast(tf.shape(weight)[0], loss.dtype)
        self.model.compute_metrics(x, y, y_pred, weight)
        total = tf.reduce_sum(tf.cast(weight, loss.dtype))
        # Keras's loss is the sum over the batch, padding included, divided by its size and by the replicas.
        self._scored_loss.assign_add((loss * self.replicas - own) * examples + own * total)
        self._scored.assign_add(total)

    def _results(self) -> dict[str, Tensor]:
        """Loss, metrics and `n` since the start of the evaluation."""

        def sums() -> list[Tensor]:
            local = [tf.identity(self._scored_loss), tf.identity(self._scored)]
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, local)

        loss, n = (self.strategy.experimental_local_results(s)[0] for s in self.strategy.run(sums))
        return {**self.model.get_metrics_result(), "loss": loss / n, "n": n}


# Every replica reads and writes its own copy, and no write waits for another replica.
_LOCAL: dict[str, Any] = {"aggregation": tf.VariableAggregation.NONE}


def _time_of(values: Any) -> Tensor:
    """When all of `values` are there, in seconds."""
    tensors = tf.nest.flatten(values, expand_composites=True)
    with tf.control_dependencies(tensors):
        # An accelerator's program has ended when a number of its last result is in the host's memory.
        last = tf.reshape(tensors[-1], [-1])[:1]
    with tf.device("CPU:0"), tf.control_dependencies([tf.identity(last)]):
        return tf.timestamp()
