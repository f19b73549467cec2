"""One update over any number of replicas and micro-batches, on TensorFlow."""

from typing import Any

import keras
import tensorflow as tf

from lars_keras.training.feed import Feed, scoring_batches, training_iterator
from lars_keras.training.ghost import GhostBatch
from lars_keras.training.update import apply_update, check_options, inner_optimizer

Tensor = Any


class TensorFlowEngine:
    """The compiled functions of a model under its `tf.distribute` strategy.

    An update of R replicas and k micro-batches takes R * k ghost batches from the iterator, replica r taking number
    `i * R + r` in pass i. Gradients are summed where they arise; once per update they are reduced over the replicas,
    together with the moving statistics and the loss, and each replica applies the same update to its own copy.

    Args:
        model: compiled, created under the strategy's scope.
        feed: data to train or evaluate on, for the shapes of its examples.
        microbatches: k, passes per update.
        jit_compile: compile the gradient computation with XLA: True, False, or "auto", on a GPU or TPU.
    """

    def __init__(self, model: keras.Model, feed: Feed, *, microbatches: int, jit_compile: bool | str):
        check_options(model.optimizer)
        self.model = model
        self.optimizer = model.optimizer
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        self.microbatches = microbatches
        if jit_compile == "auto":
            jit_compile = any(d.device_type in ("GPU", "TPU") for d in tf.config.list_logical_devices())
        with self.strategy.scope():
            _build(model, feed)
        self.ghost = GhostBatch(model)
        with self.strategy.scope():
            if not self.optimizer.built:
                self.optimizer.build(self.ghost.trainable)
            # Without micro-batches nothing is summed over time, and the sums would only cost memory.
            self._sums = self._make_sums() if microbatches > 1 else []
            self._scored_loss = tf.Variable(0.0, trainable=False, **_LOCAL)
            self._scored = tf.Variable(0.0, trainable=False, **_LOCAL)
        # A pure function: XLA can compile it inside the replica's step, which as a whole it could not.
        self._gradient = tf.function(self._gradient_fn, jit_compile=True) if jit_compile else self._gradient_fn
        self._train_fn = tf.function(self._train)
        self._score_fn = tf.function(self._score)
        self._results_fn = tf.function(self._results)

    # -- training ------------------------------------------------------------------------------

    def training_iterator(self, feed: Feed, microbatch_size: int) -> Any:
        """An iterator over `feed` for `train`."""
        return training_iterator(feed, self.strategy, microbatch_size)

    def train(self, iterator: Any, updates: int) -> tuple[list[float], list[float], dict[str, float]]:
        """Runs `updates` updates in one host call.

        Returns:
            The loss and the learning rate of each update, and the metrics since their last reset.
        """
        losses, rates, metrics = self._train_fn(iterator, tf.constant(updates))
        return losses.numpy().tolist(), rates.numpy().tolist(), {k: float(v) for k, v in metrics.items()}

    def _train(self, iterator: Any, updates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The body of `train`, in cross-replica context."""
        losses = tf.TensorArray(tf.float32, size=updates)
        rates = tf.TensorArray(tf.float32, size=updates)
        for u in tf.range(updates):
            rates = rates.write(u, tf.cast(self.optimizer.learning_rate, tf.float32))
            if self.microbatches == 1:
                outcome = self.strategy.run(self._update, args=(next(iterator),))
            else:
                for i in tf.range(self.microbatches):
                    self.strategy.run(self._accumulate, args=(next(iterator), i))
                outcome = self.strategy.run(self._finish)
            loss, taken = (self.strategy.experimental_local_results(o)[0] for o in outcome)
            iterations = inner_optimizer(self.optimizer).iterations
            iterations.assign_add(tf.cast(taken, iterations.dtype))
            losses = losses.write(u, loss)
        return losses.stack(), rates.stack(), self.model.get_metrics_result()

    def _update(self, data: Any) -> tuple[Tensor, Tensor]:
        """A whole update of one replica, without micro-batches."""
        return self._reduce_and_apply(*self._ghost_sums(data, tf.constant(0)))

    def _accumulate(self, data: Any, i: Tensor) -> None:
        """Adds pass `i` to this replica's sums."""
        sums, counters = self._ghost_sums(data, i)
        for total, value in zip(self._sums, sums, strict=True):
            total.assign_add(value)
        for total, value in zip(self._counters, counters, strict=True):
            total.assign(value)

    def _finish(self) -> tuple[Tensor, Tensor]:
        """Reduces and applies this replica's sums, and empties them."""
        outcome = self._reduce_and_apply([tf.identity(s) for s in self._sums], [tf.identity(c) for c in self._counters])
        with tf.control_dependencies([tf.group(*outcome)]):
            for total in self._sums:
                total.assign(tf.zeros_like(total))
        return outcome

    def _make_sums(self) -> list[tf.Variable]:
        self._counters = [tf.Variable(v, trainable=False, **_LOCAL) for v in self.ghost.counters]
        shapes = [v.shape for v in self.ghost.trainable + self.ghost.averaged] + [()]
        return [tf.Variable(tf.zeros(s, tf.float32), trainable=False, **_LOCAL) for s in shapes]

    def _ghost_sums(self, data: Any, i: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """This replica's part of pass `i`: what is summed over all ghost batches, and the counters after it."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        index = i * self.replicas + tf.cast(replica, tf.int32)
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        trainable, averaged, counters = ([tf.convert_to_tensor(v) for v in part] for part in self._state())
        gradients, averaged, counters, loss, y_pred = self._gradient(
            trainable, averaged, counters, x, y, sample_weight, index, scale
        )
        self.model.compute_metrics(x, y, y_pred, sample_weight)
        return [tf.cast(s, tf.float32) for s in [*gradients, *averaged, loss]], counters

    def _state(self) -> tuple[list[keras.Variable], list[keras.Variable], list[keras.Variable]]:
        return self.ghost.trainable, self.ghost.averaged, self.ghost.counters

    def _gradient_fn(
        self,
        trainable: list[Tensor],
        averaged: list[Tensor],
        counters: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        index: Tensor,
        scale: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            loss, y_pred, averaged, counters = self.ghost.loss(
                trainable, averaged, counters, x, y, sample_weight, index
            )
            # Keras divides the loss by the number of replicas already.
            loss = loss / self.microbatches
            scaled = loss * tf.cast(scale, loss.dtype)
        gradients = tape.gradient(scaled, trainable)
        missing = [v.path for v, g in zip(self.ghost.trainable, gradients, strict=True) if g is None]
        if missing:
            raise ValueError(
                "The loss does not depend on these trainable variables; set `trainable = False` on their layers: "
                + ", ".join(missing)
            )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        averaged = [a / (self.replicas * self.microbatches) for a in averaged]
        return gradients, averaged, counters, loss, y_pred

    def _reduce_and_apply(self, sums: list[Tensor], counters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The only reduction over replicas of an update, then the update, the same on every replica."""
        sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sums)
        trainable, averaged, _ = self._state()
        gradients, values, loss = sums[: len(trainable)], sums[len(trainable) : -1], sums[-1]
        taken = apply_update(
            self.optimizer, [tf.cast(g, v.dtype) for g, v in zip(gradients, trainable, strict=True)], trainable
        )
        for variable, value in zip(averaged, values, strict=True):
            variable.assign(tf.cast(value, variable.dtype))
        for variable, value in zip(self.ghost.counters, counters, strict=True):
            variable.assign(value)
        return loss, taken

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, feed: Feed, batch_size: int) -> dict[str, float]:
        """Loss, metrics and the number of examples, each scored once."""
        self.model.reset_metrics()
        self._scored_loss.assign(0.0)
        self._scored.assign(0.0)
        for data in scoring_batches(feed, self.strategy, batch_size):
            self._score_fn(data)
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


def _build(model: keras.Model, feed: Feed) -> None:
    """Creates what Keras creates on the first batch, without drawing one from the data."""
    dataset = feed if isinstance(feed, tf.data.Dataset) else feed(tf.distribute.InputContext())
    zeros = tf.nest.map_structure(lambda s: tf.zeros([1, *s.shape[1:]], s.dtype), dataset.element_spec)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(zeros)
    if not model.built:
        model(x)
    with keras.StatelessScope():
        model.compute_metrics(x, y, model(x), weight)


# Every replica reads and writes its own copy, and no write waits for another replica.
_LOCAL: dict[str, Any] = {"aggregation": tf.VariableAggregation.NONE}
