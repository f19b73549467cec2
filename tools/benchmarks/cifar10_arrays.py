"""Train recipes of CIFAR-10 where TensorFlow is not installed, as on most GPU machines with JAX.

    python -m tools.benchmarks.cifar10_arrays --pack --data_dir=DIR --images=cifar10.npz
    KERAS_BACKEND=jax python -m tools.benchmarks.cifar10_arrays --images=cifar10.npz --out=results/cifar10_gpu.jsonl \
        --flagfile=flags/recipes/cifar10_fast_1k.flags --seed=1

`train.py` needs TensorFlow to read its data. The first command writes the images as arrays, and needs TensorFlow. The
second takes the flags of `train.py`, trains on the same batches in the same order, and appends a row to the file of
`--out`. It keeps no run folder and cannot be resumed. `--runs=FILE` trains several runs, `--at_once` of them at a time:
each line of the file has the flags of one.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models
from flags import parsing
from flags.config import RunConfig
from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import pad_crop_flip
from lars_keras.data.shuffle import example_ids
from lars_keras.data.subset import holdout
from lars_keras.training import Trainer
from lars_keras.versions import versions
from running.devices import start_devices
from running.model import compile_model, make_model, scoring
from tools.benchmarks.machines import machine

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# What a row tells of a run beside its scores.
SETTINGS = (
    *("model", "optimizer", "batch_size", "microbatch_size", "epochs", "seed", "learning_rate", "schedule", "power"),
    *("warmup", "initial_lr_scale", "end_lr_scale", "momentum", "nesterov", "weight_decay", "trust_coefficient"),
    *("excluded_lr_scale", "bias_lr_scale", "ema_momentum", "ema_overwrite_every", "label_smoothing", "augment"),
    *("precision", "test_views", "validation_split"),
)


def pack(data_dir: str | None, images: Path) -> None:
    """Write CIFAR-10 of tensorflow-datasets as an `.npz` file of uint8 arrays, named as in `ARRAYS`."""
    from lars_keras import data as datasets

    data = datasets.load("cifar10", data_dir=data_dir)
    *shuffled, _ = next(data.train_numpy(data.num_train, augment=False))
    ids, _ = example_ids(np.arange(data.num_train, dtype=np.uint64), data.num_train, seed=0)
    train = [part[np.argsort(ids)] for part in shuffled]
    *test, _ = next(data.test_numpy(data.num_test))
    held: dict[str, Any] = {name: a.astype(np.uint8) for name, a in zip(ARRAYS, [*train, *test], strict=True)}
    np.savez(images, **held)


def load(images: Path, config: RunConfig) -> ArrayData:
    """Return the data set of an `.npz` file, with the augmentation and the split of a run."""
    with np.load(images) as held:
        x, y, *test = (held[name] for name in ARRAYS)
    if config.validation_split:
        kept, held_out = holdout(len(x), config.validation_split)
        test, (x, y) = [x[held_out], y[held_out]], (x[kept], y[kept])
    return ArrayData("cifar10", (x, y), (test[0], test[1]), 10, crop_flip=pad_crop_flip, augment=config.augment)


def train(config: RunConfig, data: ArrayData) -> dict[str, Any]:
    """Train a run, and return its row."""
    cluster = start_devices(config)
    total, steps_per_epoch = config.total_updates(data.num_train), data.num_train / config.batch_size
    with cluster.scope():
        model = make_model(config, data)
        compile_model(model, config, data)
    trainer = Trainer(model, batch_size=config.batch_size, microbatch_size=config.microbatch_size)

    def one_hot(batches: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        return ((x, np.eye(data.num_classes, dtype="float32")[y], mask) for x, y, mask in batches)

    def train_feed(host: Any, first_update: int) -> Iterator[tuple[np.ndarray, ...]]:
        first = first_update * trainer.accumulation_steps
        return one_hot(data.train_numpy(trainer.microbatch_size, first=first, seed=config.seed))

    def test_feed(host: Any) -> Iterator[tuple[np.ndarray, ...]]:
        return one_hot(data.test_numpy(trainer.microbatch_size))

    start = time.perf_counter()
    history = trainer.fit(
        train_feed,
        epochs=total / steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        validation_data=test_feed,
        validation_freq=config.eval_every,
        verbose=0,
    )
    row = {name: getattr(config, name) for name in SETTINGS if config.applies(name)}
    row = {name: value for name, value in row.items() if value is not None}
    row |= {"updates": total, "minutes": round((time.perf_counter() - start) / 60, 2)}
    row |= {name: round(history.history[f"val_{name}"][-1], 4) for name in ("top1", "top5")}
    row["train_top1"] = round(history.history["top1"][-1], 4)
    if config.test_views > 1:
        model = models.with_views(trainer.model, config.test_views)
        model.compile("sgd", **scoring(config, data))
        views = Trainer(model, batch_size=config.batch_size, microbatch_size=config.microbatch_size)
        scores = views.evaluate(test_feed)
        row |= {f"{name}_views": round(scores[name], 4) for name in ("top1", "top5")}
    return row


def several(runs: Path, at_once: int, images: Path, out: Path | None) -> bool:
    """Train the runs of a file, each in a process of its own; return whether all came to their end."""
    lines = [line for line in runs.read_text(encoding="utf-8").splitlines() if line.strip()]
    command = [sys.executable, "-m", "tools.benchmarks.cifar10_arrays", f"--images={images}"]
    command += [f"--out={out}"] if out else []
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # they share the memory of the device

    def run(line: str) -> int:
        return subprocess.run([*command, *shlex.split(line)], env=environment, check=False).returncode

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        return not any(pool.map(run, lines))


def main(argv: Sequence[str]) -> None:
    """Pack the images, or train what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="NPZ file of the images")
    parser.add_argument("--pack", action="store_true", help="write --images from --data_dir")
    parser.add_argument("--out", type=Path, help="JSON Lines file for the rows")
    parser.add_argument("--runs", type=Path, help="file with the flags of a run in each line")
    parser.add_argument("--at_once", type=int, default=1, help="number of the runs that share the device")
    args, of_train = parser.parse_known_args(argv)
    config = parsing.read(parsing.parse(["cifar10_arrays", *of_train])[0])
    if args.pack:
        pack(config.data_dir, args.images)
        return
    if args.runs:
        sys.exit(0 if several(args.runs, args.at_once, args.images, args.out) else 1)
    row = train(config, load(args.images, config))
    row |= {"machine": machine(), "versions": versions(("keras", "jax"))}
    print(json.dumps(row), flush=True)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
