"""Time training steps that measure the gradient noise scale against the same steps without.

    python -m tools.benchmarks.noise_scale_cost --out=results/noise_scale_cost.json

Both trainers of a model take an update each, in turn, in one process, in graph mode on random images. The ratio of a
round is that of its two updates, one directly after the other.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import models
from lars_keras import LARS
from lars_keras.training import Trainer
from tools.committed import write_json


class Step(NamedTuple):
    """A model and the size of its step."""

    model: str
    classes: int
    ghost_batch: int
    policy: str


STEPS = (
    Step("alexnet_bn", 1000, 64, "float32"),
    Step("fast_cifar", 10, 512, "float32"),
    Step("fast_cifar", 10, 512, "mixed_bfloat16"),
)
GHOST_BATCHES = 2


def make_trainer(step: Step, noise_scale: bool) -> Trainer:
    """Return the model under a `Trainer` that splits a batch into `GHOST_BATCHES`."""
    keras.mixed_precision.set_global_policy(step.policy)
    size = models.default_image_size(step.model)
    model = models.get(step.model, num_classes=step.classes, input_shape=(size, size, 3), seed=0)
    model.compile(LARS(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return Trainer(
        model,
        batch_size=GHOST_BATCHES * step.ghost_batch,
        microbatch_size=step.ghost_batch,
        jit_compile=False,
        noise_scale=noise_scale,
    )


def measure(step: Step, rounds: int) -> dict[str, Any]:
    """Return the seconds of each update, without the first of each trainer, which traces."""
    trainers = {"without": make_trainer(step, False), "with": make_trainer(step, True)}
    size = models.default_image_size(step.model)
    x = tf.random.uniform((step.ghost_batch, size, size, 3), maxval=255, seed=0)
    y = tf.random.uniform((step.ghost_batch,), maxval=step.classes, dtype=tf.int32, seed=1)
    options = tf.data.Options()
    options.autotune.enabled = False  # or the end of an iterator may wait for as long as it was in use
    data = tf.data.Dataset.from_tensors((x, y)).repeat().with_options(options)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(rounds + 1):
        for name in sorted(trainers, reverse=i % 2 == 1):  # a drift of the machine's speed favors neither
            started = time.perf_counter()
            trainers[name].fit(lambda context, first: data, epochs=1, steps_per_epoch=1, verbose=0)
            if i:
                seconds[name].append(round(time.perf_counter() - started, 4))
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {**step._asdict(), "ratio": round(statistics.median(ratios), 4), "seconds_per_update": seconds}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    rows = []
    for step in STEPS:
        rows.append(measure(step, args.rounds))
        medians = {name: statistics.median(values) for name, values in rows[-1]["seconds_per_update"].items()}
        print(
            f"{step.model}, {GHOST_BATCHES} ghost batches of {step.ghost_batch}, {step.policy}: without "
            f"{medians['without']:.3f} s, with {medians['with']:.3f} s, ratio {rows[-1]['ratio']:.3f}",
            flush=True,
        )
    if args.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
        command = f"python -m {__spec__.name} --rounds={args.rounds}"
        write_json(args.out, {"command": command, "machine": machine, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
