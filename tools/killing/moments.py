"""Random moments in the life of a run."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.killing.runs import UPDATES_PER_EPOCH, Job

# How often each is taken, before and after the last update.
MOMENTS = {"starting": 0.25, "updating": 0.25, "saving": 0.2, "evaluating": 0.2, "ending": 0.1}
LAST_MOMENTS = {"starting": 0.4, "ending": 0.6}


def draw(run_dir: Path, steps: int, rng: np.random.Generator) -> str:
    """Return a kind of moment that may still come in a run."""
    moments = MOMENTS if last_event(run_dir)["update"] < steps else LAST_MOMENTS
    return str(rng.choice(list(moments), p=list(moments.values())))


def last_event(run_dir: Path) -> dict[str, Any]:
    """Return the last update or evaluation in the log, or one of update 0."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines[-3:] if line.endswith("}")]
    return ([e for e in events if e["event"] != "note"] or [{"event": "none", "update": 0}])[-1]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the parts of a run that is not killed.

    Attributes:
        starting: until it prints its plan.
        ending: from the last update to the end.
    """

    starting: float
    ending: float

    @classmethod
    def of(cls, job: Job, run_dir: Path, steps: int) -> "Timing":
        """Measure a run that has just been started."""
        _until(lambda: job.trains, [job], 0.05)
        starting = time.time()
        _until(lambda: last_event(run_dir)["update"] >= steps, [job], 0.05)
        ending = time.time()
        _until(lambda: False, [job], 0.05)
        return cls(starting - job.started, time.time() - ending)


def wait_for(
    moment: str, jobs: Sequence[Job], run_dir: Path, steps: int, timing: Timing, rng: np.random.Generator
) -> None:
    """Wait for a random moment of a kind, or until all jobs have ended.

    Args:
        moment: one of `MOMENTS`.
        jobs: the runs that were started on the folder.
        run_dir: the folder.
        steps: updates of the run.
        timing: timing of a run that is not killed.
        rng: draws the moment.
    """
    started = min(job.started for job in jobs)
    if moment == "starting":
        until = time.time() + rng.uniform(0, timing.starting)
        _until(lambda: time.time() >= until, jobs)
        return
    _until(lambda: any(job.alive and job.trains for job in jobs), jobs)
    first = last_event(run_dir)["update"]
    if moment == "ending":
        log = run_dir / "metrics.jsonl"
        _until(lambda: log.exists() and log.stat().st_mtime > started and last_event(run_dir)["update"] >= steps, jobs)
        until = time.time() + rng.uniform(0, timing.ending)
        _until(lambda: time.time() >= until, jobs)
        return
    target = first + rng.integers(1, 5)
    _until(lambda: last_event(run_dir)["update"] >= target, jobs)
    if moment == "evaluating":
        _until(lambda: _before_evaluation(last_event(run_dir)), jobs)
    if moment == "saving":
        folder = run_dir / "checkpoints"
        _until(lambda: any(_is_new(path, started) for path in folder.glob(".writing-*")), jobs, 0.0005)
        time.sleep(rng.uniform(0, 0.005))
    else:
        time.sleep(rng.uniform(0, 0.2))


def _before_evaluation(event: dict[str, Any]) -> bool:
    return event["event"] == "update" and event["update"] % UPDATES_PER_EPOCH == 0


def _is_new(path: Path, started: float) -> bool:
    try:
        return path.stat().st_mtime > started
    except FileNotFoundError:
        return False


def _until(condition: Callable[[], bool], jobs: Sequence[Job], pause: float = 0.01) -> None:
    while any(job.alive for job in jobs) and not condition():
        time.sleep(pause)
