"""Apply reduced gradients to the weights, on one replica of a `tf.distribute` strategy.

`keras.optimizers.Optimizer.apply` clips, checks and scales before it sums over replicas, and averages weights in ways
that tf.distribute forbids. Here the gradients are already summed, so every option of the base class means the same on
any number of replicas.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from lars_keras import _keras_internals as keras_internals
from lars_keras.layerwise import MEASURES, LayerwiseOptimizer


def check_rule(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuse optimizers that do more than their `update_step` or `rule`, the only part that `apply_update` calls.

    Raises:
        ValueError: for Nadam, Muon and others that replace a part of `keras.optimizers.Optimizer.apply`, and for such
            subclasses of `LayerwiseOptimizer` and `LossScaleOptimizer`.
    """
    inner, parts = keras_internals.inner_optimizer(optimizer), keras_internals.APPLY_PARTS
    if isinstance(inner, LayerwiseOptimizer):
        _check_parts(inner, LayerwiseOptimizer, (*parts, "prepared", "update_variables"))
    else:
        _check_parts(inner, keras.optimizers.Optimizer, parts)
    if optimizer is not inner:
        _check_parts(optimizer, keras.optimizers.LossScaleOptimizer, (*parts, *keras_internals.LOSS_SCALE_PARTS))


def _check_parts(optimizer: keras.optimizers.Optimizer, base: type, parts: Sequence[str]) -> None:
    own = type(optimizer)
    replaced = [
        name for name in parts if name in vars(optimizer) or getattr(own, name, None) is not getattr(base, name, None)
    ]
    if replaced:
        raise ValueError(
            f"On TensorFlow, `Trainer` calls only an optimizer's `update_step`, and {own.__name__} also overrides "
            f"{', '.join(replaced)}. Use JAX, or another optimizer."
        )


def apply_update(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor | None],
    variables: list[keras.Variable],
    measure: bool = False,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Apply one update; call it in replica context with the same gradients on every replica.

    Args:
        optimizer: a built optimizer, possibly a `LossScaleOptimizer`.
        gradients: gradients of the scaled loss, summed over replicas and micro-batches, in the dtype of the sums; the
            new values of variables that are overwritten; None for variables to be left alone.
        variables: the variables of these gradients.
        measure: return the measures of a `LayerwiseOptimizer` for each variable.

    Returns:
        A scalar int: 1, or 0 if dynamic loss scaling found a value that is not finite and skipped the update. The
        caller adds it to `optimizer.iterations`, in cross-replica context. Then the measures of
        `LayerwiseOptimizer.update`, 0 if it was skipped or the variable is overwritten or left alone; an empty list
        from other optimizers.
    """

    def unscaled(scale: tf.Tensor | float | None) -> list[tf.Tensor | None]:
        """Return the gradients of the loss in the dtypes of the variables, in which scaled ones may overflow."""

        def own(gradient: tf.Tensor | None, variable: keras.Variable) -> tf.Tensor | None:
            if gradient is None:
                return None
            if scale is not None and not keras_internals.is_overwritten(variable):
                gradient = gradient / tf.cast(scale, gradient.dtype)
            return tf.cast(gradient, variable.dtype)

        return [own(g, v) for g, v in zip(gradients, variables, strict=True)]

    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.constant(1), _step(optimizer, unscaled(optimizer.loss_scale_factor), variables, measure)

    scale = tf.convert_to_tensor(optimizer.dynamic_scale)
    own_gradients = unscaled(scale)
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in own_gradients if g is not None])

    def take() -> tuple[tf.Tensor, list[tf.Tensor]]:
        measures = _step(optimizer.inner_optimizer, own_gradients, variables, measure)
        grow = tf.equal(optimizer.step_counter, optimizer.dynamic_growth_steps - 1)
        optimizer.dynamic_scale.assign(tf.where(grow, scale * 2.0, scale))
        steps = tf.convert_to_tensor(optimizer.step_counter) + 1
        optimizer.step_counter.assign(tf.where(grow, tf.zeros_like(steps), steps))
        return tf.constant(1), measures

    def skip() -> tuple[tf.Tensor, list[tf.Tensor]]:
        optimizer.dynamic_scale.assign(scale * 0.5)
        optimizer.step_counter.assign(0)
        measured = measure and isinstance(optimizer.inner_optimizer, LayerwiseOptimizer)
        return tf.constant(0), [tf.zeros([len(MEASURES)]) for _ in variables] if measured else []

    return tf.cond(finite, take, skip)


def _step(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor | None],
    variables: list[keras.Variable],
    measure: bool,
) -> list[tf.Tensor]:
    """Clip, decay, apply the rule, average and constrain, in the order of Keras's `Optimizer.apply`."""
    rate = optimizer.learning_rate
    given = list(zip(gradients, variables, strict=True))
    moves = [g is not None and not keras_internals.is_overwritten(v) for g, v in given]
    for (gradient, variable), moved in zip(given, moves, strict=True):
        if gradient is not None and not moved:
            variable.assign(gradient)
    pairs = [pair for pair, moved in zip(given, moves, strict=True) if moved]
    gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
    gradients = keras_internals.clip_gradients(optimizer, gradients)
    for variable in variables:
        if optimizer.weight_decay and keras_internals.uses_weight_decay(optimizer, variable):
            factor = tf.cast(rate * optimizer.weight_decay, variable.dtype)
            variable.assign(variable - variable * factor)
    measures = []
    if isinstance(optimizer, LayerwiseOptimizer):
        found = iter(optimizer.update(gradients, variables, rate, measure))
        nothing = tf.zeros([len(MEASURES)])
        measures = [next(found) if moved else nothing for moved in moves if measure]
    else:
        for gradient, variable in zip(gradients, variables, strict=True):
            optimizer.update_step(gradient, variable, rate)
    if optimizer.use_ema:
        _average(optimizer, variables)
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    return measures


def _average(optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]) -> None:
    """Update the EMA of the weights, and write it back when it is due."""
    keras_internals.update_ema(optimizer)
    if not optimizer.ema_overwrite_frequency:
        return
    due = tf.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
    averages = keras_internals.ema_variables(optimizer)
    for variable, average in zip(keras_internals.optimized_variables(optimizer), averages, strict=True):
        if average is not None:
            variable.assign(ops.where(due, average, variable))
