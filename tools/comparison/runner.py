"""Run the jobs of a comparison, several at a time, until none is left or a signal stops them."""

import concurrent.futures
import contextlib
import math
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lars_keras.report.progress import say
from running import exit_codes
from tools.comparison.candidates import Job
from tools.comparison.search import GridCell, ModeTrial, Outcomes
from tools.comparison.store import ResultsStore
from tools.comparison.worker import KEPT, Failed, prepare_process, run_job

# The outcome of a trial of XLA that failed.
NO_SPEED = dict.fromkeys(KEPT) | {"top1": 0.0, "top5": 0.0, "images_per_second": 0.0, "diverged": False, "failed": True}


class Runner:
    """Run a comparison.

    Args:
        cells: the grid.
        trials: trials of graph mode against XLA, which come first; the faster mode is taken.
        mode: `--jit_compile` of the models for which the store has none; None keeps the recipe's.
        store: takes the outcomes, and the mode of each model that had trials.
        out: folder whose `runs/` holds the run folders.
        workers: number of runs at a time.
        validation_split: fraction of the training images held out while rates are chosen.
    """

    def __init__(
        self,
        cells: Sequence[GridCell],
        trials: Sequence[ModeTrial],
        mode: str | None,
        store: ResultsStore,
        out: Path,
        workers: int,
        validation_split: float,
    ):
        self._cells, self._trials, self._mode, self._store = cells, trials, mode, store
        self._out, self._workers, self._validation_split = out, workers, validation_split
        self._running: dict[concurrent.futures.Future, Job] = {}
        self._stopping = False

    def run(self) -> int:
        """Run all jobs whose outcomes are not in the store.

        Returns:
            The exit code: 0; 1 if a run failed; `exit_codes.PREEMPTED` after SIGTERM or SIGINT.
        """
        pool = concurrent.futures.ProcessPoolExecutor(
            self._workers,
            multiprocessing.get_context("spawn"),
            initializer=prepare_process,
            initargs=(self._workers,),
        )
        store = self._store
        bar = tqdm(
            total=self._total(),
            initial=len(store.outcomes),
            bar_format="{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt} runs{postfix}",
            disable=None,
        )
        try:
            with self._signals():
                return self._loop(pool, bar)
        finally:
            bar.close()
            if self._running and not self._stopping:  # a run has failed, so the others need not go on
                end_processes()
            pool.shutdown(cancel_futures=True)

    def _loop(self, pool: concurrent.futures.ProcessPoolExecutor, bar: tqdm) -> int:
        running = self._running
        try:
            while not self._stopping:
                self._store.choose_modes(self._trials)
                ready = [job for job in self._jobs() if job not in running.values()]
                for job in ready[: self._workers - len(running)]:
                    running[pool.submit(run_job, *self._arguments(job))] = job
                if not running:
                    return 0
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    job, failure = running.pop(future), ""
                    try:
                        outcome = future.result()
                    except Failed as e:
                        failure = f"failed: {e} See {self._out}/runs/{job.name}/log.txt."
                        if job.stage != "xla":
                            self._store.forget_failed(self._trials)  # maybe for the same reason
                            say(f"compare.py: {job.name} {failure}", sys.stderr)
                            return 1
                        outcome = NO_SPEED  # graph mode may work
                    if outcome:
                        self._store.add(job.name, outcome)
                        self._tell(job, outcome, bar, failure)
        except concurrent.futures.process.BrokenProcessPool:
            if not self._stopping:
                names = ", ".join(job.name for job in running.values())
                say(
                    f"compare.py: a process was killed during {names} (out of memory?). Run the same command "
                    "to resume; fewer --workers need less memory.",
                    sys.stderr,
                )
                return 1
        say("compare.py: stopped; run the same command to resume", sys.stderr)
        return exit_codes.PREEMPTED

    def _jobs(self) -> list[Job]:
        outcomes = self._store.outcomes
        trials = [job for trial in self._trials for job in trial.jobs(outcomes)]
        return trials or [job for cell in self._cells for job in cell.jobs(outcomes)]

    def _total(self) -> int:
        """Return the number of runs, finished and left."""
        outcomes = self._store.outcomes
        return len(outcomes) + self._store.left + sum(len(trial.jobs(outcomes)) for trial in self._trials)

    def _arguments(self, job: Job) -> tuple[Any, ...]:
        mode = self._store.modes.get(job.candidate.config.model, self._mode)
        num_classes = job.candidate.num_classes if job.tuning else None
        return job.config(self._out / "runs" / job.name, self._validation_split, mode), num_classes

    def _tell(self, job: Job, outcome: Mapping[str, Any], bar: tqdm, failure: str) -> None:
        """Print the outcome of a run, or why it failed, and the time that is left."""
        store = self._store
        bar.total = self._total()
        left = seconds_left(self._cells, store.outcomes, self._workers)
        until = "" if left is None else f"  ETA {tqdm.format_interval(left)}"
        bar.set_postfix_str(until, refresh=False)
        bar.update()
        if job.stage in ("xla", "graph"):
            result = f"{outcome['images_per_second'] or math.nan:,.0f} images/s"
        else:
            result = f"top-1 {100 * outcome['top1']:.2f} %"
        result = "diverged" if outcome["diverged"] else "lost" if outcome.get("lost") else result
        took = "" if outcome["seconds"] is None else f"  {outcome['seconds']:.0f} s"
        say(f"{len(store.outcomes)}/{bar.total}  {job.name}: {failure or result}{took}{until}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT: the runs are saved."""

        def stop(*_: Any) -> None:
            if not self._stopping:
                end_processes()
            self._stopping = True

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def end_processes() -> None:
    """Ask the processes of the runs to save and end."""
    for process in multiprocessing.active_children():
        process.terminate()


def seconds_left(cells: Sequence[GridCell], outcomes: Outcomes, workers: int) -> float | None:
    """Return the seconds that all cells still need; None before the first run that tells.

    A cell's run of full length takes what its finished runs took in proportion to their lengths, else the mean of the
    cells of its batch size, else of all.
    """
    known: dict[GridCell, float] = {}
    for cell in cells:
        search = cell.search(outcomes)
        jobs = [cell.job(step, "short") for step in search.short] + [cell.job(step, "tuning") for step in search.full]
        if search.best is not None:
            jobs += [cell.job(search.best, "seed", seed) for seed in cell.seeds]
        paces = [
            outcomes[job.name]["seconds"] / job.length
            for job in jobs
            if job.name in outcomes and outcomes[job.name]["seconds"] is not None
        ]
        if paces:
            known[cell] = statistics.fmean(paces)
    if not known:
        return None
    total = 0.0
    for cell in cells:
        alike = [pace for other, pace in known.items() if other.batch_size == cell.batch_size]
        pace = known.get(cell) or statistics.fmean(alike or known.values())
        total += pace * sum(cell.lengths_left(outcomes))
    return total / workers
