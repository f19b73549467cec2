"""Optimizers and schedules by name, and the flags that each of them has."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from lars_keras.exclude import DEFAULT_EXCLUDE, check_patterns, match_patterns
from lars_keras.lamb import LAMB
from lars_keras.lars import LARS
from lars_keras.schedules import WarmupCosine, WarmupExponential, WarmupPolynomial, WarmupStep
from lars_keras.sgd import SGD

_OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "lars": LARS,
    "lamb": LAMB,
    "sgd": SGD,
    "momentum": functools.partial(SGD, momentum=0.9),
    "adam": keras.optimizers.Adam,
}
OPTIMIZERS = tuple(_OPTIMIZERS)
_SCHEDULES: dict[str, Callable[..., keras.optimizers.schedules.LearningRateSchedule]] = {
    "polynomial": WarmupPolynomial,
    "cosine": WarmupCosine,
    "exponential": WarmupExponential,
}
SCHEDULES = (*_SCHEDULES, "step")

# For each flag the optimizers that have it, and its argument there. Flags that are not listed are for all of them.
OPTIMIZER_FLAGS: dict[str, dict[str, str]] = {
    "momentum": {"lars": "momentum", "momentum": "momentum", "lamb": "beta_1", "adam": "beta_1"},
    "nesterov": {"lars": "nesterov", "momentum": "nesterov"},
    "beta_2": {"lamb": "beta_2", "adam": "beta_2"},
    "adam_epsilon": {"lamb": "epsilon", "adam": "epsilon"},
    "bias_correction": {"lamb": "bias_correction"},
    "trust_coefficient": {"lars": "trust_coefficient"},
    "trust_epsilon": {"lars": "epsilon"},
    "variant": {"lars": "variant"},
    "trust_clip": {"lars": "trust_clip", "lamb": "trust_clip"},
    # Not for LAMB: variables that it does not adapt take Adam's step, which needs no other rate.
    "excluded_lr_scale": {"lars": "excluded_lr_scale"},
    # A flag of its own, so that a recipe of lars does not set it.
    "bias_lr_scale": {"sgd": "excluded_lr_scale", "momentum": "excluded_lr_scale"},
}
# The same for schedules.
SCHEDULE_FLAGS: dict[str, dict[str, str]] = {
    "power": {"polynomial": "power"},
    "end_learning_rate": {"polynomial": "end", "cosine": "end", "exponential": "end"},
    "end_lr_scale": {"polynomial": "end_scale", "cosine": "end_scale", "exponential": "end_scale"},
}


def applies(flag: str, optimizer: str, schedule: str) -> bool:
    """Return whether a flag has a meaning for an optimizer and a schedule."""
    return optimizer in OPTIMIZER_FLAGS.get(flag, OPTIMIZERS) and schedule in SCHEDULE_FLAGS.get(flag, SCHEDULES)


def make_schedule(
    name: str, *, peak: float, warmup_updates: int, total_updates: int, **options: float
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Make a warm-up followed by the decay called `name`.

    Args:
        name: one of `SCHEDULES`. `"step"` multiplies by 0.1 at 1/3, 2/3 and 8/9 of the run: epochs 30, 60 and 80 of 90
            in Goyal et al. 2017 (arXiv 1706.02677).
        peak: highest rate.
        warmup_updates: length of the warm-up.
        total_updates: length of the run.
        **options: `start`, the rate from which the warm-up rises; `end`, the last rate, for all but `"step"`; `power`,
            the exponent, for `"polynomial"`.

    Raises:
        ValueError: if the name is unknown, or the warm-up is as long as the run.
    """
    if name in _SCHEDULES:
        return _SCHEDULES[name](peak, warmup_updates, total_updates, **options)
    if name == "step":
        drops = sorted({round(total_updates * part) for part in (1 / 3, 2 / 3, 8 / 9)})
        return WarmupStep(peak, warmup_updates, [d for d in drops if d >= warmup_updates], **options)
    raise ValueError(f"`schedule` must be one of {SCHEDULES}. Received: schedule={name!r}")


def make_optimizer(
    name: str,
    learning_rate: Any,
    variables: Sequence[keras.Variable],
    *,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    weight_decay: float = 0.0,
    **arguments: Any,
) -> keras.optimizers.Optimizer:
    """Make the optimizer called `name`, and build it for `variables`.

    Args:
        name: one of `OPTIMIZERS`.
        learning_rate: a number or a schedule.
        variables: the model's trainable variables.
        exclude: patterns of variables that are neither adapted nor decayed; sgd and momentum multiply their rate.
        weight_decay: inside the rule of LARS and LAMB. Keras's optimizers apply it decoupled:
            `w -= learning_rate * weight_decay * w`.
        **arguments: further arguments of the optimizer's class.

    Raises:
        ValueError: if the name is unknown, or a pattern matches no variable.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {OPTIMIZERS}. Received: optimizer={name!r}")
    make = _OPTIMIZERS[name]
    # Keras would multiply every weight by 1 for a decay of 0.
    decay = weight_decay if name in ("lars", "lamb") else weight_decay or None
    if name == "adam":
        optimizer = make(learning_rate, weight_decay=decay, **arguments)
        if decay:
            _exclude_from_weight_decay(optimizer, variables, exclude)
    else:
        optimizer = make(learning_rate, weight_decay=decay, exclude=exclude, **arguments)
    with warnings.catch_warnings():  # `running.plan` has this one, in terms of flags
        warnings.filterwarnings("ignore", "Variables that are not adapted")
        optimizer.build(variables)
    return optimizer


def _exclude_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable], exclude: Sequence[str]
) -> None:
    """Exclude from Keras's decay the variables that LARS would not decay."""
    matches, _ = match_patterns(variables, check_patterns("exclude", exclude) or ())
    kept = [v for i, v in enumerate(variables) if any(i in indices for indices in matches.values())]
    if kept:
        optimizer.exclude_from_weight_decay(var_list=kept)
