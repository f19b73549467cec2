"""Watches a run for what no later update can repair."""

import collections
import math
import statistics
from collections.abc import Callable

import keras
import numpy as np

from lars_keras.data.base import ImageData
from lars_keras.runtime.errors import Diverged, TooManyBadImages
from lars_keras.training.cluster import any_across_hosts, strategy_of
from lars_keras.training.trainer import Trainer


class DivergenceGuard(keras.callbacks.Callback):
    """Raises `Diverged` after an update that is not finite, or explodes, naming the update and the layer.

    Watched are the loss and, of a `Trainer(layer_norms=True)`, the norms of every gradient and weight. The loss, or the
    gradient of all layers together, explodes when it is `explosion` times its median over the last `window` updates,
    and more than harmless: the loss above 10 (a uniform guess of one of 22,000 classes), the gradient longer than the
    weights. A weight explodes when one update makes it `explosion` times as long.

    It works in any `fit`: `model.fit(..., callbacks=[DivergenceGuard()])` watches the loss, which Keras gives as a
    mean over the epoch so far.

    Args:
        trainer: for the losses of all updates of a host call, and the norms of the layers.
        explosion: factor above which a value counts as exploding.
        window: updates that the median is taken over; nothing explodes before there are as many.
    """

    def __init__(self, trainer: Trainer | None = None, *, explosion: float = 100.0, window: int = 20):
        super().__init__()
        if explosion <= 1:
            raise ValueError(f"`explosion` must be above 1. Received: explosion={explosion}")
        self._trainer, self._explosion, self._window = trainer, explosion, window

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._recent = {
            name: collections.deque[float](maxlen=self._window) for name in ("loss", "norm of the gradient")
        }
        self._weights: np.ndarray | None = None
        self._before, self._batches, self._total = 0, 0, 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._before += self._batches
        self._batches, self._total = 0, 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        norms = self._trainer.layer_norms if self._trainer else {}
        gradients, weights = norms.get("gradient", np.zeros([1, 0])), norms.get("weight", np.zeros([1, 0]))
        first = batch + 2 - len(gradients)
        for update, (g, w) in enumerate(zip(gradients, weights, strict=True), first):
            self._check_layers(update, "gradient", g)
            self._check_layers(update, "value", w)
            if self._weights is not None:
                grown = (w > self._explosion * self._weights) & (self._weights > 0)
                if grown.any():
                    i = int(grown.argmax())
                    raise Diverged(
                        f"Update {update} made the weights of {self._path(i)} {w[i] / self._weights[i]:.3g} times as "
                        f"long.",
                        update,
                    )
            self._weights = w
            if g.size:
                self._check_value(update, "norm of the gradient", float(np.linalg.norm(g)), float(np.linalg.norm(w)))
        logs, last = logs or {}, batch + 1
        if self._trainer:
            losses = self._trainer.step_losses
        elif "step_loss" in logs:
            losses = [logs["step_loss"]]
        else:  # Keras counts batches from the start of the epoch
            losses, last = [self._newest_loss(batch, logs.get("loss", 0.0))], self._before + last
        for update, loss in enumerate(losses, last + 1 - len(losses)):
            self._check_value(update, "loss", loss, harmless=10.0)

    def _newest_loss(self, batch: int, mean: float) -> float:
        """The mean loss since the last call, from Keras's mean since the epoch began."""
        before, self._total = self._total, mean * (batch + 1)
        new, self._batches = batch + 1 - self._batches, batch + 1
        return (self._total - before) / new

    def _check_layers(self, update: int, what: str, norms: np.ndarray) -> None:
        bad = ~np.isfinite(norms)
        if bad.any():
            i = int(bad.argmax())
            others = f", and of {bad.sum() - 1} variables after it," if bad.sum() > 1 else ""
            raise Diverged(f"The {what} of {self._path(i)}{others} is not finite in update {update}.", update)

    def _check_value(self, update: int, name: str, value: float, harmless: float) -> None:
        if not math.isfinite(value):
            raise Diverged(f"The {name} is {value} in update {update}.", update)
        recent = self._recent[name]
        usual = statistics.median(recent) if len(recent) == self._window else math.inf
        if value > max(harmless, self._explosion * usual):
            raise Diverged(
                f"The {name} is {value:.4g} in update {update}, {value / usual if usual else math.inf:.3g} times its "
                f"median over the last {self._window} updates.",
                update,
            )
        recent.append(value)

    def _path(self, i: int) -> str:
        assert self._trainer
        return self._trainer.model.trainable_variables[i].path


class CorruptImageLimit(keras.callbacks.Callback):
    """Raises `TooManyBadImages`, on all workers, when more than `maximum` different images could not be read.

    Those that this process could not read have names. Of those of other workers, and of the hosts of a TPU pod, only
    numbers are known: by the model's metric `lars_keras.metrics.MaskedExamples`, and by what an evaluation misses.

    Args:
        data: the data set.
        maximum: how many are allowed.
        on_new: is told of each that has a name, once, after the update in or before which it was met.
    """

    def __init__(self, data: ImageData, maximum: int, on_new: Callable[[int, str, str], None] = lambda *_: None):
        super().__init__()
        self._data, self._maximum, self._on_new = data, maximum, on_new
        self._named = set(data.unreadable_images.found)
        self._left_out = {"train": 0, "test": 0}

    @property
    def count(self) -> int:
        """How many different images could not be read, at least."""
        return max(len(self._named), sum(self._left_out.values()))

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._update = self.params.get("first_update", 0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._began = math.ceil(epoch * self.params["steps_per_epoch"] - 1e-9)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._update = batch + 1
        taken = (self._update - self._began) * self.params["batch_size"]
        # An epoch's updates may reach into the permutation before it and the one after it.
        most = taken // self._data.num_train + 2
        self._learn("train", math.ceil((logs or {}).get("masked_examples", 0.0) / most))

    def on_test_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._check()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if logs and "val_n" in logs:
            self._learn("test", self._data.num_test - round(logs["val_n"]))

    def _learn(self, split: str, masked_examples: int) -> None:
        self._left_out[split] = max(self._left_out[split], masked_examples)
        self._check()

    def _check(self) -> None:
        found = self._data.unreadable_images.found
        for where, reason in list(found.items()):
            if where not in self._named:
                self._named.add(where)
                self._on_new(self._update, where, reason)
        if any_across_hosts(strategy_of(self.model), self.count > self._maximum):
            count = max(self.count, self._maximum + 1)
            last = [f"The last: {where}: {reason}" for where, reason in found.items()][-1:]
            raise TooManyBadImages(
                f"{count} image{'s' * (count > 1)} cannot be read, more than --max_bad_images={self._maximum}. "
                + (last or ["The logs of the workers or hosts name them."])[0]
            )
