"""The run's progress: a bar on a terminal, plain lines elsewhere.

The callback expects `params` and calls as `lars_keras.training.Trainer.fit` makes them: `params` hold "epochs", "steps"
(updates of the whole run), "batch_size" (global) and "first_update" (where a resumed run starts, else 0).
`on_train_batch_end(update, logs)` gets the 0-based index of the last finished update.
"""

import contextlib
import math
import os
import sys
import time
from typing import Any, TextIO

import keras
from tqdm import tqdm

from lars_keras.report.throughput import Clock, Throughput


def say(text: str, file: TextIO | None = None) -> None:
    """Write a line to a stream, `sys.stdout` by default. A closed pipe or a full disk must not end a run."""
    file = file or sys.stdout
    with contextlib.suppress(OSError):
        try:
            tqdm.write(text, file=file)
            file.flush()
        except BrokenPipeError:  # the rest of the line must not fail at the exit of Python
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Progress(keras.callbacks.Callback):
    """Shows a bar on a terminal, or else a plain line from time to time, and one line per evaluation.

    Args:
        file: text stream to write to. Defaults to `sys.stdout`.
        interval: minimum seconds between two plain lines.
        clock: function that returns seconds.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        interval: float = 10.0,
        clock: Clock = time.perf_counter,
    ):
        super().__init__()
        self._file = file or sys.stdout
        self._interval = interval
        self._clock = clock
        self._bar: Any = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._finished = self.params["first_update"]
        self._speed = Throughput(self.params["batch_size"], self._finished, self._clock)
        self._last_line = -math.inf
        self._terminal = self._file.isatty()
        if self._bar is not None:  # of the run before a rollback
            self._bar.close()
        self._bar = tqdm(
            total=self.params["steps"],
            initial=self._finished,
            disable=not self._terminal,
            file=self._file,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}{postfix}",
            postfix="compiling",
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        finished = batch + 1
        self._speed.record(finished, (logs or {}).get("data_wait", math.nan))
        self._bar.set_postfix_str(self._status(logs or {}), refresh=False)
        self._bar.update(finished - self._finished)
        self._finished = finished
        if not self._terminal and self._clock() - self._last_line >= self._interval:
            self._line(logs or {})

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._speed.restart()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = logs or {}
        if "val_loss" in logs:
            scores = [*_accuracies(logs, "val_"), f"loss {logs['val_loss']:.4g}"]
            scores += [f"n={logs['val_n']:.0f}"] if "val_n" in logs else []
            epochs = f"epoch {epoch + 1}/{self.params['epochs']:g}"
            say("  ".join([epochs, self._updates(), "val " + scores[0], *scores[1:]]), self._file)
        elif not self._terminal:
            self._line(logs)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._bar.close()

    @property
    def images_per_second(self) -> float | None:
        """Mean speed so far, as `Throughput` measures it; None before the second call of the training function."""
        speed = self._speed.images_per_second
        return None if math.isnan(speed) else speed

    @property
    def data_wait(self) -> float | None:
        """Fraction of that time spent waiting for data; None before the second call of the training function."""
        return None if math.isnan(self._speed.data_wait) else self._speed.data_wait

    def _updates(self) -> str:
        return f"update {self._finished}/{self.params['steps']}"

    def _status(self, logs: dict[str, float]) -> str:
        left = self._speed.seconds_left(self.params["steps"])
        speed = self._speed.images_per_second
        parts = [] if math.isnan(left) else [f"ETA {tqdm.format_interval(left)}"]
        parts += [] if math.isnan(speed) else [f"{speed:,.0f} images/s"]
        wait = self._speed.data_wait
        parts += [] if math.isnan(wait) else [f"data wait {100 * wait:.0f} %"]
        parts += [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
        parts += _accuracies(logs)[:1]
        parts += [f"rate {logs['learning_rate']:.4g}"] if "learning_rate" in logs else []
        return "  ".join(parts)

    def _line(self, logs: dict[str, float]) -> None:
        percent = 100 * self._finished / self.params["steps"]
        say(f"{self._updates()}  {percent:.0f} %  {self._status(logs)}", self._file)
        self._last_line = self._clock()


def _accuracies(logs: dict[str, float], prefix: str = "") -> list[str]:
    names = {"top-1": f"{prefix}top1", "top-5": f"{prefix}top5"}
    return [f"{name} {100 * logs[key]:.1f} %" for name, key in names.items() if key in logs]
