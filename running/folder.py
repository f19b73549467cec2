"""The run folder: what was asked for, and what came of it."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import keras

from flags.config import RunConfig
from lars_keras.files import atomic_write_text
from lars_keras.runtime.errors import UsageError
from lars_keras.versions import versions

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
    """Path of the run's folder, which is not created before the run is known to be able to start.

    Raises:
        UsageError: if its run is finished, or, for `--eval_only`, if it holds none.
    """
    if not config.run_dir:
        name = f"{config.model}-{config.dataset}-{config.batch_size}-{config.optimizer}"
        return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    path = Path(config.run_dir)
    if config.eval_only:
        if not (path / "model.keras").is_file():
            raise UsageError(f"--eval_only found no model.keras in --run_dir={path}")
    elif (path / "results.json").exists():
        raise UsageError(
            f"--run_dir={path} holds a finished run, and nothing is written over. Name another folder, or give "
            "--eval_only to score its model."
        )
    elif path.exists() and not path.is_dir():
        raise UsageError(f"--run_dir={path} is not a folder.")
    return path


def write_plan(
    path: Path, config: RunConfig, plan: str, warnings: list[str], optimizer: keras.optimizers.Optimizer
) -> None:
    """Creates the folder with `flags.txt`, `config.json` and `plan.txt`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path / "plan.txt", plan + "\n")
    except OSError as e:
        raise UsageError(f"--run_dir={path} cannot be written: {e.strerror}") from e
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    rows = optimizer.layer_plan() if hasattr(optimizer, "layer_plan") else []
    settings = {
        **dataclasses.asdict(config),
        "warnings": warnings,
        "versions": _versions(),
        "layer_plan": [dataclasses.asdict(row) for row in rows],
    }
    atomic_write_text(path / "config.json", json.dumps(settings, indent=2) + "\n")
    atomic_write_text(path / "flags.txt", config.as_flags())


def write_results(path: Path, scores: dict[str, float], **measured: Any) -> None:
    """Writes `results.json`: the last scores, what was measured on the way, and the versions of everything."""
    results = {**scores, "n": round(scores["n"]), **measured, "versions": _versions()}
    atomic_write_text(path / "results.json", json.dumps(results, indent=2) + "\n")


def _versions() -> dict[str, str]:
    return {**versions(_PACKAGES), "keras_backend": keras.backend.backend()}
