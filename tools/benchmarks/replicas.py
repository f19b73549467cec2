"""Time an update on 1, 2, 4 and 8 replicas, and count its reductions and their bytes.

    python -m tools.benchmarks.replicas --out=results/replicas.json

The replicas are logical devices of one CPU, which share its cores and its memory: the times show the overhead of
replication, not a speed-up. Reductions are counted while the updates run, not read from the code.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import models
from lars_keras import LARS
from lars_keras.training import Trainer
from tools.committed import write_json

BATCH, UPDATES = 512, 6


class CountingReduction(tf.distribute.ReductionToOneDevice):
    """Count the reductions that run, and the bytes that each replica gives to them."""

    def __init__(self):
        super().__init__()
        self.calls = tf.Variable(0, dtype=tf.int64)
        self.bytes = tf.Variable(0, dtype=tf.int64)

    def batch_reduce_implementation(self, reduce_op, value_destination_pairs, options):
        size = sum(v.values[0].shape.num_elements() * v.values[0].dtype.size for v, _ in value_destination_pairs)
        self.calls.assign_add(1)
        self.bytes.assign_add(size)
        return super().batch_reduce_implementation(reduce_op, value_destination_pairs, options)


def measure(model_name: str, replicas: int, accumulation_steps: int) -> dict[str, float]:
    """Time `UPDATES` updates of a small model, without the first."""
    reduction = CountingReduction()
    strategy = tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)], cross_device_ops=reduction)
    with strategy.scope():
        model = models.get(model_name, num_classes=10, input_shape=(16, 16, 1), seed=0)
        model.compile(LARS(), keras.losses.CategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 16, 16, 1), dtype="uint8")
    labels = np.eye(10, dtype="float32")[rng.integers(0, 10, BATCH)]
    clock = [time.perf_counter()]
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: clock.append(time.perf_counter()))
    Trainer(model, batch_size=BATCH, microbatch_size=BATCH // replicas // accumulation_steps).fit(
        tf.data.Dataset.from_tensors((images, labels)).repeat(),
        epochs=1,
        steps_per_epoch=UPDATES,
        verbose=0,
        callbacks=[watch],
    )
    return {
        "replicas": replicas,
        "accumulation_steps": accumulation_steps,
        "milliseconds": 1e3 * statistics.median(np.diff(clock)[1:]),
        "reductions_per_update": int(reduction.calls.numpy()) / UPDATES,
        "bytes_per_update": int(reduction.bytes.numpy()) / UPDATES,
        "bytes_of_weights": 4 * model.count_params(),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="alexnet_small", choices=models.names())
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)
    print(
        f"{args.model}, batch {BATCH}, median of {UPDATES - 1} updates; {os.cpu_count()} cores, {platform.machine()}, "
        f"tensorflow {tf.__version__}, keras {keras.__version__}"
    )
    print("replicas  accumulation   ms/update  reductions/update  bytes/update  of the weights")
    rows = []
    for replicas in (1, 2, 4, 8):
        for accumulation_steps in (1, 4):
            row = measure(args.model, replicas, accumulation_steps)
            rows.append(row)
            share = row["bytes_per_update"] / row["bytes_of_weights"]
            print(
                f"{replicas:>8}  {accumulation_steps:>13}  {row['milliseconds']:>9.1f}  "
                f"{row['reductions_per_update']:>17.2f}  {row['bytes_per_update']:>12,.0f}  {share:>14.3f}",
                flush=True,
            )
    if args.out:
        write_json(Path(args.out), {"model": args.model, "batch_size": BATCH, "rows": rows})


if __name__ == "__main__":
    main()
