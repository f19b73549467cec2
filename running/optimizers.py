"""Optimizers and schedules by name, as scripts choose them."""

from collections.abc import Sequence
from typing import Any

import keras

from lars_keras.exclude import DEFAULT_EXCLUDE, check_patterns, resolve_roles
from lars_keras.lamb import LAMB
from lars_keras.lars import LARS
from lars_keras.layerwise import LayerwiseOptimizer
from lars_keras.schedules import WarmupCosine, WarmupExponential, WarmupPolynomial, WarmupStep

OPTIMIZERS = ("lars", "lamb", "sgd", "momentum", "adam")
SCHEDULES = ("polynomial", "cosine", "exponential", "step")


def make_schedule(
    name: str, *, peak: float, warmup_updates: int, total_updates: int, power: float = 2.0, end: float = 0.0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """A warm-up from 0 followed by the decay called `name`.

    Args:
        name: one of `SCHEDULES`. `"step"` multiplies by 0.1 at 1/3, 2/3 and 8/9 of the run: epochs 30, 60 and 80 of the
            90 of Goyal et al. 2017 (arXiv 1706.02677).
        peak: highest rate.
        warmup_updates: length of the warm-up.
        total_updates: length of the run.
        power: exponent, for `"polynomial"`.
        end: last rate, but for `"step"`; above 0 for `"exponential"`.

    Raises:
        ValueError: for an unknown name, or a warm-up as long as the run.
    """
    if name == "polynomial":
        return WarmupPolynomial(peak, warmup_updates, total_updates, power=power, end=end)
    if name == "cosine":
        return WarmupCosine(peak, warmup_updates, total_updates, end=end)
    if name == "exponential":
        return WarmupExponential(peak, warmup_updates, total_updates, end=end)
    if name == "step":
        drops = sorted({round(total_updates * share) for share in (1 / 3, 2 / 3, 8 / 9)})
        return WarmupStep(peak, warmup_updates, [d for d in drops if d >= warmup_updates])
    raise ValueError(f"The schedule must be one of {SCHEDULES}. Received: {name!r}")


def make_optimizer(
    name: str, learning_rate: Any, variables: Sequence[keras.Variable], **options: Any
) -> keras.optimizers.Optimizer:
    """The optimizer called `name`, built for `variables`.

    Args:
        name: one of `OPTIMIZERS`.
        learning_rate: a number or a schedule.
        variables: the model's trainable variables.
        **options: any of `momentum`, `nesterov`, `weight_decay`, `global_clipnorm`, `use_ema`, `ema_momentum`,
            `exclude` and the further arguments of `LARS`; an optimizer takes those that it has. `momentum` is `beta_1`
            of `LAMB` and Adam. Keras's optimizers apply `weight_decay` decoupled (`w -= lr * weight_decay * w`), and
            not to the variables that `exclude` matches.

    Raises:
        ValueError: for an unknown name, or a pattern that matches nothing.
    """
    optimizer = _make(name, learning_rate, options)
    if not isinstance(optimizer, LayerwiseOptimizer) and optimizer.weight_decay:
        roles = resolve_roles(
            variables,
            exclude=check_patterns("exclude", options.get("exclude", DEFAULT_EXCLUDE)) or (),
            exclude_from_layer_adaptation=None,
            exclude_from_weight_decay=None,
            excluded_lr_scale=1.0,
        )
        kept = [v for v, role in zip(variables, roles, strict=True) if not role.decay]
        if kept:
            optimizer.exclude_from_weight_decay(var_list=kept)
    optimizer.build(variables)
    return optimizer


def _make(name: str, learning_rate: Any, options: dict[str, Any]) -> keras.optimizers.Optimizer:
    if name == "lars":
        return LARS(learning_rate, **options)
    names = ("weight_decay", "global_clipnorm", "use_ema", "ema_momentum")
    shared = {name: options[name] for name in names if options.get(name) is not None}
    if not shared.get("weight_decay"):
        shared.pop("weight_decay", None)  # Keras would multiply every weight by 1
    momentum = options.get("momentum", 0.9)
    if name == "sgd":
        return keras.optimizers.SGD(learning_rate, **shared)
    if name == "momentum":
        nesterov = options.get("nesterov", False)
        return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=nesterov, **shared)
    if name == "adam":
        return keras.optimizers.Adam(learning_rate, beta_1=momentum, **shared)
    if name == "lamb":
        # Not `excluded_lr_scale`: what LAMB does not adapt takes Adam's step, which needs no other rate.
        own = {name: options[name] for name in ("exclude", "trust_clip") if name in options}
        return LAMB(learning_rate, beta_1=momentum, **({"weight_decay": 0.0} | shared), **own)
    raise ValueError(f"The optimizer must be one of {OPTIMIZERS}. Received: {name!r}")
