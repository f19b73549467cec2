"""One replica's part of an update on TensorFlow; call these functions in the replica context of its strategy.

An update of R replicas and k micro-batches takes R * k ghost batches; replica r takes number `i * R + r` in micro-batch
`i`. Gradients are summed where they arise. Once per update they are reduced over the replicas, together with the moving
statistics and the loss, and each replica applies the same update to its own copy.
"""

import math
import operator
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from lars_keras._keras_internals import inner_optimizer, mask_of, set_mask
from lars_keras.layerwise import MEASURES, LayerwiseOptimizer
from lars_keras.training.engine import EngineOptions
from lars_keras.training.forward import StatelessForward
from lars_keras.training.state import sum_dtype
from lars_keras.training.tensorflow.update import apply_update

Tensor = Any
Sums: TypeAlias = dict[str, Any]
"""The sums over micro-batches: `gradients` and moving `statistics`, lists in the order of their variables; `loss`;
`squares` of the gradients of ghost batches, to measure noise; `valid`, their entries, if they are masked. Beside them
`rng_state`, the newest state of the random numbers."""


class TensorFlowStep:
    """The functions of a built model and its built optimizer on one replica.

    Args:
        model: compiled and built.
        replicas: number of replicas.
        options: how to take a step.
        jit_compile: compile the gradient computation with XLA.
        masked: weight ghost batches by their valid entries.

    Attributes:
        forward: the model as a pure function.
        gradient: the gradient of one ghost batch, compiled if asked for.
        measures: names of the rows that `finish` returns.
    """

    def __init__(self, model: keras.Model, replicas: int, options: EngineOptions, jit_compile: bool, masked: bool):
        self.model, self.optimizer, self.replicas = model, model.optimizer, replicas
        self.accumulation_steps = options.accumulation_steps
        self._masked = masked
        self._measure_norms, self._measure_noise = options.variable_norms, options.noise_scale
        layerwise = isinstance(inner_optimizer(self.optimizer), LayerwiseOptimizer)
        self._measure_ratios = options.trust_ratios and layerwise
        self.measures = ["gradient", "weight"] * self._measure_norms + ["ghost_gradient"] * self._measure_noise
        self.measures += [*MEASURES] * self._measure_ratios
        self.forward = StatelessForward(model, compiled=jit_compile)
        # A pure function: XLA can compile it inside the replica's step, which as a whole it could not.
        self.gradient = tf.function(self._gradient, jit_compile=True) if jit_compile else self._gradient

    def zero_sums(self) -> Sums:
        """Return the sums before the first micro-batch of an update."""
        gradients, statistics = (
            [tf.zeros(v.shape, sum_dtype(v.dtype)) for v in variables]
            for variables in (self.forward.trainable, self.forward.averaged)
        )
        pairs = zip(gradients, self.forward.overwritten, strict=True)
        sums: Sums = {
            "gradients": [tf.fill(g.shape, tf.constant(-math.inf, g.dtype)) if o else g for g, o in pairs],
            "statistics": statistics,
            "loss": tf.zeros((), self.forward.loss_dtype),
            "rng_state": [tf.convert_to_tensor(v) for v in self.forward.rng_state],
        }
        if self._measure_noise:
            sums["squares"] = tf.zeros(len(gradients))
        if self._masked:
            sums["valid"] = tf.zeros(())
        return sums

    def accumulate(self, sums: Sums, data: Any, i: Tensor) -> Sums:
        """Add this replica's ghost batch of micro-batch `i` to its sums."""
        new = self.ghost_sums(data, i)
        triples = zip(sums["gradients"], new["gradients"], self.forward.overwritten, strict=True)
        gradients = [tf.maximum(total, value) if o else total + value for total, value, o in triples]
        others = [name for name in new if name not in ("gradients", "rng_state")]
        added = {name: tf.nest.map_structure(operator.add, sums[name], new[name]) for name in others}
        return {"gradients": gradients, **added, "rng_state": new["rng_state"]}

    def ghost_sums(self, data: Any, i: Tensor) -> Sums:
        """Return the terms that this replica's ghost batch of micro-batch `i` adds to the sums."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        index = i * self.replicas + tf.cast(replica, tf.int32)
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        trainable, batch_stats, rng_state = self.state()
        metrics = [tf.convert_to_tensor(v) for v in self.forward.metrics]
        gradients, batch_stats, rng_state, loss, y_pred, masks, metrics, valid = self.gradient(
            trainable, batch_stats, rng_state, x, y, sample_weight, index, scale, metrics
        )
        for prediction, mask in zip(tf.nest.flatten(y_pred), masks, strict=True):
            if mask is not None:  # lost on the way out of a compiled function
                set_mask(prediction, mask)
        for variable, value in zip(self.forward.metrics, metrics, strict=True):
            variable.assign(value)
        self.model.compute_metrics(x, y, y_pred, sample_weight)
        loss = tf.cast(loss, self.forward.loss_dtype)
        sums: Sums = {"gradients": gradients, "statistics": batch_stats, "loss": loss, "rng_state": rng_state}
        if self._measure_noise:
            sums["squares"] = self._gradient_squares(gradients)
        if self._masked:  # by their weight only here: the scaled loss may be in float16
            weighted = {"gradients": self._weighted(gradients, valid), "loss": loss * tf.cast(valid, loss.dtype)}
            sums |= {**weighted, "valid": valid}
        return sums

    def state(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the values of trainable variables, batch statistics and random numbers, as `gradient` takes them."""
        groups = (self.forward.trainable, self.forward.batch_stats, self.forward.rng_state)
        trainable, batch_stats, rng_state = ([tf.convert_to_tensor(v) for v in group] for group in groups)
        return trainable, batch_stats, rng_state

    def _gradient(
        self,
        trainable: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        index: Tensor,
        scale: Tensor,
        metrics: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Any, list[Tensor | None], list[Tensor], Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            loss, y_pred, batch_stats, rng_state, metrics, valid = self.forward.loss(
                trainable, batch_stats, rng_state, x, y, sample_weight, index, metrics
            )
            loss = loss / (self.replicas * self.accumulation_steps)
            scaled = loss * tf.cast(scale, loss.dtype)
        gradients = tape.gradient(scaled, trainable)
        self.forward.leave_alone([g is None for g in gradients])
        gradients = [tf.zeros_like(w) if g is None else g for w, g in zip(trainable, gradients, strict=True)]
        # Rows of an embedding that come more than once are added here, so never in half precision.
        gradients = [tf.convert_to_tensor(tf.cast(g, sum_dtype(g.dtype.name))) for g in gradients]
        ghosts = self.replicas * self.accumulation_steps
        batch_stats = [tf.cast(a, sum_dtype(a.dtype.name)) / ghosts for a in batch_stats]
        masks = [mask_of(prediction) for prediction in tf.nest.flatten(y_pred)]
        return gradients, batch_stats, rng_state, loss, y_pred, masks, metrics, valid

    def finish(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the sums over the replicas, the only reduction of an update, and apply the update on every replica.

        Returns:
            The loss; 1, or 0 if dynamic loss scaling skipped the update; and `measures`, float32 of shape
            `(measures, variables)`.
        """
        # Out of a loop the sums come without a device, which the reduction asks for.
        sums = tf.nest.map_structure(tf.identity, sums)
        rng_state = sums.pop("rng_state")
        sums = self._all_reduced(sums)
        trainable, averaged = self.forward.trainable, self.forward.averaged
        gradients, loss = sums["gradients"], sums["loss"]
        if self._masked:
            mean = tf.math.divide_no_nan(float(self.replicas * self.accumulation_steps), sums["valid"])
            gradients, loss = self._weighted(gradients, mean), loss * tf.cast(mean, loss.dtype)
        own = [None if unreached else g for g, unreached in zip(gradients, self.forward.unreached, strict=True)]
        scale = self.optimizer.scale_loss(tf.constant(1.0))  # the update may change it
        with tf.control_dependencies([loss]):  # or, where the data have ended, weights would decay all the same
            taken, ratios = apply_update(self.optimizer, own, trainable, self._measure_ratios)
            for variable, value, assigned in zip(averaged, sums["statistics"], self.forward.assigned, strict=True):
                if assigned:
                    variable.assign(tf.cast(value, variable.dtype))
            for variable, value in zip(self.forward.rng_state, rng_state, strict=True):
                variable.assign(value)
            taken = tf.identity(taken)
        norms = self._norms(gradients, sums.get("squares"), taken, tf.cast(scale, tf.float32))
        return loss, taken, tf.concat([norms, tf.transpose(tf.stack(ratios))], 0) if ratios else norms

    def _all_reduced(self, sums: Sums) -> Sums:
        """Sum over the replicas; for variables that are overwritten, take the largest.

        `tf.distribute` has no maximum, so each replica sends its value in a row of its own, in the same reduction.
        """
        context = tf.distribute.get_replica_context()
        own = tf.equal(tf.range(self.replicas), context.replica_id_in_sync_group)

        def in_own_row(g: Tensor) -> Tensor:
            return tf.where(tf.reshape(own, [-1] + [1] * len(g.shape)), g[tf.newaxis], tf.zeros_like(g))

        pairs = zip(sums["gradients"], self.forward.overwritten, strict=True)
        rows = sums | {"gradients": [in_own_row(g) if overwritten else g for g, overwritten in pairs]}
        reduced: Sums = context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
        pairs = zip(reduced["gradients"], self.forward.overwritten, strict=True)
        return reduced | {"gradients": [tf.reduce_max(g, 0) if overwritten else g for g, overwritten in pairs]}

    def _weighted(self, gradients: list[Tensor], weight: Tensor) -> list[Tensor]:
        pairs = zip(gradients, self.forward.overwritten, strict=True)
        return [g if overwritten else g * tf.cast(weight, g.dtype) for g, overwritten in pairs]

    def _gradient_squares(self, gradients: list[Tensor]) -> Tensor:
        pairs = zip(gradients, self.forward.overwritten, strict=True)
        return _squares([tf.zeros(()) if overwritten else g for g, overwritten in pairs])

    def _norms(self, gradients: list[Tensor], squares: Tensor | None, taken: Tensor, scale: Tensor) -> Tensor:
        """Return the requested norms: of gradients, weights and ghost-batch gradients.

        Norms of gradients are 0 if the update is skipped, and for variables that are overwritten. The norm of the
        ghost-batch gradients is a root mean square.
        """
        rows = []
        if self._measure_norms:
            rows = [tf.where(taken > 0, tf.sqrt(self._gradient_squares(gradients)) / scale, 0.0)]
            rows += [tf.sqrt(_squares([tf.convert_to_tensor(v) for v in self.forward.trainable]))]
        if squares is not None:  # each is of a gradient divided by the number of ghost batches
            ghosts = float(self.replicas * self.accumulation_steps)
            rows += [tf.where(taken > 0, tf.sqrt(ghosts * squares) / scale, 0.0)]
        return tf.stack(rows) if rows else tf.zeros([0, len(self.forward.trainable)])


def _squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor, float32 of shape `(tensors,)`."""
    return tf.stack([2.0 * tf.nn.l2_loss(tf.cast(t, tf.float32)) for t in tensors])
