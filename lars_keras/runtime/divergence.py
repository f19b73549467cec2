"""Stop a run that no later update can repair."""

import collections
import math
import statistics
from typing import TYPE_CHECKING

import keras
import numpy as np

from lars_keras.checks import check_count, check_number
from lars_keras.runtime.errors import Diverged

if TYPE_CHECKING:
    from lars_keras.training.trainer import Trainer

HARMLESS_LOSS = 10.0  # the loss of a uniform guess over 22,000 classes
HARMLESS_WEIGHT = 0.01  # of the global weight norm; a bias that starts at 0 may grow by any factor


class DivergenceGuard(keras.callbacks.Callback):
    """Raises `Diverged` after an update that is not finite or explodes. The message names the update and the layer.

    The guard watches the loss. With `Trainer(variable_norms=True)` it also watches the norms of gradients and weights.

    - A loss explodes when it exceeds `explosion_factor` times its median over the last `window` updates, and 10.
    - The global gradient norm explodes when it exceeds the same multiple of its own median, and the global weight norm.
    - A weight explodes when one update multiplies its norm by more than `explosion_factor`, to more than a hundredth of
      the global weight norm.

    The guard works in any `fit`: `model.fit(..., callbacks=[DivergenceGuard()])` watches the loss. Keras reports the
    mean over the epoch so far. The guard computes from it the loss since the previous call.

    Args:
        trainer: source of the loss of every update and of the norms. None uses the logs alone.
        explosion_factor: factor above which a value counts as exploding.
        window: number of updates in the median. No value explodes before that many updates.

    Raises:
        ValueError: if `explosion_factor` is not above 1, or `window` is not at least 1.
    """

    def __init__(self, trainer: "Trainer | None" = None, *, explosion_factor: float = 100.0, window: int = 20):
        super().__init__()
        self._factor = check_number("explosion_factor", explosion_factor, above=1.0)
        self._trainer, self._window = trainer, check_count("window", window, at_least=1)

    @property
    def memory(self) -> dict[str, list[float]]:
        """The recent values, from which the medians come; a `Trainer` saves and restores them with its position."""
        return {name: list(values) for name, values in self._recent.items()}

    @memory.setter
    def memory(self, values: dict[str, list[float]]) -> None:
        for name, recent in self._recent.items():
            recent.extend(values[name])

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._recent = {name: collections.deque[float](maxlen=self._window) for name in ("loss", "gradient norm")}
        self._weights: np.ndarray | None = None
        self._epoch_start, self._batches, self._total = 0, 0, 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._epoch_start += self._batches
        self._batches, self._total = 0, 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._trainer and "gradient" in self._trainer.measures:
            norms = self._trainer.measures
            first = batch + 2 - len(norms["gradient"])
            for update, (gradients, weights) in enumerate(zip(norms["gradient"], norms["weight"], strict=True), first):
                self._check_layers(update, gradients, weights)
        logs, last = logs or {}, batch + 1
        if self._trainer:
            losses = self._trainer.step_losses
        elif "step_loss" in logs:
            losses = [logs["step_loss"]]
        else:  # Keras counts batches from the start of the epoch
            losses, last = [self._newest_loss(batch, logs.get("loss", 0.0))], self._epoch_start + last
        for update, loss in enumerate(losses, last + 1 - len(losses)):
            self._check_value(update, "loss", loss, harmless=HARMLESS_LOSS)

    def _newest_loss(self, batch: int, mean: float) -> float:
        """Return the mean loss since the previous call, from the mean since the epoch began."""
        before, self._total = self._total, mean * (batch + 1)
        new, self._batches = batch + 1 - self._batches, batch + 1
        return (self._total - before) / new

    def _check_layers(self, update: int, gradients: np.ndarray, weights: np.ndarray) -> None:
        """Check one update's norms, each of shape `(variables,)`."""
        for kind, norms in (("gradient", gradients), ("value", weights)):
            bad = ~np.isfinite(norms)
            if bad.any():
                others = f", and of {bad.sum() - 1} variables after it," if bad.sum() > 1 else ""
                path = self._path(int(bad.argmax()))
                raise Diverged(f"The {kind} of {path}{others} is not finite in update {update}.", update)
        global_norm = float(np.linalg.norm(weights.astype(np.float64)))  # a square may be above float32
        if self._weights is not None:
            grown = (weights > self._factor * self._weights) & (self._weights > 0)
            grown &= weights > HARMLESS_WEIGHT * global_norm
            if grown.any():
                i = int(grown.argmax())
                factor = weights[i] / self._weights[i]
                raise Diverged(f"Update {update} multiplied the norm of {self._path(i)} by {factor:.3g}.", update)
        self._weights = weights
        if gradients.size:
            self._check_value(update, "gradient norm", float(np.linalg.norm(gradients)), harmless=global_norm)

    def _check_value(self, update: int, name: str, value: float, harmless: float) -> None:
        if not math.isfinite(value):
            raise Diverged(f"The {name} is {value} in update {update}.", update)
        recent = self._recent[name]
        median = statistics.median(recent) if len(recent) == self._window else math.inf
        if value > max(harmless, self._factor * median):
            times = value / median if median else math.inf
            raise Diverged(
                f"The {name} is {value:.4g} in update {update}, {times:.3g} times its median over the last "
                f"{self._window} updates.",
                update,
            )
        recent.append(value)

    def _path(self, i: int) -> str:
        assert self._trainer
        return self._trainer.model.trainable_variables[i].path
