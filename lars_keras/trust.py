"""The trust ratio: one pure function, its edge rules stated once."""

from typing import Any

from keras import ops

Tensor = Any  # a tensor of whichever backend Keras runs


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm over all elements of `x`, a scalar of the dtype of `x`.

    Callers pass float32 (or float64): in float16 the squares overflow above 256 and vanish below 2e-4.
    """
    return ops.sqrt(ops.sum(ops.square(x)))


def trust_ratio(
    weight_norm: Tensor,
    rule_norm: Tensor,
    trust_coefficient: float,
    epsilon: float,
    decay_norm: Tensor | float = 0.0,
) -> Tensor:
    """`trust_coefficient * ||w|| / (rule_norm + decay_norm + epsilon)`, and 1 where a norm is 0.

    The ratio is 1 where `||w||` is 0, so that a variable initialised to zero can learn, and where
    `rule_norm` is 0, whatever the decay.

    Args:
        weight_norm: scalar, `||w||`.
        rule_norm: scalar, the norm in the denominator that decides whether there is a signal at all:
            `||g||`, `||g + b w||` or `||v||`, by variant.
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
