"""Keras's progress bar over the updates of an epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

HIDDEN = ("step_loss", "data_wait")  # of one call of the engine; the bar shows means over the epoch


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Show `keras.callbacks.ProgbarLogger` from 0 to the updates of each epoch.

    `Trainer` numbers updates over the whole run, and epochs may differ by an update.

    Args:
        ends: number of the last update of each epoch, from 1.
    """

    def __init__(self, ends: Sequence[int]):
        super().__init__()
        self._ends = (0, *ends)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._before, end = self._ends[epoch : epoch + 2]
        self.target = end - self._before
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_batch_end(batch - self._before, _shown(logs))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, _shown(logs))


def _shown(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if name not in HIDDEN}
