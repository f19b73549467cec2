"""One run of `train.py` in a process that trains one run after the other."""

import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from flags import RunConfig
from lars_keras.report.log import read_metrics
from lars_keras.runtime.errors import Diverged, Preempted
from running.logs import show_warnings
from running.resume import config_of_flags, flags_of_run
from tools.comparison.candidates import beats_chance

KEPT = ("top1", "top5", "loss", "n", "updates", "seconds", "images_per_second")
VIEWS = ("top1_views", "top5_views")  # kept as well where `--test_views` asks for them
MIN_JUDGED = 32  # updates: a shorter run is trained to its end, because it may begin to learn late

_running, _stopped = False, False


class Failed(Exception):
    """A run ended with an error; its log has the traceback."""


class Lost(Exception):
    """A run has learned nothing by half of its length.

    Attributes:
        update: updates that were taken.
        loss: median training loss of the second quarter.
    """

    def __init__(self, update: int, loss: float):
        super().__init__(f"the training loss is {loss:.4g} after {update} updates, no better than a guess")
        self.update, self.loss = update, loss


class StopIfLost(keras.callbacks.Callback):
    """Raise `Lost` at half of the length if loss and top-1 of the second quarter are no better than those of guesses.

    The loss alone does not tell: it may have terms that no label decides, such as the regularizers of a user's model,
    and a network that is often right may be too sure where it is wrong.

    Both are read from the log of the run, so a resumed run is judged by the same numbers.

    Args:
        run_dir: folder of the run, whose `metrics.jsonl` is written before this callback is called.
        num_classes: number of classes.
    """

    def __init__(self, run_dir: Path, num_classes: int):
        super().__init__()
        self._path, self._num_classes = run_dir / "metrics.jsonl", num_classes

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._judged = self.params["steps"] < MIN_JUDGED

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        finished, half = batch + 1, self.params["steps"] / 2
        if self._judged or finished < half:
            return
        self._judged = True
        events = [e for e in read_metrics(self._path) if e["event"] == "update"]
        until = min(e["update"] for e in events if e["update"] >= half)
        losses = [
            math.inf if e["step_loss"] is None else e["step_loss"] for e in events if half / 2 < e["update"] <= until
        ]
        loss = statistics.median(losses)
        if loss >= math.log(self._num_classes) and not self._beats_chance(events, half / 2, until):
            raise Lost(finished, loss)

    def _beats_chance(self, events: Sequence[Mapping[str, Any]], after: float, until: int) -> bool:
        """Return True if top-1 of the updates from `after` until `until` is above chance.

        The log has means since the start of the epoch, so what came before in the epoch is taken off.
        """
        updates, right = 0, 0.0
        for before, event in itertools.pairwise([{"update": 0}, *events]):
            if after < event["update"] <= until:
                first = epoch_start(event["update"], self.params["steps_per_epoch"])
                updates += event["update"] - max(before["update"], first)
                right += _right(event, first) - _right(before, first)
        return beats_chance(right / updates, updates * self.params["batch_size"], self._num_classes)


def epoch_start(update: int, steps_per_epoch: float) -> int:
    """Return the last update before the epoch of an update: epoch `e` ends with update `ceil(e * steps_per_epoch)`."""
    return math.ceil(math.floor((update - 1 + 1e-9) / steps_per_epoch) * steps_per_epoch - 1e-9)


def _right(event: Mapping[str, Any], first: int) -> float:
    """Return the updates from `first` to an event in the same epoch, times their top-1; 0 if it came before."""
    return max(event["update"] - first, 0) * (event.get("top1") or 0.0)


def prepare_process(workers: int) -> None:
    """Give TensorFlow its fraction of the cores, and end this process when its parent ends. Call it once a process."""
    os.setpgrp()  # Ctrl-C reaches the parent alone, which stops its workers in order
    signal.signal(signal.SIGTERM, _stop)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    import tensorflow as tf

    from lars_keras.data.limits import cores

    show_warnings()
    tf.get_logger().setLevel("ERROR")  # it warns of functions that are traced anew, as each run does
    tf.config.threading.set_intra_op_parallelism_threads(max(cores() // workers, 1))


def _stop(*_: Any) -> None:
    """Handle SIGTERM outside of training, where `train.main` does not listen for it."""
    global _stopped
    _stopped = True
    if _running:
        raise Preempted("stopped before or after the training")


def run_job(config: RunConfig, num_classes: int | None = None) -> dict[str, Any] | None:
    """Train a run to its end, from its start or from where it was stopped.

    Args:
        config: its flags.
        num_classes: stop the run at half of its length if it does no better than guesses among so many classes.

    Returns:
        `KEPT` and `VIEWS` of its results, whether it `diverged` or is `lost`; `training_seconds` of its updates and,
        unless it was resumed, `wall_seconds` from the call to the return. None if a signal stopped it.

    Raises:
        Failed: if it ended with an error, or its folder holds a run of other flags.
    """
    global _running
    if _stopped:
        return None
    run_dir = Path(config.run_dir or "")
    results = run_dir / "results.json"
    began, whole = time.monotonic(), not run_dir.exists()
    more: dict[str, Any] = {"diverged": False}
    if results.exists():  # the process that trained it ended before it could tell
        if _flags_in(run_dir) != _lines(config.as_flags()):
            raise Failed("its folder holds a run of other flags: remove it, or name another --out.")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (
            open(run_dir / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            _running = True
            try:
                import train

                train.main(config, more_callbacks=[] if num_classes is None else [StopIfLost(run_dir, num_classes)])
            except Diverged:
                return {**dict.fromkeys(KEPT), "top1": 0.0, "top5": 0.0, "diverged": True}
            except Lost as e:
                print(e)
                kept = {
                    "top1": 0.0,
                    "top5": 0.0,
                    "loss": e.loss if math.isfinite(e.loss) else None,
                    "updates": e.update,
                }
                return {**dict.fromkeys(KEPT), **kept, "diverged": False, "lost": True}
            except Preempted:
                return None
            except Exception as e:
                traceback.print_exc()
                raise Failed(f"{type(e).__name__}: {e}") from None
            finally:
                _running = False
                keras.utils.clear_session()
                gc.collect()
        if whole:
            more["wall_seconds"] = round(time.monotonic() - began, 3)
    found = json.loads(results.read_text(encoding="utf-8"))
    if found["images_per_second"]:
        more["training_seconds"] = round(found["updates"] * config.batch_size / found["images_per_second"], 3)
    views = {name: found[name] for name in VIEWS if name in found}
    return {name: found[name] for name in KEPT} | views | more


def _flags_in(run_dir: Path) -> list[str]:
    return _lines(config_of_flags(flags_of_run(str(run_dir))).as_flags())


def _lines(flags: str) -> list[str]:
    return [line for line in flags.splitlines() if not line.startswith("--data_dir=")]
