"""What a run shows and keeps while it trains: a progress bar, JSON lines and TensorBoard scalars.

Ordinary Keras callbacks. They expect `params` to hold "epochs", "steps" (updates of the whole run), "batch_size"
(global), "steps_per_epoch" (float) and "first_update" (where a resumed run starts, else 0), and
`on_train_batch_end(update, logs)` to get the 0-based index of the last finished optimizer update.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import keras
from absl import logging
from tqdm import tqdm

from lars_keras.files import atomic_write_text

Clock = Callable[[], float]


class Throughput:
    """The speed of this process's training.

    The first call of the training function is left out, because it compiles, and so is the time between epochs,
    because it evaluates and saves.

    Args:
        batch_size: images of one update, over all replicas.
        first_update: updates that were finished before this process began.
        clock: returns seconds.
    """

    def __init__(self, batch_size: int, first_update: int = 0, clock: Clock = time.perf_counter):
        self._batch_size = batch_size
        self._clock = clock
        self._finished = first_update
        self._mark: float | None = None  # the last lap's time; None before the first
        self._compiled = (first_update, 0.0)  # updates and time at the first lap
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0

    def record(self, finished: int, waited: float = math.nan) -> None:
        """Notes that `finished` updates of the run are done by now, and the seconds that they waited for data."""
        now = self._clock()
        if self._mark is None:
            self._compiled = (finished, now)
        else:
            self._images += (finished - self._finished) * self._batch_size
            self._seconds += now - self._mark
            self._waited += waited
        self._finished, self._mark = finished, now

    def restart(self) -> None:
        """Leaves out the time since the last lap."""
        if self._mark is not None:
            self._mark = self._clock()

    @property
    def images_per_second(self) -> float:
        """The mean so far; NaN before the second lap."""
        return self._images / self._seconds if self._seconds else math.nan

    @property
    def data_wait(self) -> float:
        """The share of that time in which the devices waited for data; NaN before the second lap, or if unknown."""
        return self._waited / self._seconds if self._seconds else math.nan

    def seconds_left(self, total: int) -> float:
        """Time to `total` updates at the pace since compilation, evaluations included; NaN if unknown."""
        if self._mark is None or self._finished == self._compiled[0]:
            return math.nan
        updates, since = self._compiled
        return (total - self._finished) * (self._mark - since) / (self._finished - updates)


class Progress(keras.callbacks.Callback):
    """Shows the run: a bar on a terminal, else a plain line now and then, and one line per evaluation.

    Args:
        file: text stream to write to. Defaults to `sys.stdout`.
        interval: least seconds between two plain lines where `file` is no terminal.
        clock: returns seconds.
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

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._finished = self.params["first_update"]
        self._speed = Throughput(self.params["batch_size"], self._finished, self._clock)
        self._last_line = -math.inf
        self._terminal = self._file.isatty()
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
            self._write("  ".join([epochs, self._updates(), "val " + scores[0], *scores[1:]]))
        elif not self._terminal:
            self._line(logs)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._bar.close()

    @property
    def images_per_second(self) -> float | None:
        """Mean speed of the training so far, `Throughput`'s; None before the second call of the training function."""
        speed = self._speed.images_per_second
        return None if math.isnan(speed) else speed

    @property
    def data_wait(self) -> float | None:
        """Share of the training time so far in which the devices waited for data; None as above."""
        return None if math.isnan(self._speed.data_wait) else self._speed.data_wait

    def _updates(self) -> str:
        return f"update {self._finished}/{self.params['steps']}"

    def _status(self, logs: dict[str, float]) -> str:
        left = self._speed.seconds_left(self.params["steps"])
        speed = self._speed.images_per_second
        parts = [] if math.isnan(left) else [f"ETA {tqdm.format_interval(left)}"]
        parts += [] if math.isnan(speed) else [f"{speed:,.0f} images/s"]
        wait = self._speed.data_wait
        parts += [] if math.isnan(wait) else [f"data wait {wait:.0%}"]
        parts += [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
        parts += _accuracies(logs)[:1]
        parts += [f"rate {logs['learning_rate']:.4g}"] if "learning_rate" in logs else []
        return "  ".join(parts)

    def _line(self, logs: dict[str, float]) -> None:
        percent = 100 * self._finished / self.params["steps"]
        self._write(f"{self._updates()}  {percent:.0f} %  {self._status(logs)}")
        self._last_line = self._clock()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, a pipe that is closed: nothing that should end a run
            tqdm.write(line, file=self._file)
            self._file.flush()


class MetricsLog(keras.callbacks.Callback):
    """Keeps the run's metrics in `run_dir/metrics.jsonl` and as TensorBoard scalars in `run_dir/tensorboard`.

    After each call of the training function one line is added, with the count of finished updates, the metrics
    since the epoch's start, the mean speed of `Throughput`, the share of its time in which the devices waited for data,
    and the wall seconds of training so far:

        {"event": "update", "update": 18, "epoch": 3.0, "loss": ..., "step_loss": ..., "top1": ..., "top5": ...,
         "learning_rate": ..., "images_per_second": ..., "data_wait": ..., "seconds": ...}

    and after each evaluation

        {"event": "eval", "update": 18, "epoch": 3.0, "loss": ..., "top1": ..., "top5": ..., "n": 450}

    and for what else a reader should know (see `note`)

        {"event": "note", "update": 18, "text": "..."}

    and, if asked for, the lines of `lars_keras.report.layers`. Accuracies are fractions. What is not finite
    is null. What was logged beyond the update at which a resumed run starts is dropped, so no update comes twice; notes
    stay, for what they tell is told once.

    Args:
        run_dir: existing folder of the run.
        clock: returns seconds.
    """

    def __init__(self, run_dir: str | os.PathLike[str], clock: Clock = time.perf_counter):
        super().__init__()
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / "metrics.jsonl"
        self._clock = clock
        self._writers: dict[str, Any] = {}
        text = self._path.read_bytes() if self._path.exists() else b""
        self._torn = text[-1:] not in (b"", b"\n")  # by a process that the disk failed

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._finished = self.params["first_update"]
        events = [e for e in read_metrics(self._path) if e["update"] <= self._finished or e["event"] == "note"]
        try:
            atomic_write_text(self._path, "".join(map(_line, events)))
            self._torn = False
        except OSError as e:
            logging.error("the run goes on, its log keeps what it is to do again: %s", e)
        self._evaluated = {e["update"] for e in events if e["event"] == "eval"}
        earlier = max((e["seconds"] for e in events if e["event"] == "update"), default=0.0)
        self._began = self._clock() - earlier
        self._speed = Throughput(self.params["batch_size"], self._finished, self._clock)
        # A resumed run writes new event files; TensorBoard lets their steps replace the older ones.
        self._close_tensorboard()
        with self._or_without_tensorboard():
            self._writers = _tensorboard_writers(self._run_dir / "tensorboard")

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._finished = batch + 1
        self._speed.record(self._finished, (logs or {}).get("data_wait", math.nan))
        names = ("loss", "step_loss", "top1", "top5", "learning_rate")
        values = {name: (logs or {}).get(name, math.nan) for name in names}
        values["images_per_second"] = self._speed.images_per_second
        values["data_wait"] = self._speed.data_wait
        self._add("update", "train", values, {"seconds": self.seconds})

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._speed.restart()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # A run resumed at an epoch's end may repeat the evaluation that it already logged.
        if logs and "val_loss" in logs and self._finished not in self._evaluated:
            self._evaluated.add(self._finished)
            names = ("loss", "top1", "top5")
            values = {name: logs.get(f"val_{name}", math.nan) for name in names}
            self._add("eval", "validation", values, {"n": round(logs.get("val_n", 0))})
        with self._or_without_tensorboard():
            for writer in self._writers.values():
                writer.flush()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._close_tensorboard()

    @property
    def seconds(self) -> float:
        """Wall time of the training that is in the log, over all processes that had a part in it."""
        return self._clock() - self._began

    def note(self, update: int, text: str) -> None:
        """Adds a line of text, once, as of an update; it is shown in the report."""
        event = {"event": "note", "update": update, "text": text}
        if event not in read_metrics(self._path):
            self._append(event)

    def layers(self, update: int, paths: Sequence[str], values: dict[str, Any]) -> None:
        """Adds a line with one number for each variable, by the name of what is measured; see `LayerTelemetry`."""
        rounded = {name: [float(f"{v:.6g}") for v in of_layers] for name, of_layers in values.items()}
        finite = {name: [v if math.isfinite(v) else None for v in row] for name, row in rounded.items()}
        self._append({"event": "layers", "update": update, **finite})
        each = {f"layers/{name}/{path}": v for name, row in rounded.items() for path, v in zip(paths, row, strict=True)}
        self._scalars("train", each, update)

    def _add(self, event: str, run: str, values: dict[str, float], more: dict[str, Any]) -> None:
        epoch = self._finished / self.params["steps_per_epoch"]
        self._append({"event": event, "update": self._finished, "epoch": epoch, **values, **more})
        self._scalars(run, values, self._finished)

    def _append(self, event: dict[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:  # closed, so kept, whatever happens next
                file.write("\n" * self._torn + _line(event))
            self._torn = False
        except OSError as e:
            if not self._torn:
                logging.error("the run goes on without its log, which cannot be written: %s", e)
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
        except Exception as e:  # an error of its thread, on a full disk; the kind depends on how it is installed
            logging.error("the run goes on without TensorBoard events, which cannot be written: %s", e)
            self._writers = {}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`.

    Args:
        path: the file; it may be missing.

    Returns:
        The events in their order, without a line torn by a crash.
    """
    path = Path(path)
    events = []
    for line in filter(None, path.read_text(encoding="utf-8").splitlines() if path.exists() else ()):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            logging.warning("%s: left out a line that is no JSON: %.40r", path, line)
    return events


def _accuracies(logs: dict[str, float], prefix: str = "") -> list[str]:
    names = {"top-1": f"{prefix}top1", "top-5": f"{prefix}top5"}
    return [f"{name} {100 * logs[key]:.1f} %" for name, key in names.items() if key in logs]


def _line(event: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tensorboard_writers(folder: Path) -> dict[str, Any]:
    """One writer each for training and validation; none where TensorBoard is not installed."""
    try:
        from tensorboard.summary import Writer  # needs no TensorFlow
    except ImportError:
        logging.warning("tensorboard is not installed: no TensorBoard events are written.")
        return {}
    return {run: Writer(str(folder / run)) for run in ("train", "validation")}
