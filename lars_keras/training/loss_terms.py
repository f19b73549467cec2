"""Check that the loss of a global batch follows from the losses of its ghost batches.

The loss of a global batch must be the mean over its ghost batches. A masked mean is a weighted mean: the weight of a
ghost batch is the number of entries that its mask leaves. A loss that is not a mean, such as Dice or a contrastive loss
over all pairs of a batch, has another value for the whole batch than its ghost batches give, and is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from lars_keras import _keras_internals as keras_internals
from lars_keras.training.inputs import TensorSpec
from lars_keras.training.overrides import is_overridden
from lars_keras.training.recording import RecordingScope

Tensor = Any

_OVER_THE_BATCH = (keras.losses.Dice, keras.losses.Tversky, keras.losses.Circle)
_TOLERANCE = {"bfloat16": 6e-2, "float16": 8e-3}  # eight spacings of numbers near 1; else 1e-3
_EXAMPLES, _CUTS = 8, (1, 3, 4)
_NO_TARGET, _MARKED = (-1, -100), 2


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """The terms of the loss of a built model.

    Attributes:
        masks: for each mean that the loss takes, True if a mask leaves entries out of it.
        layer_losses: number of losses that layers add, such as activity regularizers, but not weight regularizers.
        batch: a `TensorSpec` for each array of `(x, y, y_pred)`.
        weights: a `TensorSpec` for each array of sample weights, None without any.
    """

    masks: tuple[bool, ...]
    layer_losses: int
    batch: tuple[Any, Any, Any]
    weights: Any = None

    @property
    def masked(self) -> bool:
        """True if ghost batches count with their valid entries."""
        return any(self.masks)


def one_masked_mean(model: keras.Model, terms: LossTerms) -> bool:
    """Return True if a masked loss is nothing but one masked mean and a function of the weights."""
    return len(terms.masks) == 1 and not terms.layer_losses and not is_overridden(model, "compute_loss")


def valid_entries(masks: Sequence[Tensor | None]) -> Tensor:
    """Return the number of entries that the mask of a loss leaves, for each example; 1 without a mask."""
    if not masks or masks[0] is None:
        return ops.ones([], "float32")
    mask = ops.cast(masks[0], "float32")
    return ops.sum(mask) / ops.cast(ops.shape(mask)[0], "float32")


def check_terms(model: keras.Model, terms: LossTerms, ghost_batches: int) -> None:
    """Refuse a loss that does not follow from the losses of several ghost batches.

    Args:
        model: compiled and built.
        terms: terms of its loss.
        ghost_batches: number of ghost batches in a global batch.

    Raises:
        ValueError: for such a loss; the message names it.
    """
    if ghost_batches == 1:
        return
    remedy = "Train with one micro-batch on one device, `microbatch_size=batch_size`, or with `model.fit`."
    if terms.masked and not one_masked_mean(model, terms):
        raise ValueError(
            "A masked loss has to be weighted by the valid entries of each of the "
            f"{ghost_batches} ghost batches, and `Trainer` can do so for one masked mean alone. {remedy} Received: "
            f"a masked loss with {_parts(model, terms)}"
        )
    found = suspects(model)
    if found:
        found = _without_mean(model, terms, found)
    if terms.layer_losses and not found:
        found = _layers_without_mean(model, terms.batch)
    if found:
        raise ValueError(
            f"The loss of a batch is not the mean over its examples, so the {ghost_batches} ghost batches of a "
            f"global batch do not add up to it. {remedy} Received: {', '.join(found)}"
        )


def check_scored_terms(model: keras.Model, terms: LossTerms, batches: int) -> None:
    """Refuse masked losses of several batches that `lars_keras.training.scoring` cannot weight.

    Args:
        model: compiled and built.
        terms: terms of its loss.
        batches: number of batches so far, or of their parts on replicas.

    Raises:
        ValueError: if there are several.
    """
    if batches > 1 and terms.masked and (len(terms.masks) > 1 or is_overridden(model, "compute_loss")):
        raise ValueError(
            "A masked loss has to be weighted by the valid entries of each batch, and `Trainer` can do so for one "
            "masked mean alone. Score all data in one batch, or with `model.evaluate`. Received: a masked loss with "
            f"{_parts(model, terms)}"
        )


def _parts(model: keras.Model, terms: LossTerms) -> str:
    parts = [f"{len(terms.masks)} means over outputs"] * (len(terms.masks) > 1)
    parts += ["losses that layers add"] * bool(terms.layer_losses)
    parts += [f"{type(model).__name__}.compute_loss"] * is_overridden(model, "compute_loss")
    return ", ".join(parts)


def suspects(model: keras.Model) -> list[str]:
    """Return the names of the parts of the loss that may not be means over examples."""
    if is_overridden(model, "compute_loss"):
        return [f"{type(model).__name__}.compute_loss"]
    unknown = [loss.name for loss in keras_internals.compiled_losses(model) if not is_known_mean(loss)]
    return list(dict.fromkeys(unknown))


def is_known_mean(loss: Any) -> bool:
    """Return True for Keras's own losses, objects or functions, that are means over examples."""
    if isinstance(loss, _OVER_THE_BATCH):
        return False
    function = getattr(loss, "fn", loss)
    parts = [function] if function is loss and not isinstance(loss, keras.losses.Loss) else [type(loss), function]
    names = [getattr(p, "__name__", type(p).__name__) for p in parts]
    return all(p.__module__.startswith("keras.") for p in parts) and not {"dice", "tversky", "circle"} & set(names)


def _without_mean(model: keras.Model, terms: LossTerms, names: list[str]) -> list[str]:
    """Try the loss on synthetic targets, predictions and weights.

    Some of the targets are also replaced by numbers that often stand for a missing target.

    Args:
        model: compiled and built.
        terms: terms of its loss.
        names: the parts of the loss that may not be means.

    Returns:
        The names of the parts that are not; nothing if that is undecided. They are all names if no single part differs.
    """
    batch = terms.batch
    predictions = keras.tree.map_structure(lambda spec: dataclasses.replace(spec, dtype="float32"), batch[2])
    batch = batch[0], batch[1], predictions  # in half precision a mean would not be told from its like
    x, y, y_pred = made_up_batch(batch, _EXAMPLES)
    trackers = keras_internals.loss_trackers(model)
    no_weights = keras.tree.map_structure(lambda spec: None, terms.weights)
    _, _, weights = made_up_batch((None, None, terms.weights), _EXAMPLES)

    def loss_of(targets: Any, weights: Any = no_weights) -> Callable[[int, int], list[float] | None]:
        def loss(start: int, stop: int) -> list[float] | None:
            some_x, some_y, some_y_pred = part_of([x, targets, y_pred], batch, start, stop)
            _, _, weight = part_of([None, None, weights], (None, None, terms.weights), start, stop)
            zeros = [(v, ops.zeros(v.shape, v.dtype)) for m in trackers for v in m.variables]
            with keras_internals.losses_of_one_replica(), RecordingScope([*_values(model), *zeros]) as scope:
                value = keras_internals.compute_loss(model, some_x, some_y, some_y_pred, weight, training=True)
                parts = [float(m.result()) for m in trackers]
            return None if scope.random else [float(value), *parts]

        return loss

    try:
        found = [_differs(loss_of(y), 1e-3)]
        if terms.weights:
            found.append(_differs(loss_of(y, weights), 1e-3))
    except Exception as error:  # it asks for other data than these
        logging.warning("Whether the loss is a mean over examples cannot be tried: %s", error)
        return []
    for number in _NO_TARGET:
        marked = keras.tree.map_structure(lambda a, n=number: None if a is None else _with_first(a, n), y)
        with contextlib.suppress(Exception):  # it asks for other targets than these
            found.append(_differs(loss_of(marked), 1e-3))
    decided = [differs for differs in found if differs is not None]
    if not decided:
        return []
    whole, *parts = map(any, zip(*decided, strict=True))
    losses = keras_internals.compiled_losses(model)
    own = [loss.name for loss, differs in zip(losses, parts, strict=False) if differs and loss.name in names]
    return (list(dict.fromkeys(own)) or names) if whole else []


def _layers_without_mean(model: keras.Model, batch: tuple[Any, Any, Any]) -> list[str]:
    """Return the names of layers whose losses are not means over examples, found with synthetic inputs."""
    arrays = made_up_batch(batch, _EXAMPLES)
    names: list[str] = []

    def losses(start: int, stop: int) -> list[float] | None:
        x, _, _ = part_of(arrays, batch, start, stop)
        with RecordingScope(_values(model)) as scope:
            model(x, training=False)
            added = keras_internals.layer_losses(model)
        names[:] = [name for name, _ in added]
        return None if scope.random else [float(ops.sum(loss)) for _, loss in added]

    try:
        tolerances = [_TOLERANCE.get(layer.compute_dtype, 1e-3) for layer in keras_internals.layers_of(model)]
        found = _differs(losses, max(tolerances))
    except Exception as error:  # the model asks for other data than these
        logging.warning("Whether the losses that layers add are means over examples cannot be tried: %s", error)
        return []
    return [name for name, differs in zip(names, found or (), strict=False) if differs]


def _differs(losses: Callable[[int, int], list[float] | None], tolerance: float) -> list[bool] | None:
    """Return, for each loss, True if its value for some examples is not the mean of its values for two parts of them.

    Args:
        losses: takes the numbers of the first example and of the end, and returns the losses; None if they are random.
        tolerance: relative.

    Returns:
        None if the losses are random, or not finite.
    """
    whole = losses(0, _EXAMPLES)
    differs = [False] * len(whole or ())
    for cut in _CUTS:
        first, rest = losses(0, cut), losses(cut, _EXAMPLES)
        if whole is None or first is None or rest is None or not np.isfinite([whole, first, rest]).all():
            return None
        means = np.average([first, rest], axis=0, weights=[cut, _EXAMPLES - cut])
        scales = np.maximum(np.abs(whole), np.abs(means))
        triples = zip(whole, means, scales, strict=True)
        apart = [bool(abs(a - b) > tolerance * scale) for a, b, scale in triples]
        differs = [d or a for d, a in zip(differs, apart, strict=True)]
    return differs


def _values(model: keras.Model) -> list[tuple[keras.Variable, Tensor]]:
    return [(v, ops.convert_to_tensor(v)) for v in [*model.variables, *model.metrics_variables]]


def _with_first(targets: np.ndarray, number: int) -> np.ndarray:
    """Return the targets, with the targets of the first examples replaced by a number."""
    return np.concatenate([np.full_like(targets[:_MARKED], number), targets[_MARKED:]])


def made_up_batch(batch: tuple[Any, Any, Any], examples: int) -> list[Any]:
    """Return arrays for the `TensorSpec`s of `(x, y, y_pred)`: targets of 0 and 1, other numbers between them."""
    rng = np.random.default_rng(0)

    def made_up(spec: TensorSpec | None, target: bool) -> np.ndarray | None:
        if spec is None:
            return None
        shape = [examples, *(size or 2 for size in spec.shape[1:])]
        if target or not keras.backend.is_float_dtype(spec.dtype):
            return rng.integers(0, 2, shape)
        return rng.uniform(0.1, 0.9, shape)

    return [keras.tree.map_structure(lambda s, y=i == 1: made_up(s, y), part) for i, part in enumerate(batch)]


def part_of(arrays: list[Any], batch: tuple[Any, Any, Any], start: int, stop: int) -> Any:
    """Return some examples of `made_up_batch` as tensors."""

    def tensor(a: np.ndarray | None, spec: TensorSpec | None) -> Tensor | None:
        return None if a is None or spec is None else ops.convert_to_tensor(a[start:stop], spec.dtype)

    return keras.tree.map_structure(tensor, arrays, list(batch))
