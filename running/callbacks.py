"""The callbacks of a run."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import keras

from flags.config import RunConfig
from lars_keras.data import ImageData
from lars_keras.report.layers import LayerTelemetry
from lars_keras.report.log import MetricsLog
from lars_keras.report.noise import NoiseScaleLog
from lars_keras.report.progress import Progress, say
from lars_keras.runtime.divergence import DivergenceGuard
from lars_keras.runtime.preemption import StopOnSignal
from lars_keras.runtime.unreadable_images import UnreadableImageLimit
from lars_keras.training import Trainer
from running.resume import BAD_IMAGES


class RunCallbacks:
    """The callbacks of a run, and their part in its results. Only the chief among several hosts shows and logs.

    Args:
        config: flags of the run.
        trainer, data: trainer and data set of the run.
        run_dir: folder of the run.
        chief: True on the host that prints and writes.

    Attributes:
        progress: the progress bar, with the speed.
        log: the metrics log.
        images: counts unreadable images.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, data: ImageData, run_dir: Path, chief: bool):
        self.progress, self.log = Progress(), MetricsLog(run_dir)
        self.images = UnreadableImageLimit(data, config.max_unreadable_images, self._on_unreadable_image)
        self._guard = DivergenceGuard(trainer)
        self._telemetry = LayerTelemetry(trainer, self.log, config.telemetry_every) if config.telemetry_every else None
        self._noise = NoiseScaleLog(trainer, self.log, config.noise_scale_every) if config.noise_scale_every else None
        self._unreadable, self._path, self._chief = data.unreadable_images, run_dir / BAD_IMAGES, chief

    def in_order(self, stop: StopOnSignal) -> list[keras.callbacks.Callback]:
        """Return the callbacks in the order in which they see an update."""
        if not self._chief:
            return [self._guard, self.images, stop]
        measures = [callback for callback in (self._telemetry, self._noise) if callback]
        return [*measures, self._guard, self.progress, self.log, self.images, stop]

    def on_rollback(self, rollback: dict[str, Any]) -> None:
        """Print and log a rollback."""
        if self._chief:
            text = f"went back to update {rollback['update']}: {rollback['reason']}"
            say(text, sys.stderr)
            self.log.note(rollback["update"], text)

    def _on_unreadable_image(self, update: int, where: str, reason: str) -> None:
        if self._chief:
            with contextlib.suppress(OSError):  # the log has it, too
                self._unreadable.save(self._path)
            self.log.note(update, f"left out an unreadable image, {where}: {reason}")
