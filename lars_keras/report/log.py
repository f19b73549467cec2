"""The run's metrics on disk: JSON lines, and TensorBoard scalars.

The callback expects `params` and calls as `lars_keras.training.Trainer.fit` makes them: `params` hold "batch_size"
(global), "steps_per_epoch" (float) and "first_update" (where a resumed run starts, else 0). `on_train_batch_end(update,
logs)` gets the 0-based index of the last finished update.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import logging

from lars_keras.files import atomic_write_text, local_path
from lars_keras.report.throughput import Clock, Throughput


class MetricsLog(keras.callbacks.Callback):
    """Writes the run's metrics to `run_dir/metrics.jsonl`, and as TensorBoard scalars to `run_dir/tensorboard`.

    Each call of the training function adds one line. It has the number of finished updates, the metrics since the start
    of the epoch, the mean speed, the fraction of time spent waiting for data, and the seconds of training so far:

        {"event": "update", "update": 18, "epoch": 3.0, "loss": ..., "step_loss": ..., "top1": ..., "top5": ...,
         "learning_rate": ..., "images_per_second": ..., "data_wait": ..., "seconds": ...}

    `"top1"` and `"top5"` stand for the scalar metrics that the model was compiled with. Each evaluation adds

        {"event": "eval", "update": 18, "epoch": 3.0, "loss": ..., "top1": ..., "top5": ..., "n": 450}

    and `note` adds

        {"event": "note", "update": 18, "text": "..."}

    `lars_keras.report.layers.LayerTelemetry` adds lines of its own. Accuracies are fractions. A number that is not
    finite is null. A resumed run drops the lines after the update at which it starts, so each update appears once. It
    keeps all notes, because each event is noted once.

    If a training has come to its end, a second one with the same log, from update 0 on, begins a new file. The first
    becomes `metrics-<its last update>.jsonl`, with another number if there is such a file. A training that begins again
    at update 0 before that, as after a divergence, replaces what was logged.

    A full disk does not end the run. It is reported as an error in the log of the process.

    Args:
        run_dir: existing folder of the run.
        clock: function that returns seconds.
    """

    def __init__(self, run_dir: str | os.PathLike[str], clock: Clock = time.perf_counter):
        super().__init__()
        self._run_dir = local_path(run_dir, "run_dir")
        self._path = self._run_dir / "metrics.jsonl"
        self._clock = clock
        self._writers: dict[str, Any] = {}
        self._finished, self._ended = 0, False
        self._notes: list[dict[str, Any]] | None = None  # of the file, once it was read
        text = self._path.read_bytes() if self._path.exists() else b""
        self._torn = text[-1:] not in (b"", b"\n")  # a full disk cut the last line

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        if self._ended and self.params["first_update"] == 0:
            self._set_aside()
        self._finished, self._ended = self.params["first_update"], False
        events = [e for e in read_metrics(self._path) if e["update"] <= self._finished or e["event"] == "note"]
        try:
            atomic_write_text(self._path, "".join(map(_line, events)))
            self._torn = False
        except OSError as e:
            logging.error("The metrics log could not be cut back to the start of this run: %s", e)
        self._notes = [e for e in events if e["event"] == "note"]
        self._evaluated = {e["update"] for e in events if e["event"] == "eval"}
        earlier = max((e["seconds"] for e in events if e["event"] == "update"), default=0.0)
        self._began = self._clock() - earlier
        self._speed = Throughput(self.params["batch_size"], self._finished, self._clock)
        self._close_tensorboard()
        with self._or_without_tensorboard():
            self._writers = _tensorboard_writers(self._run_dir / "tensorboard", self._finished + 1)

    def _set_aside(self) -> None:
        """Rename the log of the training before."""
        stem = f"metrics-{self._finished}"
        stems = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        free = next(path for path in map(self._path.with_stem, stems) if not path.exists())
        try:
            self._path.rename(free)
        except OSError as e:
            logging.error("The metrics log of the training before could not be renamed: %s", e)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._finished = batch + 1
        self._speed.record(self._finished, (logs or {}).get("data_wait", math.nan))
        values = _scalars_of(logs or {}, "loss", "step_loss", "learning_rate")
        values["images_per_second"] = self._speed.images_per_second
        values["data_wait"] = self._speed.data_wait
        self._add("update", "train", values, {"seconds": self.seconds})

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._speed.restart()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # A run resumed at an epoch's end may repeat the evaluation that it already logged.
        if logs and "val_loss" in logs and self._finished not in self._evaluated:
            self._evaluated.add(self._finished)
            scores = {name.removeprefix("val_"): value for name, value in logs.items() if name.startswith("val_")}
            self._add("eval", "validation", _scalars_of(scores, "loss"), {"n": round(scores.get("n", 0))})
        with self._or_without_tensorboard():
            for writer in self._writers.values():
                writer.flush()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._ended = True
        self._close_tensorboard()

    @property
    def finished(self) -> int:
        """Number of finished updates."""
        return self._finished

    @property
    def seconds(self) -> float:
        """Wall time of the logged training, summed over the run's processes."""
        return self._clock() - self._began

    def note(self, update: int, text: str) -> None:
        """Add a line of text as of an update, unless the same line is there. The report shows it."""
        event = {"event": "note", "update": update, "text": text}
        if self._notes is None:
            self._notes = [e for e in read_metrics(self._path) if e["event"] == "note"]
        if event not in self._notes:
            self._notes.append(event)
            self._append(event)

    def layers(self, update: int, paths: Sequence[str], values: dict[str, Any]) -> None:
        """Add a line of layer telemetry.

        Args:
            update: number of finished updates.
            paths: path of each variable.
            values: for each measure, one number per variable.
        """
        rounded = {name: [float(f"{v:.6g}") for v in of_layers] for name, of_layers in values.items()}
        finite = {name: [v if math.isfinite(v) else None for v in row] for name, row in rounded.items()}
        self._append({"event": "layers", "update": update, **finite})
        each = {f"layers/{name}/{path}": v for name, row in rounded.items() for path, v in zip(paths, row, strict=True)}
        self._scalars("train", each, update)

    def noise_scale(self, update: int, values: dict[str, Any], scalars: dict[str, float]) -> None:
        """Add a line on the noise scale; see `NoiseScaleLog`.

        Args:
            update: number of finished updates.
            values: values of the line.
            scalars: values of TensorBoard and of the line; a number that is not finite is null.
        """
        self._append({"event": "noise_scale", "update": update, **scalars, **values})
        self._scalars("train", scalars, update)

    def _add(self, event: str, run: str, values: dict[str, float], more: dict[str, Any]) -> None:
        epoch = self._finished / self.params["steps_per_epoch"]
        own = {"event": event, "update": self._finished, "epoch": epoch}
        named = {f"metric/{name}" if name in own else name: value for name, value in values.items()}
        self._append({**own, **named, **more})
        self._scalars(run, values, self._finished)

    def _append(self, event: dict[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:  # closed, so a kill does not lose the line
                file.write("\n" * self._torn + _line(event))
            self._torn = False
        except OSError as e:
            if not self._torn:
                logging.error("The metrics log could not be written: %s", e)
            self._torn = True

    def _scalars(self, run: str, values: dict[str, float], update: int) -> None:
        with self._or_without_tensorboard():
            for name, value in values.items() if run in self._writers else ():
                if math.isfinite(value):
                    self._writers[run].add_scalar(name, value, update)

    def _close_tensorboard(self) -> None:
        with self._or_without_tensorboard():
            for writer in self._writers.values():
                writer.close()
        self._writers = {}

    @contextlib.contextmanager
    def _or_without_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # on a full disk its thread fails; the kind depends on the installation
            logging.error("TensorBoard events could not be written: %s", e)
            self._writers = {}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`.

    Args:
        path: the file, which may be missing.

    Returns:
        The events in order. Lines that a crash has torn or damaged are skipped.
    """
    path = Path(path)
    events = []
    for line in filter(None, path.read_bytes().splitlines() if path.exists() else ()):
        try:
            event = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            event = None
        if isinstance(event, dict) and {"event", "update"} <= event.keys():
            events.append(event)
        else:
            logging.warning("%s: skipped a line that is not an event: %.40r", path, line)
    return events


def _scalars_of(logs: dict[str, Any], *always: str) -> dict[str, float]:
    """Return the numbers among the logs; NaN for a name of `always` that is not there."""
    found = {**dict.fromkeys(always, math.nan), **logs}
    return {name: float(value) for name, value in found.items() if np.ndim(value) == 0 and name != "n"}


def _line(event: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tensorboard_writers(folder: Path, first: int) -> dict[str, Any]:
    """Return a writer each for training and validation, or none if TensorBoard is not installed.

    TensorBoard drops what earlier files have from update `first` on.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary import Writer  # needs no TensorFlow
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        logging.warning("tensorboard is not installed: no TensorBoard events are written.")
        return {}
    folders = {run: str(folder / run) for run in ("train", "validation")}
    for path in folders.values():
        start = EventFileWriter(path)
        start.add_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
        start.close()
    return {run: Writer(path) for run, path in folders.items()}
