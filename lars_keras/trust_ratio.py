"""The trust ratio: one pure function with its edge rules, and the norms that it takes."""

from typing import Any

import keras
from keras import ops

from lars_keras import compiled

Tensor = Any  # a tensor of whichever backend Keras runs


def l2_norm(x: Tensor, expensive_input: bool = False) -> Tensor:
    """Compute the L2 norm over all elements of `x`, a scalar of the dtype of `x`.

    Callers pass float32 (or float64): in float16 the squares overflow above 256 and vanish below 2e-4.

    Args:
        x: any shape.
        expensive_input: `x` is an expression that costs more than reading a tensor. The value is the same.
    """
    return ops.sqrt(_sum_of_squares(x, 16 if expensive_input else 28))


def _sum_of_squares(x: Tensor, rows: int, lanes: int = 8) -> Tensor:
    """Sum the squares of `x` in one read of it, without storing them.

    XLA may not reassociate a sum of floats. On a CPU, TensorFlow's XLA then either stores all the squares or adds them
    one by one, at a fifth of the speed of memory. But it unrolls short sums, and runs along the last axis in vector
    registers. So this function first adds `rows` neighboring vectors of `lanes`, then adds these sums, which are `rows`
    times fewer. This order is also more exact. XLA fuses at most 32 rows and unrolls a longer expression less. Other
    compilers do the same by themselves.
    """
    if keras.backend.backend() != "tensorflow" or compiled.has_accelerator():
        return ops.sum(ops.square(x))
    x = ops.reshape(x, (-1,))
    size = x.shape[0]
    head = size - size % (rows * lanes)
    total = ops.sum(ops.square(x[head:]))
    if head:
        partial = ops.sum(ops.square(ops.reshape(x[:head], (-1, rows, lanes))), axis=1)
        total = total + ops.sum(ops.abs(partial))  # abs, which changes nothing, keeps XLA from merging the two sums
    return total


def trust_ratio(
    weight_norm: Tensor,
    rule_norm: Tensor,
    trust_coefficient: float = 1.0,
    epsilon: float = 0.0,
    decay_norm: Tensor | float = 0.0,
) -> Tensor:
    """Compute `trust_coefficient * ||w|| / (rule_norm + decay_norm + epsilon)`, or 1 where a norm is 0.

    The ratio is 1 where `||w||` is 0, so that a variable initialized to zero can learn, and where
    `rule_norm` is 0, whatever the decay.

    Args:
        weight_norm: scalar, `||w||`.
        rule_norm: scalar, the norm in the denominator that decides whether there is a signal at all:
            `||g||`, `||g + b w||` or `||v||`, by variant; for LAMB the norm of the whole step.
        trust_coefficient: eta of the paper.
        epsilon: added to the denominator.
        decay_norm: scalar, `b * ||w||` where the variant adds it to the denominator.

    Returns:
        A scalar of the dtype of the norms.

    Source: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), equation 6; the edge rules are those of the
    TPU and MLPerf implementations.
    """
    defined = ops.logical_and(weight_norm > 0, rule_norm > 0)
    denominator = ops.where(defined, rule_norm + decay_norm + epsilon, 1.0)
    return ops.where(defined, trust_coefficient * weight_norm / denominator, 1.0)
