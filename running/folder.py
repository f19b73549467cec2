"""The run folder, and the files that describe the run in it."""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import keras

from flags.config import RunConfig
from lars_keras._keras_internals import inner_optimizer
from lars_keras.data import ImageData
from lars_keras.files import atomic_write_text, local_path, printable
from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.folder_lock import lock_folder
from lars_keras.versions import versions
from running.plan import Plan
from running.resume import refuse_finished

FACTS = ("fingerprint", "image_shape", "num_classes", "class_names", "mean", "std")
"""Attributes of `ImageData` that `config.json` keeps as "data". Earlier versions kept nothing."""

_PACKAGES = (
    "lars-keras",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-tpu",
    "jax",
    "numpy",
    "tensorflow-datasets",
)


def open_run_dir(config: RunConfig) -> Path:
    """Return the path of the run's folder. `hold_run_dir` creates it.

    Raises:
        ValueError: if it is not on a local disk.
        UsageError: if its name is not UTF-8, or the run in it is finished.
    """
    if not config.run_dir:
        name = f"{config.model.replace(':', '.')}-{config.dataset}-{config.batch_size}-{config.optimizer}"
        return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(4)}"
    path = path_of(config.run_dir)
    refuse_finished(path, config)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--run_dir={path} is not a folder.")
    return path


def path_of(run_dir: str) -> Path:
    """Return the value of --run_dir as a path.

    Raises:
        ValueError: if it is not on a local disk.
        UsageError: if it is not UTF-8.
    """
    path = local_path(run_dir, "run_dir")
    if printable(str(path)) != str(path):  # TensorFlow and the report take UTF-8 only
        raise UsageError(f"--run_dir must be UTF-8. Received: --run_dir={printable(str(path))}")
    return path


@contextlib.contextmanager
def hold_run_dir(path: Path, config: RunConfig) -> Iterator[None]:
    """Hold the folder for this process. A folder with the default name must be new.

    Raises:
        UsageError: if it cannot be written, another process holds it, or its run was finished in the meantime.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock_folder(path, "run_dir", must_be_new=not config.run_dir))
        except OSError as e:
            raise UsageError(f"--run_dir={path} cannot be written: {e.strerror}") from e
        refuse_finished(path, config)
        yield


def write_plan(
    path: Path, config: RunConfig, data: ImageData, plan: Plan, optimizer: keras.optimizers.Optimizer
) -> None:
    """Create the folder with `flags.txt`, `config.json` and `plan.txt`.

    Raises:
        UsageError: if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path / "plan.txt", plan.text + "\n")
    except OSError as e:
        raise UsageError(f"--run_dir={path} cannot be written: {e.strerror}") from e
    optimizer = inner_optimizer(optimizer)
    rows = optimizer.layer_plan() if hasattr(optimizer, "layer_plan") else []
    settings = {
        **{name: value for name, value in dataclasses.asdict(config).items() if config.applies(name)},
        "warnings": plan.warnings,
        "peak_learning_rate": float(plan.rates.max()),
        "warmup_updates": config.warmup_updates(data.num_train),
        "versions": all_versions(),
        "data": {name: getattr(data, name) for name in FACTS},
        "layer_plan": [dataclasses.asdict(row) for row in rows],
    }
    atomic_write_text(path / "config.json", json.dumps(settings, indent=2) + "\n")
    atomic_write_text(path / "flags.txt", config.as_flags())


def all_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run, and the Keras backend."""
    return {**versions(_PACKAGES), "keras_backend": keras.backend.backend()}
