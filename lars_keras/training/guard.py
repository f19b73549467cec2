"""Stops a run that has diverged."""

import math

import keras

from lars_keras.training.errors import Diverged


class StopWhenDiverged(keras.callbacks.Callback):
    """Raises `Diverged` after an update whose loss is not finite: no later update can repair the weights."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        loss = (logs or {}).get("step_loss", 0.0)
        if not math.isfinite(loss):
            raise Diverged(
                f"The loss is {loss} at update {batch + 1}. "
                "A lower --learning_rate or a longer --warmup_epochs may help."
            )
