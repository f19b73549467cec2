"""Kill real runs at random moments and compare their final states: `make prove-resume`, in short in the tests.

    python -m tools.kill_and_resume --kills=40 --folder=build/prove_resume --out=results/resume.json

A run of train.py trains on small random images, with augmentation, dropout, batch normalization, EMA weights and
micro-batches. It is killed by SIGKILL and started again, until it ends. Its model, optimizer, metrics and log must
equal those of a run that was never killed. Then the next run begins, until its cell has its kills:

    single, mirrored, two_workers  TensorFlow on one device, on two replicas, in two processes
    jax, jax_8                     JAX on one device, and on 8 that keep a shard of the optimizer each
    hammer                         two processes are started on one folder each time; the one that holds it is killed
    array                          four processes are started at once without --run_dir, and one is killed

`--folder` keeps what is finished: the command, stopped and given again, goes on after the last finished run. `--out`
gets a line for each cell.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.committed import write_json
from tools.killing.folders import difference, examine, outcome, seen
from tools.killing.moments import Timing, draw, last_event, wait_for
from tools.killing.runs import CELLS, FLAGS, Job, write_images

Ledger = list[dict[str, Any]]
ARRAY_JOBS, ARRAY_PROCESSES = 2, 4


class Proof:
    """Kills the runs of a cell.

    Args:
        folder: keeps the data, the run that was not killed, and the ledger: a line a finished run.
        cell: name of the cell.
        steps: updates of a run; None takes those of the cell.
        log: called with a line for each kill.
    """

    def __init__(self, folder: Path, cell: str, steps: int | None = None, log: Callable[[str], object] = print):
        self.cell, self.steps = CELLS[cell], steps or CELLS[cell].steps
        self._folder, self._images, self._cache = folder / cell, folder / "images", folder / "jax_programs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "ledger.jsonl"
        self._log = lambda text: log(f"{cell}: {text}")

    @property
    def ledger(self) -> Ledger:
        """The finished runs."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    @property
    def kills(self) -> int:
        """The kills of the finished runs."""
        return sum(line["kills"] for line in self.ledger)

    def prove(self, kills: int) -> None:
        """Kill runs until the cell has its kills.

        Raises:
            RuntimeError: if something was lost, torn or wrong. The folders stay as they are.
        """
        if not (self._images / "cifar10").exists():
            write_images(self._images)
        while self.kills < kills:
            rng = np.random.default_rng([len(self.ledger), *self.cell.name.encode()])
            line = self._array(rng) if self.cell.name == "array" else self._run(rng, kills - self.kills)
            if not line["relative_difference"] <= self.cell.tolerance:
                raise RuntimeError(f"{self.cell.name}: not the same as a run that was not killed: {line}")
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._log(f"{self.kills} kills in {len(self.ledger)} finished runs; {json.dumps(line)}")

    def row(self) -> dict[str, Any]:
        """Return the line of the cell in results/resume.json."""
        ledger = self.ledger
        names = sorted({name for line in ledger for name in line["killed_while"]})
        return {
            "cell": self.cell.name,
            "backend": self.cell.backend,
            "flags": list(self.cell.flags),
            "kills": self.kills,
            "runs": len(ledger),
            "relative_difference": max(line["relative_difference"] for line in ledger),
            "refused": sum(line["refused"] for line in ledger),
            "killed_while": {name: sum(line["killed_while"].get(name, 0) for line in ledger) for name in names},
        }

    def _flags(self, run_dir: Path, alone: bool = False) -> list[str]:
        """Return the flags of a run. With `alone` they are left to its folder, if it has them already."""
        if alone and (run_dir / "flags.txt").exists():
            return [f"--run_dir={run_dir}"]
        return [*FLAGS, *self.cell.flags, f"--data_dir={self._images}", f"--steps={self.steps}", f"--run_dir={run_dir}"]

    def _whole(self) -> Timing:
        """Return the duration of the parts of a run that is not killed. It is made first."""
        path, whole = self._folder / "timing.json", self._folder / "whole"
        if not path.exists():
            job = Job(self.cell, self._flags(_without(whole)), self._cache)
            timing = Timing.of(job, whole, self.steps)
            job.end()
            examine(whole, {})
            path.write_text(json.dumps(vars(timing)))
        return Timing(**json.loads(path.read_text()))

    def _run(self, rng: np.random.Generator, most: int) -> dict[str, Any]:
        """Kill a run, at most so often, until it ends; return its line of the ledger."""
        timing, run_dir = self._whole(), _without(self._folder / "killed")
        killed_while: list[str] = []
        refused, before = 0, examine(run_dir, {})
        while not (run_dir / "results.json").exists():
            flags = [self._flags(run_dir, alone=rng.random() < 0.5) for _ in range(self.cell.at_once)]
            jobs = [Job(self.cell, of_job, self._cache) for of_job in flags]
            while len(killed_while) < most and any(job.alive for job in jobs):
                moment = draw(run_dir, self.steps, rng)
                wait_for(moment, jobs, run_dir, self.steps, timing, rng)
                victim = _holder(jobs, run_dir, rng)
                # Of several processes one may be gone, or the machine with all of them.
                only = (
                    int(rng.integers(self.cell.processes)) if self.cell.processes > 1 and rng.random() < 0.5 else None
                )
                if victim and victim.kill(only):
                    before = examine(run_dir, before)
                    killed_while.append(seen(run_dir, victim.trains, victim.started, self.steps))
                    update = last_event(run_dir)["update"]
                    self._log(f"kill {len(killed_while)}, {moment}: {killed_while[-1]} at update {update}")
            refused += sum(job.end() for job in jobs)
            before = examine(run_dir, before)
        worst = difference(outcome(run_dir), outcome(self._folder / "whole"))
        counts = {name: killed_while.count(name) for name in sorted(set(killed_while))}
        return {
            "kills": len(killed_while),
            "relative_difference": worst,
            "refused": refused,
            "killed_while": counts,
        }

    def _array(self, rng: np.random.Generator) -> dict[str, Any]:
        """Start an array job, kill one of its processes, go on with it, and compare all of them."""
        cwd = _without(self._folder / "array")
        cwd.mkdir()
        flags = [*FLAGS, *self.cell.flags, f"--data_dir={self._images}", f"--steps={self.steps // 4}"]
        jobs = [Job(self.cell, flags, self._cache, cwd) for _ in range(ARRAY_PROCESSES)]
        while not (training := [job for job in jobs if job.trains]):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        killed = int(training[0].kill())
        for job in jobs:
            job.end()
        folders = sorted(cwd.glob("runs/*"))
        for run_dir in folders:
            if not (run_dir / "results.json").exists():
                Job(self.cell, [f"--run_dir={run_dir}"], self._cache).end()
            examine(run_dir, {})
        if len(folders) != ARRAY_PROCESSES:
            raise RuntimeError(f"{ARRAY_PROCESSES} processes have made {folders}")
        first, *others = (outcome(run_dir) for run_dir in folders)
        worst = max(difference(other, first) for other in others)
        return {"kills": killed, "relative_difference": worst, "refused": 0, "killed_while": {"updating": killed}}


def _holder(jobs: list[Job], run_dir: Path, rng: np.random.Generator) -> Job | None:
    """Return the living job that holds the folder; if none does yet, any of them."""
    living = [job for job in jobs if job.alive]
    holders = [job for job in living if job.trains]
    if len(holders) > 1:
        raise RuntimeError(f"{len(holders)} living processes hold {run_dir}")
    choice = holders or living
    return choice[int(rng.integers(len(choice)))] if choice else None


def _without(folder: Path) -> Path:
    """Remove the leftovers of an interrupted proof, and return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def main() -> None:
    """Prove it for each cell, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="kills of each cell but array")
    parser.add_argument("--cells", default=",".join(CELLS), help="cells, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path("build/prove_resume"), help="keeps what is finished")
    parser.add_argument("--out", type=Path, help="JSON file for the results of all cells that have their kills")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    for cell in args.cells.split(","):
        Proof(args.folder, cell).prove(ARRAY_JOBS if cell == "array" else args.kills)
    if args.out:
        proofs = [Proof(args.folder, cell) for cell in CELLS]
        write_json(args.out, [proof.row() for proof in proofs if proof.ledger])


if __name__ == "__main__":
    main()
