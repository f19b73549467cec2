"""Select the variables that are adapted and decayed, by regular expressions, once per model."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

RANK_LE_1 = "rank<=1"

DEFAULT_EXCLUDE: tuple[str, ...] = (
    RANK_LE_1,  # biases and scales, whatever they are called
    r"(^|/)(bias|beta|gamma|alpha|scale|offset)$",  # the same, where they have more axes
)
"""Biases, the scales and offsets of normalization layers, and the slopes of PReLU.

Each entry is a regular expression searched in `keras.Variable.path`. The entry `"rank<=1"` is not a regular
expression: it matches every variable with at most one axis, so that `my_norm/weight` is found as well. The name of a
layer decides nothing: the kernel of a `Dense` layer called `prenorm` is adapted.
"""

# Defaults of optimizers that were saved before; they may match nothing, too.
_FORMER_DEFAULTS = (r"(^|/)(bias|beta|gamma|alpha)$", r"norm(alization)?(_\d+)?/[^/]+$")

# A variable of a normalization layer, by its own name or the name of its layer.
_NORMALIZATION = re.compile(r"(^|/)(beta|gamma|scale)$|norm[^/]*/[^/]+$", re.IGNORECASE)

Matches = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VariableRole:
    """Describes the role of one variable in the optimizer: a row of `layer_plan()`.

    Attributes:
        path: `keras.Variable.path`.
        shape: shape of the variable.
        dtype: dtype in which the variable and its slots are stored.
        adapt: whether the trust ratio scales its step.
        decay: whether weight decay acts on it.
        lr_scale: factor on the global learning rate; 1 where `adapt` is true.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    adapt: bool
    decay: bool
    lr_scale: float = 1.0

    @property
    def normalizes(self) -> bool:
        """Return whether the path of a variable says that it is a scale or an offset of a normalization layer."""
        return not self.adapt and _NORMALIZATION.search(self.path) is not None


def check_patterns(argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return `patterns` as a tuple of valid regular expressions.

    Raises:
        ValueError: for None or a lone string, an entry that is not a string, or an invalid regular expression.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(
            f"`{argument}` must be a list or tuple of regular expressions, () for none. "
            f"Received: {argument}={patterns!r}"
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
    matches: dict[str, list[int]],
    *,
    exclude: tuple[str, ...],
    exclude_from_layer_adaptation: tuple[str, ...] | None,
    exclude_from_weight_decay: tuple[str, ...] | None,
) -> list[VariableRole]:
    """Return one role per variable, in the order of `variables`.

    Roles are resolved when the optimizer is built, because later, under `tf.distribute`, an update sees backend
    variables that have no path.

    Args:
        variables: trainable variables of the model.
        matches: "patterns" of `match_patterns`, for the patterns of all three arguments.
        exclude: patterns; see `LARS`.
        exclude_from_layer_adaptation: patterns; None to use `exclude`.
        exclude_from_weight_decay: patterns; None to use `exclude`.
    """
    no_adapt = exclude if exclude_from_layer_adaptation is None else exclude_from_layer_adaptation
    no_decay = exclude if exclude_from_weight_decay is None else exclude_from_weight_decay
    roles = []
    for i, variable in enumerate(variables):
        adapt = not any(i in matches[p] for p in no_adapt)
        decay = not any(i in matches[p] for p in no_decay)
        dtype = keras.backend.standardize_dtype(variable.dtype)
        roles.append(VariableRole(_path(variable), tuple(variable.shape), dtype, adapt, decay))
    return roles


def match_patterns(
    variables: Sequence[Any], patterns: Sequence[str], saved: Matches | None = None
) -> tuple[dict[str, list[int]], Matches | None]:
    """Find the variables that each pattern matches.

    Args:
        variables: trainable variables of a model.
        patterns: regular expressions, and `"rank<=1"`.
        saved: the result for the model before it was saved. A loaded model may have other paths: Keras leaves out the
            name of a `Sequential`, and numbers layers anew. A pattern matches the variables that it matched before: by
            path if all are known, else by position if all names and shapes are the same.

    Returns:
        The positions that each pattern matches. And what to save of it, values for JSON: "variables" has the path and
        shape of each variable, "patterns" the positions; None if all patterns are defaults.

    Raises:
        ValueError: if a pattern that is neither saved nor one of `DEFAULT_EXCLUDE` matches no variable. The layers of a
            saved pattern may be frozen by now, so it only warns.
    """
    paths = [_path(v) for v in variables]
    layout = [[path, list(v.shape)] for path, v in zip(paths, variables, strict=True)]
    known = {}
    if saved:
        before = {path: i for i, (path, _) in enumerate(saved["variables"])}
        if set(paths) <= before.keys() and len(before) == len(saved["variables"]):
            places = [before[path] for path in paths]
            known = {p: [i for i, place in enumerate(places) if place in old] for p, old in saved["patterns"].items()}
        elif _names(saved["variables"]) == _names(layout):
            known, layout = saved["patterns"], saved["variables"]
    matches = {}
    for pattern in dict.fromkeys(patterns):
        found = [i for i, v in enumerate(variables) if _matches(pattern, paths[i], v)]
        matches[pattern] = known.get(pattern, found)
        if not matches[pattern] and pattern not in DEFAULT_EXCLUDE + _FORMER_DEFAULTS:
            message = (
                f"The exclusion pattern {pattern!r} matches none of the {len(paths)} trainable variables: "
                f"{', '.join(paths[:20])}{', ...' if len(paths) > 20 else ''}"
            )
            if saved is None or pattern not in saved["patterns"]:
                raise ValueError(message)
            warnings.warn(f"{message}. It matched some when the optimizer was first built", stacklevel=3)
    given = {pattern: found for pattern, found in matches.items() if pattern not in DEFAULT_EXCLUDE}
    return matches, {"variables": layout, "patterns": given} if given else None


def plain(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists, without the trackers in which Keras and TensorFlow wrap them."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _path(variable: Any) -> str:
    if hasattr(variable, "path"):
        return variable.path
    return variable.name.partition(":")[0]  # a `tf.Variable` is called `kernel:0`


def _names(layout: list[list[Any]]) -> list[list[Any]]:
    return [[path.rpartition("/")[2], shape] for path, shape in layout]


def _matches(pattern: str, path: str, variable: Any) -> bool:
    if pattern == RANK_LE_1:
        return len(variable.shape) <= 1
    return re.search(pattern, path) is not None
