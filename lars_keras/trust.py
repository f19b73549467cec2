"""The trust ratio: one pure function, its edge rules stated once, and the norms it is made of."""

from typing import Any

import keras
from keras import ops

from lars_keras import program

Tensor = Any  # a tensor of whichever backend Keras runs

ROWS, LANES = 32, 8


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm over all elements of `x`, a scalar of the dtype of `x`.

    Callers pass float32 (or float64): in float16 the squares overflow above 256 and vanish below 2e-4.
    """
    return ops.sqrt(_sum_of_squares(x))


def _sum_of_squares(x: Tensor, rows: int = ROWS) -> Tensor:
    """In one pass over `x`, without a copy of its squares.

    XLA may not reassociate a sum of floats. TensorFlow's, on a CPU, then either stores all squares or adds them one by
    one, five times slower than memory. But it unrolls a short sum along a middle axis and runs over the last one in
    vector registers. So `rows` neighbouring vectors of `LANES` are added first, and those sums, of the `rows`-th part
    of the size, after that. It is also the more exact order. Other compilers do as much by themselves.
    """
    if keras.backend.backend() != "tensorflow" or program.has_accelerator():
        return ops.sum(ops.square(x))
    x = ops.reshape(x, (-1,))
    size = x.shape[0]
    head = size - size % (rows * LANES)
    total = ops.sum(ops.square(x[head:]))
    if not head:
        return total
    partial = ops.sum(ops.square(ops.reshape(x[:head], (-1, rows, LANES))), axis=1)
    return ops.sum(ops.abs(partial)) + total  # abs, which changes nothing, keeps XLA from merging the two sums


def trust_ratio(
    weight_norm: Tensor,
    rule_norm: Tensor,
    trust_coefficient: float = 1.0,
    epsilon: float = 0.0,
    decay_norm: Tensor | float = 0.0,
) -> Tensor:
    """`trust_coefficient * ||w|| / (rule_norm + decay_norm + epsilon)`, and 1 where a norm is 0.

    The ratio is 1 where `||w||` is 0, so that a variable initialised to zero can learn, and where
    `rule_norm` is 0, whatever the decay.

    Args:
        weight_norm: scalar, `||w||`.
        rule_norm: scalar, the norm in the denominator that decides whether there is a signal at all:
            `||g||`, `||g + b w||` or `||v||`, by variant; that of the whole step for LAMB.
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
