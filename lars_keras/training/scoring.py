"""Score one batch in evaluation, on either engine.

Without padding the score is what Keras's `evaluate` computes. It comes with the numbers by which Keras divides, so that
batches of any size add up to the score of all data at once.
"""

import functools
import math
from typing import Any

import keras
from keras import ops

from lars_keras import _keras_internals as keras_internals
from lars_keras.training.overrides import is_overridden

Tensor = Any


def score_batch(model: keras.Model, x: Any, y: Any, weight: Any, padded: bool) -> list[Tensor]:
    """Score a batch, and update the metrics with it.

    Args:
        model: built.
        x: inputs.
        y: targets, or None.
        weight: None; or one for each example, or for each element of the outputs, or a structure of these by output.
        padded: True if `weight` is 0 for examples that only fill up the batch.

    Of one compiled loss the result is the weighted mean, so its divisor is the sum of the weights. Of several losses,
    or with weights for several outputs, it is Keras's value: the divisor is the number of examples, as in Keras's own
    metrics of the single losses, of which `loss` is the weighted sum.

    Returns:
        Scalars, to be summed over batches for `summary`: the compiled loss times its divisor in the batch; the divisor
        of the result, in units of examples; the model's own losses times their number of examples; that number; and
        `n`, the sum of the weights, with weights for several outputs the number of examples that have one.
    """
    y_pred = model(x, training=False)
    loss_weight = broadcastable(weight, y_pred) if padded else weight
    with keras_internals.losses_of_one_replica(), keras_internals.recorded_masks() as masks:
        loss = keras_internals.compute_loss(model, x, y, y_pred, loss_weight, training=False)
    model.compute_metrics(x, y, y_pred, weight)
    size = next(ops.shape(a)[0] for a in keras.tree.flatten(x) if a is not None)
    several = len(keras_internals.compiled_losses(model)) > 1
    count, total, n = _units(masks, weight, ops.cast(size, loss.dtype), loss.dtype, several, padded)
    size = n if padded else ops.cast(size, loss.dtype)
    zero = ops.zeros([], loss.dtype)
    if is_overridden(model, "compute_loss"):  # only the model knows its parts
        if not padded:
            return [zero, size, loss * size, size, n]
        # A mean over the examples counts the padding, a penalty does not. Without weight the penalty is all there is.
        weightless = keras.tree.map_structure(ops.zeros_like, loss_weight)
        variables = [*model.variables, *(v for metric in model.metrics for v in metric.variables)]
        values = [(v, ops.convert_to_tensor(v)) for v in variables]  # of the scope that this may be in
        with keras_internals.losses_of_one_replica(), keras.StatelessScope(values):  # metrics see a batch once
            penalty = keras_internals.compute_loss(model, x, y, y_pred, weightless, training=False)
        return [zero, n, (loss - penalty) * count + penalty * n, size, n]
    own = sum((ops.cast(ops.sum(term), loss.dtype) for term in model.losses), zero)
    return [(loss - own) * count, total, own * size, size, n]


def summary(compiled: float, total: float, own: float, size: float, n: float) -> dict[str, float]:
    """Return `loss` and `n` from the summed results of `score_batch`; without any weight the loss is NaN."""
    return {"loss": compiled / total + own / size if n and total and size else math.nan, "n": n}


def _units(
    masks: list[Tensor | None], weight: Any, size: Tensor, dtype: str, several: bool, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divisor of Keras's loss, the divisor of the result, and `n`, in units of examples."""
    leaves = [w for w in keras.tree.flatten(weight) if w is not None]
    by_output = keras.tree.is_nested(weight) and len(keras.tree.flatten(weight)) > 1
    if by_output and leaves:
        n = _with_weight(leaves, dtype)
        return size, n if padded else size, n
    weight = leaves[0] if leaves else None
    n = size if weight is None else size * ops.mean(ops.cast(weight, dtype))
    if several:
        return size, _with_weight(leaves, dtype) if padded else size, n
    if len(masks) != 1 or masks[0] is None:
        return size, n, n
    mask = ops.cast(masks[0], dtype)
    weighted = mask
    if weight is not None:
        rank = max(len(mask.shape), len(weight.shape))
        weighted = _of_rank(mask, rank) * _of_rank(ops.cast(weight, dtype), rank)
    return size * ops.mean(mask), size * ops.mean(weighted), n


def _with_weight(weights: list[Tensor], dtype: str) -> Tensor:
    """Return the number of examples with a weight other than 0 in any of the tensors."""
    some = [ops.any(ops.reshape(w != 0, (ops.shape(w)[0], -1)), axis=1) for w in weights]
    return ops.sum(ops.cast(functools.reduce(ops.logical_or, some), dtype))


def broadcastable(weight: Any, y_pred: Any) -> Any:
    """Return weights that broadcast to the element-wise losses, which have one dimension fewer than the output."""
    if keras.tree.is_nested(weight):
        return weight
    ranks = {max(len(p.shape) - 1, len(weight.shape)) for p in keras.tree.flatten(y_pred)}
    if ranks == {len(weight.shape)}:
        return weight
    return keras.tree.map_structure(lambda p: _of_rank(weight, max(len(p.shape) - 1, len(weight.shape))), y_pred)


def _of_rank(tensor: Tensor, rank: int) -> Tensor:
    for _ in range(rank - len(tensor.shape)):
        tensor = ops.expand_dims(tensor, -1)
    return tensor
