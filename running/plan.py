"""Plan a run: its numbers before it starts, and warnings."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from flags.config import RunConfig
from lars_keras._keras_internals import inner_optimizer, learning_rate_of
from lars_keras.data import ImageData
from lars_keras.exclude import VariableRole
from lars_keras.lars import LARS
from lars_keras.layerwise import MAX_RAW_RATE, LayerwiseOptimizer, raw_rate_warning
from lars_keras.training.averages import long_averages
from lars_keras.training.trainer import Trainer
from running.errors import in_flags

RELATIVE_STEP_RANGE = (0.02, 0.51)
"""Smallest and largest peak `learning_rate * trust_coefficient / (1 - momentum)` of the published recipes.

This is how far one update moves a layer, relative to the norm of the layer. A rate ten times beyond either end is
probably meant for another optimizer: 0.01, a usual rate of SGD, gives 0.0001.
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run, before it starts.

    Attributes:
        rates: the learning rate of each update, float64 of shape `(updates,)`.
        warnings: settings that are allowed but rarely intended, a sentence each.
        text: the plan as printed before the first update.
    """

    rates: np.ndarray
    warnings: list[str]
    text: str


def make_plan(config: RunConfig, data: ImageData, trainer: Trainer, run_dir: Path, notes: Sequence[str]) -> Plan:
    """Work out the plan of a run; `notes` say how it was resumed."""
    rates = _rates(trainer.model.optimizer, config.total_updates(data.num_train))
    warnings = _warnings(config, trainer.model, data, rates)
    return Plan(rates, warnings, _text(config, data, trainer, rates, run_dir, warnings, notes))


def _rates(optimizer: keras.optimizers.Optimizer, updates: int) -> np.ndarray:
    schedule = learning_rate_of(inner_optimizer(optimizer))
    return np.asarray(keras.ops.convert_to_numpy(schedule(np.arange(updates))), np.float64)


def _relative_steps(config: RunConfig, rate: np.ndarray) -> np.ndarray:
    """Return how far a LARS update moves a layer, relative to its norm, once the momentum has built up."""
    return rate * config.trust_coefficient / (1.0 - config.momentum)


def _warnings(config: RunConfig, model: keras.Model, data: ImageData, rate: np.ndarray) -> list[str]:
    found = [*data.warnings]
    if config.optimizer == "lars":
        step = _relative_steps(config, rate).max()
        low, high = RELATIVE_STEP_RANGE
        if not low / 10 <= step <= high * 10:
            found.append(
                f"At its peak an update moves a layer by {step:.2g} of its norm; recipes that train move it by "
                f"{low:g} to {high:g}. Is --learning_rate={config.learning_rate:g} meant for another optimizer?"
            )
        if config.weight_decay and any(getattr(v, "regularizer", None) for v in model.trainable_variables):
            found.append(
                "The model has weight regularizers beside --weight_decay: both decay the weights, and the gradients of "
                "the regularizers enter the trust ratio."
            )
    optimizer = inner_optimizer(model.optimizer)
    if isinstance(optimizer, LayerwiseOptimizer):
        raw = raw_rate_warning(optimizer.layer_plan(), rate.max(), optimizer.excluded_lr_scale)
        found += [in_flags(raw)] if raw else []
    if config.optimizer in ("sgd", "momentum") and config.bias_lr_scale != 1.0:
        of_biases = rate.max() * config.bias_lr_scale
        roles = [VariableRole(v.path, tuple(v.shape), v.dtype, False, False) for v in model.trainable_variables]
        if of_biases > MAX_RAW_RATE and not any(role.normalizes for role in roles):
            found.append(
                f"--bias_lr_scale={config.bias_lr_scale:g} gives biases a learning rate of up to {of_biases:g}. "
                f"The network has no normalization, so they may diverge above {MAX_RAW_RATE:g}."
            )
    if config.optimizer != "lars" and config.learning_rate > 10:  # with momentum 9.6 trains: results/cifar10_fast.jsonl
        found.append(f"--learning_rate={config.learning_rate:g} is a rate for lars, not for {config.optimizer}.")
    if config.batch_size > data.num_train:
        found.append(f"--batch_size={config.batch_size} is more than the {data.num_train} training examples.")
    if len(rate) < 10:
        found.append(f"The run has only {len(rate)} updates.")
    found += long_averages(model, len(rate))
    return found


def _text(
    config: RunConfig,
    data: ImageData,
    trainer: Trainer,
    rate: np.ndarray,
    run_dir: Path,
    warnings: list[str],
    notes: Sequence[str],
) -> str:
    model, total = trainer.model, len(rate)
    per_epoch = data.num_train / config.batch_size
    peak = int(rate.argmax())
    scored = "validation" if config.validation_split else "test"
    optimizer = inner_optimizer(model.optimizer)
    rows = [
        ("data", f"{config.dataset}: {data.description}"),
        ("input", _input(trainer, data)),
        ("model", f"{config.model}, {model.count_params():,} parameters, {config.precision}"),
        (
            "batch",
            f"{config.batch_size} = {count(trainer.replicas, 'replica')} x "
            f"{count(trainer.accumulation_steps, 'micro-batch', 'es')} x "
            f"{trainer.microbatch_size} examples ({trainer.cluster.description})",
        ),
        ("length", f"{total:,} updates = {total / per_epoch:.4g} epochs of {per_epoch:.4g} updates"),
        ("optimizer", _optimizer(config)),
        *_step(config, optimizer, rate),
        (
            "schedule",
            f"{config.schedule}, warm-up {config.warmup_updates(data.num_train)} updates: {rate[0]:.4g} at update 1, "
            f"{rate[peak]:.4g} at {peak + 1}, {rate[-1]:.4g} at {total}",
        ),
        ("evaluation", f"every {count(config.eval_every, 'epoch')}, all {data.num_test:,} {scored} images once each"),
        ("results", f"{run_dir}/"),
        *(("resumed", note) for note in notes),
    ]
    lines = [f"  {name:<11}{value}" for name, value in rows]
    if isinstance(optimizer, LayerwiseOptimizer):
        lines += ["", *_layers(optimizer)]
    lines += [f"WARNING: {warning}" for warning in warnings]
    return "\n".join(lines)


def _input(trainer: Trainer, data: ImageData) -> str:
    # A replica has two ghost batches in the making and two ready, and on JAX one on its way to the device; two more are
    # behind them.
    batches = 5 if keras.backend.backend() == "jax" else 4
    ahead = (batches * trainer.replicas + 2) * trainer.microbatch_size
    size = ahead * math.prod(data.image_shape) / 1e6
    return f"augment: {data.augment}; {data.reading}; up to {ahead:,} images ahead ({size:,.0f} MB)"


def _optimizer(config: RunConfig) -> str:
    if config.optimizer != "lars":
        return f"{config.optimizer}, weight decay {config.weight_decay:g}"
    extras = [name for name in ("nesterov", "trust_clip") if getattr(config, name)]
    return (
        f"LARS ({', '.join([config.variant, *extras])}), momentum {config.momentum:g}, weight decay "
        f"{config.weight_decay:g}, trust coefficient {config.trust_coefficient:g}"
    )


def _step(config: RunConfig, optimizer: keras.optimizers.Optimizer, rate: np.ndarray) -> list[tuple[str, str]]:
    if not isinstance(optimizer, LARS):
        return []
    steps = _relative_steps(config, rate)
    return [
        ("step", f"an update moves a layer by up to {steps.max():.2g} of its norm, all updates by {steps.sum():.4g}")
    ]


def _layers(optimizer: LayerwiseOptimizer) -> list[str]:
    plan = optimizer.layer_plan()
    width = max(len(role.path) for role in plan)
    lines = [f"  {'variable':<{width}}  {'shape':<18} adapted  decayed  rate x"]
    for role in plan:
        shape = " x ".join(map(str, role.shape)) or "scalar"
        adapt, decay = ("yes" if flag else "-" for flag in (role.adapt, role.decay))
        lines.append(f"  {role.path:<{width}}  {shape:<18} {adapt:<7}  {decay:<7}  {role.lr_scale:g}")
    adapted = sum(math.prod(r.shape) for r in plan if r.adapt) / sum(math.prod(r.shape) for r in plan)
    lines.append(
        f"  adapted: {sum(r.adapt for r in plan)} of {len(plan)} variables, {100 * adapted:.2f} % of the weights"
    )
    return lines


def count(n: int, word: str, plural: str = "s") -> str:
    """Return a number with its word, such as "2 epochs"."""
    return f"{n:,} {word}{'' if n == 1 else plural}"
