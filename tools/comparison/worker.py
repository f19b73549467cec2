"""One run of `train.py` in a process that takes one after the other."""

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

import keras

from flags import RunConfig
from lars_keras.runtime.errors import Diverged, Preempted
from running.resume import config_of_flags, flags_of_run
from tools.comparison.search import Job

KEPT = ("top1", "top5", "loss", "n", "updates", "seconds", "images_per_second")
_IN_A_CALL = 4096  # examples: small batches would spend their time between updates


def config_of(job: Job, run_dir: Path, validation_split: float) -> RunConfig:
    """The flags of a run."""
    config = job.candidate.config
    microbatch = config.microbatch_size
    return dataclasses.replace(
        config,
        batch_size=job.batch_size,
        microbatch_size=microbatch and min(microbatch, job.batch_size),
        learning_rate=job.rate,
        seed=job.seed,
        validation_split=validation_split if job.tuning else 0.0,
        run_dir=str(run_dir),
        steps_per_execution=max(config.steps_per_execution, _IN_A_CALL // job.batch_size, 1),
        max_rollbacks=0,  # a rate that diverges is an answer
        keep_checkpoints=1,
    )


_taking, _stopped = False, False


class Failed(Exception):
    """A run ended by an error, which its log tells."""


def _stop(*_: Any) -> None:
    """For SIGTERM outside of training, where `train.main` does not listen for it."""
    global _stopped
    _stopped = True
    if _taking:
        raise Preempted("stopped before or after the training")


def prepare_process(workers: int) -> None:
    """To be called once in each process: gives TensorFlow its share of the cores, and ends it when its parent ends."""
    os.setpgrp()  # Ctrl-C reaches the parent alone, which stops its workers in order
    signal.signal(signal.SIGTERM, _stop)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    import tensorflow as tf
    from absl import logging

    from lars_keras.data.parallel_map import cores

    logging.set_verbosity(logging.ERROR)
    tf.get_logger().setLevel("ERROR")  # it warns of functions that are traced anew, as those of each run are
    tf.config.threading.set_intra_op_parallelism_threads(max(cores() // workers, 1))


def take(config: RunConfig) -> dict[str, Any] | None:
    """Takes a run to its end, from its start or from where it was stopped.

    Returns:
        `KEPT` of its results, and whether it `diverged`; None if a signal stopped it.

    Raises:
        Failed: if it ended by an error, or its folder holds a run of other flags.
    """
    global _taking
    if _stopped:
        return None
    run_dir = Path(config.run_dir or "")
    results = run_dir / "results.json"
    if results.exists():  # this process's predecessor ended before it could tell
        if _flags_in(run_dir) != _lines(config.as_flags()):
            raise Failed("its folder holds a run of other flags: remove it, or name another --out.")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (
            open(run_dir / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            _taking = True
            try:
                import train

                train.main(config)
            except Diverged:
                return {**dict.fromkeys(KEPT), "top1": 0.0, "top5": 0.0, "diverged": True}
            except Preempted:
                return None
            except Exception as e:
                traceback.print_exc()
                raise Failed(f"{type(e).__name__}: {e}") from None
            finally:
                _taking = False
                keras.utils.clear_session()
                gc.collect()
    found = json.loads(results.read_text(encoding="utf-8"))
    return {**{name: found[name] for name in KEPT}, "diverged": False}


def _flags_in(run_dir: Path) -> list[str]:
    return _lines(config_of_flags(flags_of_run(str(run_dir))).as_flags())


def _lines(flags: str) -> list[str]:
    return [line for line in flags.splitlines() if not line.startswith("--data_dir=")]
