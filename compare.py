"""Compares optimizers, or whole recipes, over batch sizes and seeds, at equal epochs.

    python compare.py --flagfile=flags/comparisons/digits.flags
    python compare.py --recipes=flags/recipes/a.flags,flags/recipes/b.flags --batch_sizes=256,4096 --out=runs/a_or_b

Each optimizer's learning rate is chosen by a search of the same budget, scored on a share of the training images that
is kept apart; then it is trained on all of them, once for each seed, and scored on the test split. The same command
goes on with a comparison that was stopped, also with more --seeds or --batch_sizes. Results: OUT/compare.json,
compare.svg, compare.html, and a run folder for each run.
Exit codes: 0 done; 1 a run ended unasked; 2 a bad flag, or a file that is not there; 75 stopped by a signal.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the first import of TensorFlow
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself only with AVX-512, see BUILD-notes.md

import keras
from absl import flags as absl_flags
from absl import logging
from tqdm import tqdm

import flags
from lars_keras import data as datasets
from lars_keras.data.parallel_map import cores
from lars_keras.files import atomic_write_text
from lars_keras.runtime.errors import UsageError
from lars_keras.versions import versions
from running import exit_codes
from running.errors import in_flags, usage_errors
from running.optimizers import OPTIMIZERS
from running.resume import config_of_flags
from tools.comparison import page
from tools.comparison.search import FIRST_RATES, FIRST_RATES_BATCH, SCALINGS, Candidate, GridCell, Job, grid
from tools.comparison.worker import Failed, config_of, prepare_process, take

MAY_GROW = ("batch_sizes", "seeds")  # settings that a comparison can be gone on with although they differ
PACKAGES = ("lars-keras", "keras", "tensorflow", "tensorflow-cpu", "jax", "numpy")


def define() -> absl_flags.FlagValues:
    """The flags, with their defaults, apart from absl's global ones."""
    own = absl_flags.FlagValues()
    at_least: Any = {"flag_values": own, "lower_bound": 0}
    absl_flags.DEFINE_list(
        "recipes",
        None,
        "Flagfiles of train.py: one, whose optimizer is then exchanged, or several that are compared as they are.",
        flag_values=own,
    )
    absl_flags.DEFINE_multi_enum(
        "optimizer", list(OPTIMIZERS), OPTIMIZERS, "Optimizers to compare; one flag each.", flag_values=own
    )
    absl_flags.DEFINE_list("batch_sizes", None, "Global batches. Default: the recipe's.", flag_values=own)
    absl_flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs that count.", flag_values=own)
    absl_flags.DEFINE_float("epochs", None, "Takes the place of the recipe's.", **at_least)
    absl_flags.DEFINE_integer(
        "tuning_runs",
        5,
        "At most so many runs choose the rate in each cell. 0: the recipe's rate is kept, and another optimizer takes "
        "the rate where its search would begin.",
        **at_least,
    )
    absl_flags.DEFINE_float("factor", 3.0, "Between neighbouring rates of the search.", flag_values=own)
    absl_flags.DEFINE_enum(
        "scaling", "sqrt", list(SCALINGS), "Of the first rate, with the batch size it is meant for.", flag_values=own
    )
    absl_flags.DEFINE_float(
        "validation_split", 0.1, "Of the training images, to choose rates by; at most 0.5.", **at_least, upper_bound=0.5
    )
    absl_flags.DEFINE_string("data_dir", None, "Takes the place of the recipe's.", flag_values=own)
    absl_flags.DEFINE_string("out", "runs/compare", "Folder for the results.", flag_values=own)
    absl_flags.DEFINE_integer(
        "workers", None, "Runs at a time. Default: one for each core; one where there is an accelerator.", **at_least
    )
    absl_flags.DEFINE_bool("help", False, "Show all flags.", short_name="h", flag_values=own)
    return own


def candidates_of(own: absl_flags.FlagValues) -> list[Candidate]:
    """The optimizers on one recipe, or the recipes."""
    if not own.recipes:
        raise UsageError("--recipes is needed: one flagfile of train.py, or several. Received: none")
    configs = {Path(name).stem: _recipe(name, own) for name in own.recipes}
    if len(configs) < len(own.recipes):
        raise UsageError(f"--recipes need file names that differ. Received: {','.join(own.recipes)}")
    if len(configs) > 1:
        if not own["optimizer"].using_default_value:
            raise UsageError("--optimizer goes with one recipe; several are compared as they are.")
        if not own.batch_sizes and len({c.batch_size for c in configs.values()}) > 1:
            raise UsageError("--batch_sizes is needed, because the recipes have several. Received: none")
        return [Candidate(name, c, c.learning_rate, c.batch_size, own.scaling) for name, c in configs.items()]
    (config,) = configs.values()
    found = []
    for name in own.optimizer:
        rate, batch_size = FIRST_RATES[name], FIRST_RATES_BATCH
        if name == config.optimizer and not own.tuning_runs:
            rate, batch_size = config.learning_rate, config.batch_size
        found.append(Candidate(name, dataclasses.replace(config, optimizer=name), rate, batch_size, own.scaling))
    return found


def _recipe(name: str, own: absl_flags.FlagValues) -> flags.RunConfig:
    if not Path(name).is_file():
        raise UsageError(f"--recipes: there is no file {name}.")
    values, arguments = flags.parse(["train.py", f"--flagfile={name}"])
    if arguments:
        raise UsageError(f"--recipes={name} holds what is no flag: {' '.join(arguments)}")
    changed: dict[str, Any] = {key: own[key].value for key in ("epochs", "data_dir") if own[key].value is not None}
    if "epochs" in changed:
        changed["steps"] = None
    return dataclasses.replace(flags.read(values), **changed)


def _whole_numbers(own: absl_flags.FlagValues, name: str, least: int) -> list[int]:
    texts: list[str] = own[name].value or []
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UsageError(
            f"--{name} must be whole numbers of at least {least}, such as 1,2. Received: {','.join(texts)}"
        )
    return sorted(set(numbers))


class ResultsStore:
    """`OUT/compare.json`: the settings, and the outcome of every run that is finished, whole after each.

    Raises:
        UsageError: if the file is damaged, or of a comparison of other settings; `MAY_GROW` may be others.
    """

    def __init__(self, out: Path, about: dict[str, Any], cells: list[GridCell]):
        self._path, self._about, self._cells = out / "compare.json", about, cells
        self.outcomes: dict[str, Any] = {}
        self._earlier, self._began = 0.0, time.monotonic()
        if not self._path.exists():
            return
        try:
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self.outcomes, self._earlier = before["runs"], before["wall_seconds"]
            settings = before["settings"]
        except (ValueError, KeyError) as e:
            raise UsageError(f"{self._path} is damaged: {e!r}. Name another folder with --out.") from e
        now = about["settings"]
        if "candidates" in settings:  # as this version writes flags
            texts = settings["candidates"].items()
            settings["candidates"] = {name: config_of_flags(text.splitlines()).as_flags() for name, text in texts}
        if other := [name for name in now if name not in MAY_GROW and settings.get(name) != now[name]]:
            raise UsageError(
                f"--out={out} holds a comparison of other settings ({', '.join(other)}). Name another folder."
            )
        for outcome in self.outcomes.values():
            outcome.setdefault("commit", before["commit"])
        if not self.left:  # nothing new will be known, so what made it stays; the table is of what is asked for now
            self._about = about | {name: before[name] for name in about if name not in ("settings", "command")}

    @property
    def commit(self) -> str | None:
        """Of the runs that are taken now."""
        return self._about["commit"]

    @property
    def left(self) -> int:
        """How many runs there may still be."""
        return sum(cell.left(self.outcomes) for cell in self._cells)

    def write(self) -> dict[str, Any]:
        found = self._about | {
            # Of the runs, which may have been taken from several.
            "commit": ", ".join(sorted({o["commit"] or "?" for o in self.outcomes.values()})) or self._about["commit"],
            "wall_seconds": round(self._earlier + time.monotonic() - self._began, 1),
            "left": self.left,
            "table": [cell.row(self.outcomes) for cell in self._cells],
            "runs": self.outcomes,
        }
        atomic_write_text(self._path, json.dumps(found, indent=1) + "\n")
        return found


def compare(cells: list[GridCell], ledger: ResultsStore, out: Path, workers: int, validation_split: float) -> int:
    """Takes all runs that are not in the ledger, `workers` at a time. Returns the exit code."""
    stopping = False

    def end_all() -> None:
        for process in multiprocessing.active_children():
            process.terminate()  # which saves its run

    def stop(*_: Any) -> None:
        nonlocal stopping
        if not stopping:
            end_all()
        stopping = True

    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=prepare_process, initargs=(workers,)
    )
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=len(ledger.outcomes) + ledger.left, initial=len(ledger.outcomes), unit="run", disable=None)
    running: dict[concurrent.futures.Future, Job] = {}
    try:
        while not stopping:
            ready = [job for cell in cells for job in cell.jobs(ledger.outcomes) if job not in running.values()]
            for job in ready[: workers - len(running)]:
                config = config_of(job, out / "runs" / job.name, validation_split)
                running[pool.submit(take, config)] = job
            if not running:
                return 0
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    outcome = future.result()
                except Failed as e:
                    print(f"compare.py: {job.name} failed: {e} See {out}/runs/{job.name}/log.txt.", file=sys.stderr)
                    return 1
                if outcome is None:
                    continue
                ledger.outcomes[job.name] = outcome | {"commit": ledger.commit}
                ledger.write()
                bar.total = len(ledger.outcomes) + ledger.left
                bar.update()
                result = "diverged" if outcome["diverged"] else f"top-1 {outcome['top1']:.2%}"
                took = "" if outcome["seconds"] is None else f"  {outcome['seconds']:.0f} s"
                tqdm.write(f"{len(ledger.outcomes)}/{bar.total}  {job.name}: {result}{took}")
                sys.stdout.flush()
    except concurrent.futures.process.BrokenProcessPool:
        if not stopping:
            names = ", ".join(job.name for job in running.values())
            print(
                f"compare.py: a process was ended from outside during one of {names} (out of memory?). The same "
                "command goes on; fewer --workers need less memory.",
                file=sys.stderr,
            )
            return 1
    finally:
        bar.close()
        if running and not stopping:  # a run has failed, the others shall not go on for nothing
            end_all()
        pool.shutdown(cancel_futures=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print("compare.py: stopped; the same command goes on", file=sys.stderr)
    return exit_codes.PREEMPTED


def main(own: absl_flags.FlagValues) -> int:
    with usage_errors():
        candidates = candidates_of(own)
        config = candidates[0].config
        batch_sizes = _whole_numbers(own, "batch_sizes", 1) if own.batch_sizes else [config.batch_size]
        seeds = _whole_numbers(own, "seeds", 0)
        if own.factor <= 1.0:
            raise UsageError(f"--factor must be above 1. Received: --factor={own.factor:g}")
        if own.tuning_runs and not own.validation_split:
            raise UsageError("--validation_split must be above 0 while --tuning_runs is. Received: 0")
        accelerator = _take_no_accelerator()
        # Made ready here, before several processes want it at once.
        data = {
            (c.config.dataset, c.config.data_dir): datasets.load(
                c.config.dataset,
                data_dir=c.config.data_dir,
                cache="disk" if c.config.cache == "disk" else "none",
                cache_dir=c.config.cache_dir,
            )
            for c in candidates
        }
        candidates = [
            dataclasses.replace(c, num_classes=data[c.config.dataset, c.config.data_dir].num_classes)
            for c in candidates
        ]
        cells = grid(candidates, batch_sizes, own.tuning_runs, own.factor, seeds)
        out = Path(own.out)
        for cell in cells:  # what is wrong with one of the runs is said before the first
            config_of(cell.job(0, seeds[0], tuning=True), out, own.validation_split)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UsageError(f"--out={out} cannot be written: {e.strerror}") from e
        names = [c.name for c in candidates]
        networks = " and ".join(dict.fromkeys(c.config.model for c in candidates))
        sets = " and ".join(dict.fromkeys(c.config.dataset for c in candidates))
        about = {
            "title": f"{networks} on {sets}: {', '.join(names)}",
            "command": f"python compare.py {' '.join(sys.argv[1:])}",
            "machine": f"{platform.machine()}, {cores()} cores",
            "commit": _commit(),
            "versions": versions(PACKAGES),
            "settings": {
                # Where the data are does not matter, and is nobody's business in what is published.
                "candidates": {c.name: dataclasses.replace(c.config, data_dir=None).as_flags() for c in candidates},
                "batch_sizes": batch_sizes,
                "seeds": seeds,
                "backend": keras.config.backend(),
                "tuning_runs": own.tuning_runs,
                "factor": own.factor,
                "scaling": own.scaling,
                "validation_split": own.validation_split,
            },
        }
        ledger = ResultsStore(out, about, cells)
    # On JAX a run takes all cores.
    workers = own.workers or (1 if accelerator or keras.config.backend() == "jax" else cores())
    epochs = ", ".join(dict.fromkeys(f"{c.config.epochs:g}" for c in candidates))
    images = " and ".join(f"{found.num_train:,}" for found in data.values())
    print(f"  compared    {', '.join(names)}: {networks}, {epochs} epochs of {images} images")
    print(f"  batches     {', '.join(map(str, batch_sizes))}; seeds {', '.join(map(str, seeds))}")
    rates = (
        f"each the best of at most {own.tuning_runs} runs, scored on {own.validation_split:g} of the training images"
    )
    print(f"  rates       {rates if own.tuning_runs else 'as they are'}")
    print(f"  runs        {len(ledger.outcomes)} finished, at most {ledger.left} left, {workers} at a time")
    print(f"  results     {out}/compare.html", flush=True)
    code = compare(cells, ledger, out, workers, own.validation_split)
    found = ledger.write()
    page.write(out, found)
    print(page.text(found["table"]))
    print(f"report: {out}/compare.html")
    return code


def _take_no_accelerator() -> bool:
    """Leaves GPUs and TPUs to the processes of the runs; whether TensorFlow has one."""
    import tensorflow as tf

    kinds = [kind for kind in ("GPU", "TPU") if tf.config.list_physical_devices(kind)]
    for kind in kinds:
        tf.config.set_visible_devices([], kind)
    return bool(kinds)


def _commit() -> str | None:
    """The checkout's commit, with -dirty if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(argv: list[str]) -> int:
    """Compares what the flags in `argv` ask for, and gives the process's exit code."""
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of its own deprecations
    own = define()
    try:
        arguments = own(argv)[1:]
        if own.help:
            print(f"{__doc__}\n{own.get_help()}")
            return 0
        if arguments:
            raise UsageError(f"Every argument must be a flag, --name=value. Received: {' '.join(arguments)}")
        return main(own)
    except (absl_flags.Error, UsageError) as e:
        print(f"compare.py: error: {in_flags(str(e))}", file=sys.stderr)
        return exit_codes.USAGE


if __name__ == "__main__":
    sys.exit(run(sys.argv))
