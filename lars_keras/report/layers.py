"""Telemetry of the layers: what LARS and LAMB do to each variable, logged and summarized in words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from lars_keras.layerwise import MEASURES
from lars_keras.report.log import MetricsLog

if TYPE_CHECKING:
    from lars_keras.training.trainer import Trainer

RECENT = 10  # lines of the log that a median is taken over
CHANGE = 100.0  # factor of a weight norm since the first line that counts as collapse or explosion
SMALL = 0.1  # root mean square of a variable that growth is counted from: a variable may start at zero


class LayerTelemetry(keras.callbacks.Callback):
    """Logs the norms, trust ratio and effective rate of every trainable variable, every few updates.

    A line of `metrics.jsonl` has one list for each of `lars_keras.layerwise.MEASURES`. The lists follow the order of
    the layer plan and have six significant digits. A number that is not finite is null:

        {"event": "layers", "update": 20, "weight_norm": [...], "gradient_norm": [...], "ratio": [...], "rate": [...]}

    TensorBoard gets the same numbers as scalars `layers/ratio/<path>` and so on.

    Args:
        trainer: a `Trainer(trust_ratios=True)` whose model has the optimizer `LARS` or `LAMB`.
        log: the run's metrics log.
        update_freq: updates between two lines.

    Raises:
        ValueError: if `update_freq` is below 1.
    """

    def __init__(self, trainer: "Trainer", log: MetricsLog, update_freq: int):
        super().__init__()
        if update_freq < 1:
            raise ValueError(f"`update_freq` must be at least 1. Received: update_freq={update_freq}")
        self._trainer, self._log, self._update_freq = trainer, log, update_freq

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        measured = [self._trainer.measures[name] for name in MEASURES]
        paths = [v.path for v in self._trainer.model.trainable_variables]
        first = batch + 2 - len(measured[0])
        for update, values in enumerate(np.stack(measured, axis=1), first):
            skipped = not values[0].any()  # by dynamic loss scaling
            if update % self._update_freq == 0 and not skipped:
                self._log.layers(update, paths, dict(zip(MEASURES, values, strict=True)))


def as_array(events: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return one measure of `layers` events, float64 of shape `(events, variables)`, with NaN for null."""
    return np.array([e[name] for e in events], dtype=float)


def health(events: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> list[str]:
    """Describe the state of the layers in sentences.

    Args:
        events: `layers` events of a log, in order.
        layers: rows of the layer plan.

    Returns:
        One sentence for the layer with the smallest trust ratio, and one for each layer that has collapsed, has
        exploded or gets no gradient. The list is empty without events or layers.
    """
    if not events or not layers:
        return []
    paths, adapted = [layer["path"] for layer in layers], np.array([layer["adapt"] for layer in layers])
    weight, gradient, ratio = (as_array(events, name) for name in MEASURES[:3])
    recent = f"the last {min(len(events), RECENT)} records"
    found = []
    if adapted.any():
        typical = np.array([_median(r) for r in ratio[-RECENT:].T])
        typical[~adapted] = np.nan
        if np.isfinite(typical).any():
            i = int(np.nanargmin(typical))
            found.append(
                f"{paths[i]} has the smallest trust ratio, {typical[i]:.2g}, against {_median(typical):.2g} for the "
                f"median layer (over {recent}). Without layer-wise scaling it would limit the learning rate."
            )
    wrong = []
    for i, path in enumerate(paths):
        first, last = weight[0, i], weight[-1, i]
        grown_from = max(first, SMALL * math.sqrt(math.prod(layers[i]["shape"])))
        if not (math.isfinite(last) and np.isfinite(gradient[-1, i])):
            wrong.append(f"{path} has exploded: its norm, or that of its gradient, is not finite.")
        elif last > CHANGE * grown_from:
            wrong.append(f"{path} has exploded: its norm was {first:.3g} at the start, and is {last:.3g}.")
        elif first > 0 and last < first / CHANGE:
            wrong.append(f"{path} has collapsed: its norm is {last / first:.2g} of that at the start.")
        elif (gradient[-RECENT:, i] == 0).all():
            wrong.append(f"{path} gets no gradient (over {recent}).")
    if not wrong:
        started = adapted & (weight[0] > 0)
        grown = weight[-1, started] / weight[0, started]
        span = (
            f": adapted norms are {grown.min():.2g} to {grown.max():.2g} times those at the start"
            if any(started)
            else ""
        )
        wrong = [f"No layer has collapsed or exploded{span}."]
    return found + wrong


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
