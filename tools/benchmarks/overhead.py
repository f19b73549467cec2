"""Time guard, layer norms, log and checkpoints against the bare loop, on the demo.

    python -m tools.benchmarks.overhead --out=results/overhead.json

Both loops train the demo's model on the demo's data, a few updates each, in turn, in one process.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import models
from lars_keras import LARS
from lars_keras.data import ImageData, load
from lars_keras.report.log import MetricsLog
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.divergence import DivergenceGuard
from lars_keras.runtime.preemption import StopOnSignal
from lars_keras.runtime.recovery import CheckpointCallback, fit_with_recovery
from lars_keras.runtime.unreadable_images import UnreadableImageLimit
from lars_keras.training import Trainer
from tools.committed import write_json


def make_trainer(data: ImageData, jit_compile: bool, variable_norms: bool) -> Trainer:
    """Return the demo's model under a `Trainer`."""
    model = models.get(
        "alexnet_small", num_classes=10, input_shape=data.image_shape, mean=data.mean, std=data.std, seed=0
    )
    model.compile(
        LARS(0.1),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
    )
    return Trainer(model, batch_size=8192, microbatch_size=512, jit_compile=jit_compile, variable_norms=variable_norms)


def measure(data: ImageData, updates: int, rounds: int, save_every: int, jit_compile: bool) -> dict[str, list[float]]:
    """Return the seconds per update of each round, without the first round of each loop, which compiles."""
    bare, full = (make_trainer(data, jit_compile, norms) for norms in (False, True))

    def feed(context: tf.distribute.InputContext, first_update: int) -> tf.data.Dataset:
        return data.train_batches(512, first=first_update * 16).map(lambda x, y, m: (x, tf.one_hot(y, 10), m))

    options: dict[str, Any] = {"epochs": 1, "steps_per_epoch": updates, "verbose": 0}
    seconds: dict[str, list[float]] = {"bare": [], "full": []}
    with tempfile.TemporaryDirectory() as folder, StopOnSignal() as stop:
        save = CheckpointCallback(full, CheckpointManager(Path(folder) / "c"), SavePolicy(save_every), {})
        callbacks = [DivergenceGuard(full), MetricsLog(folder), UnreadableImageLimit(data, 100), stop]
        for i in range(rounds + 1):
            for name, run in (
                ("bare", lambda: bare.fit(feed, **options)),
                ("full", lambda: fit_with_recovery(feed, save, callbacks=callbacks, **options)),
            ):
                started = time.perf_counter()
                run()
                if i:
                    seconds[name].append((time.perf_counter() - started) / updates)
                    print(f"round {i}  {name}  {seconds[name][-1]:.3f} s per update", flush=True)
    return seconds


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save_every", type=int, default=4, help="updates between checkpoints")
    parser.add_argument("--data_dir")
    parser.add_argument("--jit_compile", action="store_true")
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    seconds = measure(
        load("digits", data_dir=args.data_dir), args.updates, args.rounds, args.save_every, args.jit_compile
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(f / b for f, b in zip(seconds["full"], seconds["bare"], strict=True))
    print(
        f"median of {args.rounds} rounds of {args.updates} updates, a checkpoint every {args.save_every}: "
        f"bare {medians['bare']:.3f} s, full {medians['full']:.3f} s, ratio {ratio:.3f} (median of the rounds)\n"
        f"{os.cpu_count()} cores, {platform.machine()}, tensorflow {tf.__version__}, keras {keras.__version__}"
    )
    if args.out:
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "cores": os.cpu_count()}
        settings = {"updates": args.updates, "save_every": args.save_every, "jit_compile": args.jit_compile}
        result = {"ratio": ratio, "seconds_per_update": seconds, "settings": settings, "versions": versions}
        write_json(Path(args.out), result)


if __name__ == "__main__":
    main()
