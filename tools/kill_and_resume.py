"""Kill real runs at random moments and compare their final states: `make prove-resume`, in short in the tests.

    python -m tools.kill_and_resume --kills=20 --out=results/resume.json
    KERAS_BACKEND=jax python -m tools.kill_and_resume --kills=8 --steps=60 --out=results/resume_jax.json

A run of train.py trains on small random images, with augmentation, dropout, EMA weights and micro-batches. It is killed
by SIGKILL after a random time and started again, until it ends. Its model, optimizer and metrics must equal those of a
run that was never killed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.committed import write_json

Arrays = dict[str, np.ndarray]
Log = list[dict[str, Any]]

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--model=alexnet_small_lrn",  # has dropout
    "--dataset=cifar10",
    "--batch_size=96",
    "--microbatch_size=16",
    "--epochs=5",
    "--warmup=1",
    "--learning_rate=2",
    "--excluded_lr_scale=0.01",
    "--ema_momentum=0.9",
    "--checkpoint_updates=1",
)
SEVERAL_DEVICES = ["--strategy=mirrored", "--replicas=2"]
if os.environ.get("KERAS_BACKEND") == "jax":
    SEVERAL_DEVICES = ["--strategy=mirrored", "--replicas=8", "--microbatch_size=4", "--shard_optimizer_state"]


def write_images(folder: Path, train: int = 500, test: int = 200) -> None:
    """Write random images as the data set cifar10, which is augmented by crops and flips."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)

    def split(n: int) -> Iterator[Any]:
        for i in range(n):
            yield i, {"id": str(i), "image": rng.integers(0, 256, (32, 32, 3), np.uint8), "label": i % 10}

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version="3.0.2",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": split(train), "test": split(test)},
        data_dir=folder,
    )


def start(run_dir: Path, data_dir: Path, *more: str) -> subprocess.Popen:
    """Start `train.py` in a process of its own."""
    command = [sys.executable, "train.py", *FLAGS, f"--data_dir={data_dir}", f"--run_dir={run_dir}", *more]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name in ("INTEROP", "INTRAOP"):  # the order of a parallel sum follows the number of threads
        environment[f"TF_NUM_{name}_THREADS"] = "2"
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    """Wait for the end of a process and return its output.

    Raises:
        RuntimeError: if it failed.
    """
    output = process.communicate(timeout=600)[0].decode()
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}:\n{output}")
    return output


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
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "data_wait")
    log = [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] in ("update", "eval")]
    return arrays, log


def difference(a: tuple[Arrays, Log], b: tuple[Arrays, Log]) -> float:
    """Return the largest relative difference of two outcomes: 0 only if they are the same to the last bit."""
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
        pairs += [(np.float64(e[k]), np.float64(f[k])) for k in e if isinstance(e[k], (int, float))]
    worst = 0.0
    for x, y in pairs:
        if not np.array_equal(x, y):
            x, y = np.asarray(x, "f8"), np.asarray(y, "f8")
            worst = max(worst, float(np.linalg.norm(x - y) / max(float(np.linalg.norm(y)), 1e-30)))
    return worst


def last_update(run_dir: Path) -> int:
    """Return the last update in the log, which the next process cuts back to its checkpoint."""
    path = run_dir / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["update"] if lines else 0


def killed(
    run_dir: Path, data_dir: Path, kills: int, rng: np.random.Generator, *more: str, log: Callable[..., None] = print
) -> Log:
    """Train to the end, killed `kills` times, and return where each kill came."""
    moments: Log = []
    while len(moments) < kills:
        metrics, first = run_dir / "metrics.jsonl", last_update(run_dir)
        process = start(run_dir, data_dir, *more)
        while process.poll() is None and last_update(run_dir) <= first:
            time.sleep(0.01)  # until this process has finished an update of its own
        time.sleep(rng.uniform(0, 2))
        if process.poll() is not None:
            finish(process)
            raise RuntimeError(f"The run ended after {len(moments)} kills; it needs more updates.")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        moments.append({"checkpoints": names, "logged": json.loads(lines[-1]) if lines else None})
        log(f"kill {len(moments)}: {names[-1] if names else 'no checkpoint'}, half written: {names[0][0] == '.'}")
    finish(start(run_dir, data_dir, *more))
    return moments


def prove(
    kills: int, strategy: list[str], seed: int = 0, steps: int | None = None, log: Callable[..., None] = print
) -> dict[str, Any]:
    """Compare a run that is killed `kills` times with one that is not."""
    rng = np.random.default_rng(seed)
    more = [*strategy, *([f"--steps={steps}"] if steps else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        finish(start(folder / "whole", folder, *more))
        moments = killed(folder / "killed", folder, kills, rng, *more, log=log)
        whole, again = outcome(folder / "whole"), outcome(folder / "killed")
    return {"kills": kills, "flags": list(more), "relative_difference": difference(again, whole), "moments": moments}


def main() -> None:
    """Prove it on one device and on several, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    results = []
    for strategy in (["--strategy=single"], SEVERAL_DEVICES):
        results.append(prove(args.kills, strategy, steps=args.steps))
        print(f"{' '.join(strategy)}: relative difference {results[-1]['relative_difference']:.3g}", flush=True)
    if args.out:
        write_json(Path(args.out), results)
    one, two = (r["relative_difference"] for r in results)
    sys.exit(f"not the same: {one}, {two}" if one != 0 or not two < 1e-5 else 0)


if __name__ == "__main__":
    main()
