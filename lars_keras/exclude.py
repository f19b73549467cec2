"""Which variables are adapted and which are decayed: regular expressions, resolved once per model."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras

RANK_LE_1 = "rank<=1"

DEFAULT_EXCLUDE: tuple[str, ...] = (
    RANK_LE_1,  # biases and scales, whatever they are called
    r"(^|/)(bias|beta|gamma|alpha)$",  # the same, and PReLU's slopes, where they have more axes
    r"norm(alization)?(_\d+)?/[^/]+$",  # a variable that a normalisation layer owns itself
)
"""Bias and normalisation variables.

Each entry is a regular expression searched in `keras.Variable.path`; the entry `"rank<=1"` is not a
regular expression but matches every variable with at most one axis: names alone miss `my_norm/scale`.
"""


@dataclasses.dataclass(frozen=True)
class VariableRole:
    """What the optimizer does with one variable: a row of `layer_plan()`.

    Attributes:
        path: `keras.Variable.path`.
        shape: shape of the variable.
        dtype: in which it and its slots are stored.
        adapt: whether the trust ratio scales its step.
        decay: whether weight decay acts on it.
        lr_scale: factor on the global learning rate; 1 where `adapt` is true.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    adapt: bool
    decay: bool
    lr_scale: float


def check_patterns(argument: str, patterns: Iterable[str] | None) -> tuple[str, ...] | None:
    """Returns `patterns` as a tuple of valid regular expressions, or None.

    Raises:
        ValueError: for a lone string, an entry that is no string, or an invalid regular expression.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(
            f"`{argument}` must be a list or tuple of regular expressions. Received: {argument}={patterns!r}"
        )
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"`{argument}` must hold strings only. Received: {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"`{argument}` holds an invalid regular expression ({e}). Received: {pattern!r}") from e
    return patterns


def resolve_roles(
    variables: Sequence[Any],
    *,
    exclude: tuple[str, ...],
    exclude_from_layer_adaptation: tuple[str, ...] | None,
    exclude_from_weight_decay: tuple[str, ...] | None,
    excluded_lr_scale: float,
) -> list[VariableRole]:
    """One role per variable, in the order of `variables`.

    Roles are resolved when the optimizer is built, because later, under `tf.distribute`, an update sees backend
    variables that have no path.

    Raises:
        ValueError: if a pattern that is not one of `DEFAULT_EXCLUDE` matches no variable.
    """
    no_adapt = exclude if exclude_from_layer_adaptation is None else exclude_from_layer_adaptation
    no_decay = exclude if exclude_from_weight_decay is None else exclude_from_weight_decay
    paths = [getattr(v, "path", v.name) for v in variables]
    for pattern in dict.fromkeys(no_adapt + no_decay):
        if pattern in DEFAULT_EXCLUDE:
            continue
        if not any(_matches(pattern, p, v) for p, v in zip(paths, variables, strict=True)):
            raise ValueError(
                f"The exclusion pattern {pattern!r} matches none of the {len(paths)} trainable variables: "
                f"{', '.join(paths[:20])}{', ...' if len(paths) > 20 else ''}"
            )
    roles = []
    for path, variable in zip(paths, variables, strict=True):
        adapt = not any(_matches(p, path, variable) for p in no_adapt)
        decay = not any(_matches(p, path, variable) for p in no_decay)
        scale = 1.0 if adapt else excluded_lr_scale
        dtype = keras.backend.standardize_dtype(variable.dtype)
        roles.append(VariableRole(path, tuple(variable.shape), dtype, adapt, decay, scale))
    return roles


def _matches(pattern: str, path: str, variable: Any) -> bool:
    if pattern == RANK_LE_1:
        return len(variable.shape) <= 1
    return re.search(pattern, path) is not None
