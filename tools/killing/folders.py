"""Look at the folders that runs leave: whole files, nothing lost, and the same numbers."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.killing.moments import last_event
from tools.killing.runs import UPDATES_PER_EPOCH

Arrays = dict[str, np.ndarray]
Log = list[dict[str, Any]]
KEPT = 3  # checkpoints


def outcome(run_dir: Path) -> tuple[Arrays, Log]:
    """Return the arrays of the saved model and of the last checkpoint, and the log without its times."""
    import h5py

    arrays: Arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", run_dir / "model.keras", folder], check=True)
        with h5py.File(Path(folder) / "model.weights.h5") as file:
            file.visititems(lambda name, item: arrays.update({name: item[()]} if hasattr(item, "dtype") else {}))
    newest = max((run_dir / "checkpoints").glob("update-*.npz"))
    with np.load(newest) as file:
        arrays.update({f"checkpoint/{name}": file[name] for name in file.files if name != "info"})
    timed = ("seconds", "images_per_second", "data_wait")
    log = [{k: v for k, v in e.items() if k not in timed} for e in _events(run_dir) if e["event"] in ("update", "eval")]
    results = json.loads((run_dir / "results.json").read_text())
    log.append({"event": "results", **{name: results[name] for name in ("top1", "top5", "loss", "n", "updates")}})
    return arrays, log


def difference(a: tuple[Arrays, Log], b: tuple[Arrays, Log]) -> float:
    """Return the largest relative difference of two outcomes: 0 only if all numbers are the same.

    A NaN is the same as a NaN. The difference is infinite where only one of two is a number, or is finite.
    """
    arrays, log = a
    other_arrays, other_log = b
    if list(arrays) != list(other_arrays) or len(log) != len(other_log):
        return float("inf")
    pairs: list[tuple[Any, Any]] = [
        (arrays[k], other_arrays[k]) for k in arrays if not k.startswith("checkpoint/metric")
    ]
    for e, f in zip(log, other_log, strict=True):
        if list(e) != list(f) or e["event"] != f["event"]:
            return float("inf")
        for x, y in ((e[k], f[k]) for k in e):
            if isinstance(x, (int, float)) and isinstance(y, (int, float)):
                pairs.append((np.float64(x), np.float64(y)))
            elif x != y:  # as null, which stands for a number that is not finite
                return float("inf")
    return max((_relative(x, y) for x, y in pairs), default=0.0)


def _relative(x: np.ndarray, y: np.ndarray) -> float:
    """Return the relative difference of two arrays, infinite if it is no finite number."""
    if np.array_equal(x, y, equal_nan=x.dtype.kind == y.dtype.kind == "f"):
        return 0.0
    if x.shape != y.shape:
        return float("inf")
    x, y = np.asarray(x, "f8"), np.asarray(y, "f8")
    with np.errstate(invalid="ignore", over="ignore"):
        found = float(np.linalg.norm(x - y) / max(float(np.linalg.norm(y)), 1e-30))
    return found if np.isfinite(found) else float("inf")


def examine(run_dir: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Check the files of a run that was killed or has ended, and return their contents.

    Args:
        run_dir: its folder.
        before: what was returned after the kill before; empty at first.

    Raises:
        RuntimeError: if a file is torn, a checkpoint is lost, or the log has a gap.
    """
    checkpoints = sorted((run_dir / "checkpoints").glob("update-*.npz"))
    for path in checkpoints:
        if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.rpartition("-")[2]:
            raise RuntimeError(f"{path} is torn")
    for name in ("config.json", "results.json"):
        if (run_dir / name).exists():
            json.loads((run_dir / name).read_text())
    for name in ("flags.txt", "plan.txt"):
        if (run_dir / name).exists() and not (run_dir / name).read_text().endswith("\n"):
            raise RuntimeError(f"{run_dir / name} is torn")
    if (run_dir / "model.keras").exists():
        with zipfile.ZipFile(run_dir / "model.keras") as archive:
            if (bad := archive.testzip()) is not None:
                raise RuntimeError(f"{run_dir / 'model.keras'} is torn: {bad}")
    updates = [e["update"] for e in _events(run_dir) if e["event"] == "update"]
    if updates != list(range(1, len(updates) + 1)):
        raise RuntimeError(f"The log has the updates {updates}")
    found = [int(path.name.split("-")[1]) for path in checkpoints]
    kept = before.get("checkpoints", [])
    if len(found) < min(KEPT, len(kept)) or max(found, default=-1) < max(kept, default=-1):
        raise RuntimeError(f"Checkpoints were lost: {found} of {kept}")
    if (run_dir / "results.json").exists():
        left = [path.name for path in run_dir.rglob("*") if path.name.startswith(".w")]
        if left or not (run_dir / "report.html").exists():
            raise RuntimeError(f"A finished run has left {left}, or no report")
    return {"checkpoints": found, "logged": len(updates)}


def seen(run_dir: Path, trains: bool, started: float, steps: int) -> str:
    """Return the activity in which a run was killed, judged by its files.

    Args:
        run_dir: its folder.
        trains: True if it had come to hold the folder.
        started: time of its start.
        steps: updates of the run.
    """
    half = [*run_dir.glob(".writing-*"), *run_dir.glob("checkpoints/.writing-*")]
    if any(path.stat().st_mtime > started for path in half):
        return "writing a file"
    if not trains:
        return "starting"
    event = last_event(run_dir)
    if event["event"] == "update" and event["update"] % UPDATES_PER_EPOCH == 0:
        return "evaluating"
    return "ending" if event["update"] >= steps else "updating"


def _events(run_dir: Path) -> Log:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
