"""Check that the disk has room for a run."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow as tf

from lars_keras.runtime.errors import UsageError
from lars_keras.training import Trainer

MIB = 2**20


def bytes_of(variables: Iterable[Any]) -> int:
    """Return the size of variables in bytes."""
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def checkpoint_bytes(trainer: Trainer) -> int:
    """Return the size of a checkpoint in bytes."""
    return bytes_of([*trainer.model.variables, *trainer.model.optimizer.variables])


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    return path if path.is_dir() else nearest_folder(path.absolute().parent)


def check_disk(run_dir: Path, trainer: Trainer, kept: int) -> None:
    """Check that the disk has room for the checkpoints and the model of a run, beside those that it has already.

    Args:
        run_dir: folder of the run, which may not exist yet.
        trainer: has the model and its optimizer.
        kept: number of checkpoints that are kept.

    Raises:
        UsageError: if it has no room.
    """
    # One more checkpoint than are kept, because the new one is written before the old one goes; and the model.
    written = [*run_dir.glob("checkpoints/update-*.npz"), *run_dir.glob("model.keras")]
    need = checkpoint_bytes(trainer) * (kept + 2) - sum(path.stat().st_size for path in written)
    free = shutil.disk_usage(nearest_folder(run_dir)).free
    if need > free:
        raise UsageError(
            f"--run_dir is on a disk with {free / MIB:,.0f} MiB free, and --keep_checkpoints={kept} needs "
            f"{need / MIB:,.0f} MiB. Keep fewer, or name another --run_dir."
        )
