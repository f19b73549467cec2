"""Log the noise scale of a run while it trains, and sum it up in words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from lars_keras.noise_scale import NoiseScale, NoiseScaleEstimator
from lars_keras.report.log import MetricsLog

if TYPE_CHECKING:
    from lars_keras.training.trainer import Trainer


class NoiseScaleLog(keras.callbacks.Callback):
    """Prints or logs the noise scale every few updates, from all updates since the last time.

    ```python
    trainer = Trainer(model, batch_size=512, microbatch_size=64, noise_scale=True)
    trainer.fit(dataset, epochs=1, callbacks=NoiseScaleLog(trainer))  # prints a sentence every 16 updates
    ```

    With `log`, it writes lines of `metrics.jsonl` instead. Each line has the estimate with its 95 % interval. For each
    variable, in the order of the layer plan, it also has the means over these updates that give the estimate: the mean
    square norm of the ghost-batch gradients, and the square norm of their mean. So lines can be combined. A number that
    is not finite is null:

        {"event": "noise_scale", "update": 40, "noise_scale": 2900.0, "low": 2400.0, "high": 3500.0, "epoch": 3.0,
         "updates": 20, "ghost_batch": 64, "batch_size": 1024, "ghost_square": [...], "mean_square": [...]}

    TensorBoard gets `noise_scale`, `low` and `high`. The first line after a restart covers the updates since then.

    Args:
        trainer: a `Trainer(noise_scale=True)`.
        log: the run's metrics log; None to print.
        update_freq: updates between two lines.

    Raises:
        ValueError: if `update_freq` is below 2; after the first update if the trainer measures no norms.
    """

    def __init__(self, trainer: "Trainer", log: MetricsLog | None = None, update_freq: int = 16):
        super().__init__()
        if update_freq < 2:
            raise ValueError(f"`update_freq` must be at least 2. Received: update_freq={update_freq}")
        self._trainer, self._log, self._update_freq = trainer, log, update_freq

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._estimator = self._empty()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        norms, finished = self._trainer.measures, batch + 1
        if "ghost_gradient" not in norms:
            raise ValueError("`NoiseScaleLog` needs the norms that `Trainer(noise_scale=True)` measures.")
        self._finished = finished
        for ghost, mean in zip(norms["ghost_gradient"], norms["gradient"], strict=True):
            if ghost.any():  # dynamic loss scaling measures nothing where it skips an update
                self._estimator.add(np.square(ghost, dtype=np.float64), np.square(mean, dtype=np.float64))
        due = finished // self._update_freq > (finished - len(norms["gradient"])) // self._update_freq
        if due and len(self._estimator) > 1:
            self._write(finished)
            self._estimator = self._empty()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        if self._log is None and len(self._estimator) > 1:  # a run may be shorter than `update_freq`
            self._write(self._finished)

    def _empty(self) -> NoiseScaleEstimator:
        return NoiseScaleEstimator(self._trainer.microbatch_size, self._trainer.batch_size)

    def _write(self, update: int) -> None:
        found, epoch = self._estimator.total(), update / self.params["steps_per_epoch"]
        if self._log is None:
            if self._trainer.cluster.is_chief:
                print(found.describe(self._trainer.batch_size, epoch), flush=True)
            return
        ghost, mean = self._estimator.means()
        values = {
            "epoch": epoch,
            "updates": len(self._estimator),
            "ghost_batch": self._trainer.microbatch_size,
            "batch_size": self._trainer.batch_size,
            "ghost_square": [float(f"{v:.9g}") for v in ghost],
            "mean_square": [float(f"{v:.9g}") for v in mean],
        }
        scalars = {"noise_scale": found.value, "low": found.low, "high": found.high}
        self._log.noise_scale(update, values, scalars)


def combine(events: Sequence[dict[str, Any]]) -> NoiseScaleEstimator:
    """Return the estimator over `noise_scale` lines of a log, where each line counts as one update.

    Raises:
        ValueError: if the lines have different batch sizes.
    """
    sizes = sorted({(e["ghost_batch"], e["batch_size"]) for e in events})
    if len(sizes) != 1:
        raise ValueError(f"The noise scale needs lines of one batch size. Received: (ghost batch, batch) in {sizes}")
    estimator = NoiseScaleEstimator(*sizes[0])
    for e in events:
        estimator.add(e["ghost_square"], e["mean_square"])
    return estimator


def summary(events: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the meaning of the newest lines in words, for the run and for its extreme layers.

    Args:
        events: `noise_scale` lines of a log, in order.
        layers: rows of the layer plan.
    """
    if not events:
        return []
    last = events[-1]
    # null is infinite
    value, low, high = (math.inf if last[name] is None else last[name] for name in ("noise_scale", "low", "high"))
    found = NoiseScale(value, low, high, math.nan, math.nan, last["updates"])
    lines = [found.describe(last["batch_size"], last["epoch"])]
    same = [e for e in events[-2:] if all(e[size] == last[size] for size in ("ghost_batch", "batch_size"))]
    if len(same) < 2 or not layers or not math.isfinite(high):  # only layer-wise optimizers have a plan
        return lines
    estimator = combine(same)
    adapted = [
        (scale.value, layer["path"])
        for scale, layer in zip(estimator.by_variable(), layers, strict=True)
        if layer["adapt"] and math.isfinite(scale.value)
    ]
    if len(adapted) > 1:
        (least, first), (most, final) = min(adapted), max(adapted)
        lines.append(
            f"{first} has the smallest noise scale, {least:,.0f}, and {final} the largest, {most:,.0f}, of the adapted "
            f"variables. Layers with a large noise scale tolerate a larger batch."
        )
    return lines
