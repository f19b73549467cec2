"""Resume an interrupted run, from the first look at its folder to the note in its report.

1. The command line names a folder. `flags_of_run` returns the flags of the run in it, and the flags of the command line
   are parsed on top of them. So `train.py --run_dir=RUN` is enough.
2. `refuse_finished` refuses a run that has its results.
3. `RunCheckpoints` finds the newest undamaged checkpoint, with today's names.
4. `resume` checks that all hosts found the same checkpoint, and that the run would go on exactly as it was started. It
   restores the trainer, and reads which images were unreadable. Each later checkpoint saves `Resumed.record`.
5. `lars_keras.report.log.MetricsLog` drops the lines of the log beyond the checkpoint. `Resumed.notes` are logged,
   printed with the plan and shown in the report.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import flags
from flags import RunConfig
from lars_keras.data import ImageData
from lars_keras.files import local_path
from lars_keras.runtime.checkpoint import Checkpoint, CheckpointManager
from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.recovery import require_same_checkpoint
from lars_keras.training import Trainer
from running import renamed
from running.errors import usage_errors
from running.optimizers import make_schedule

BAD_IMAGES = "bad_images.json"


def flags_of_run(run_dir: str) -> list[str]:
    """Return the flags of the run in a folder, one a line; none if there is no run.

    Raises:
        OSError, UnicodeDecodeError: if the flags cannot be read.
        UsageError: if the folder is not on a local disk.
    """
    with usage_errors():
        path = local_path(run_dir, "run_dir") / "flags.txt"
    return renamed.flag_lines(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else []


def config_of_flags(lines: Sequence[str]) -> RunConfig:
    """Return the flags of a run, as written by any version, as a `RunConfig`."""
    values, _ = flags.parse(["train.py", "--run_dir=."], lambda _: renamed.flag_lines(lines))
    return dataclasses.replace(flags.read(values), run_dir=None)


def refuse_finished(run_dir: Path, config: RunConfig | None = None) -> None:
    """Refuse a folder whose run is finished, unless the flags ask for another length.

    Raises:
        UsageError: if the run is finished.
    """
    if not (run_dir / "results.json").exists():
        return
    lines = flags_of_run(str(run_dir))
    before = config_of_flags(lines) if config and lines else config
    if config is None or before is None or (config.epochs, config.steps) == (before.epochs, before.steps):
        raise UsageError(
            f"--run_dir={run_dir} holds a finished run, and nothing is written over. Name another folder, give "
            f"--eval_only to score its model, or {_more(before)}, to go on with it."
        )


def _more(config: RunConfig | None) -> str:
    """Return the flags that extend a run; --epochs has no effect beside --steps."""
    length = "epochs" if config is None or config.steps is None else "steps"
    return f"more --{length}, with --allow_inexact_resume where the schedule depends on the length"


def set_results_aside(run_dir: Path, update: int) -> None:
    """Rename the results of a finished run, which goes on after `update`."""
    path = run_dir / "results.json"
    if path.exists():
        path.rename(run_dir / f"results-{update:08d}.json")


class RunCheckpoints(CheckpointManager):
    """The checkpoints of a run folder, even if an earlier version wrote them."""

    def __init__(self, run_dir: Path, config: RunConfig):
        super().__init__(
            run_dir / "checkpoints",
            max_to_keep=config.keep_checkpoints,
            keep_every_n_hours=config.keep_checkpoint_hours,
        )

    def latest(self) -> Checkpoint | None:
        found = super().latest()
        return found and dataclasses.replace(found, metadata=renamed.checkpoint_metadata(found.metadata))


@dataclasses.dataclass
class Resumed:
    """The start of a run: anew, or from a checkpoint.

    Attributes:
        record: values to save with each checkpoint: flags, replicas, backend and fingerprint of the data.
        notes: sentences for the plan, the log and the report; none for a new run.
        changed: True if the run goes on with other flags or data than the checkpoint's.
    """

    record: dict[str, Any]
    notes: list[str]
    changed: bool = False


def resume(
    config: RunConfig,
    checkpoints: RunCheckpoints,
    run_dir: Path,
    trainer: Trainer,
    data: ImageData,
    train_feed: Any,
) -> Resumed:
    """Restore the trainer from the newest checkpoint, if there is one. A dry run begins at the start.

    Raises:
        UsageError: if the run would not go on exactly as it was started, and that is not allowed; if the checkpoint is
            past the end of the run; if the hosts found different checkpoints.
    """
    record = {
        "flags": dataclasses.asdict(config),
        "replicas": trainer.replicas,
        "backend": keras.backend.backend(),
        "data": data.fingerprint,
    }
    checkpoint = None if config.dry_run else checkpoints.latest()
    require_same_checkpoint(trainer.cluster, checkpoint)
    data.unreadable_images.load(run_dir / BAD_IMAGES)
    finished = None if config.dry_run else _finished_updates(run_dir)
    if finished is not None and (checkpoint is None or checkpoint.update < finished):
        raise UsageError(f"--run_dir={config.run_dir} holds a finished run without a checkpoint of its last state.")
    if checkpoint is None:
        if damaged := checkpoints.damaged:
            raise UsageError(
                f"--run_dir={config.run_dir} holds a run whose checkpoints are all damaged; the newest is "
                f"{damaged[0].name}. Put them back, or remove them to start anew."
            )
        return Resumed(record, [])
    changes = _changes(config, trainer, checkpoint, data)
    if changes and not config.allow_inexact_resume:
        raise UsageError(
            f"--run_dir={config.run_dir} was started with different data or flags: {'; '.join(changes)}. Give it "
            + ("the same data, and the same flags or none, to go on exactly, " if finished is None else "")
            + "another --run_dir to start anew, or --allow_inexact_resume."
        )
    total = config.total_updates(data.num_train)
    if checkpoint.update > total or checkpoint.update == total == finished:
        relation = "all of" if checkpoint.update == total else "more than"
        raise UsageError(
            f"--run_dir={config.run_dir} holds a run that has taken {checkpoint.update} updates, {relation} the "
            f"{total} that the flags now ask for. Give another --run_dir, or {_more(config)}."
        )
    trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], train_feed)
    notes = [f"went on after update {checkpoint.update}, from {checkpoint.path.name}"]
    if changes:
        notes.append(f"went on inexactly: {'; '.join(changes)}")
    as_saved = json.loads(json.dumps(record["flags"]))
    changed = bool(changes) or as_saved != checkpoint.metadata["flags"]
    return Resumed(record, notes, changed)


def _finished_updates(run_dir: Path) -> int | None:
    """Return the updates of a finished run; None if it is not finished."""
    try:
        return int(json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["updates"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as e:
        raise UsageError(f"--run_dir={run_dir} has a damaged results.json: {e!r}") from e


def _rates(config: RunConfig, num_train: int, updates: int) -> np.ndarray:
    """Return the learning rates of the first updates."""
    schedule = make_schedule(**config.schedule_arguments(num_train))
    return np.asarray(keras.ops.convert_to_numpy(schedule(np.arange(updates))))


def _changes(config: RunConfig, trainer: Trainer, checkpoint: Checkpoint, data: ImageData) -> list[str]:
    """Return the differences between this run and the one of a checkpoint, a phrase each.

    Another length is not a change if the learning rates of the finished updates stay the same. Checkpoints of earlier
    versions do not have the fingerprint of their data.
    """
    found, before = [], checkpoint.metadata
    length = {name: before["flags"].get(name, getattr(config, name)) for name in ("epochs", "steps")}
    earlier = dataclasses.replace(config, **length)
    rates, rates_then = (_rates(c, data.num_train, checkpoint.update) for c in (config, earlier))
    same_rates = np.array_equal(rates, rates_then)
    for field in dataclasses.fields(config):
        if field.name in length and same_rates:
            continue
        now, then = getattr(config, field.name), before["flags"].get(field.name, field.default)
        then = tuple(then) if isinstance(then, list) else then
        if now != then and field.metadata["affects_result"] and config.applies(field.name):
            found.append(f"--{field.name}={now} was {then}")
    if before["replicas"] != trainer.replicas:
        found.append(f"replicas: {trainer.replicas}, was {before['replicas']}")
    backend = before.get("backend", "tensorflow")
    if backend != keras.backend.backend():
        found.append(f"KERAS_BACKEND={keras.backend.backend()}, was {backend}")
    if before.get("data", data.fingerprint) != data.fingerprint:
        found.append(f"data: {data.fingerprint or 'unknown'}, was {before['data'] or 'unknown'}")
    return found
