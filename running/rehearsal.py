"""Rehearse a run for `--dry_run`: its sizes, and two updates on synthetic images."""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flags.config import RunConfig
from lars_keras._keras_internals import layers_of, output_tensors
from lars_keras.data import ImageData
from lars_keras.report.progress import say
from lars_keras.runtime.checkpoint import CheckpointManager
from lars_keras.runtime.errors import UsageError
from lars_keras.training.trainer import Trainer
from running.disk import MIB, bytes_of, check_disk, checkpoint_bytes, nearest_folder
from running.plan import Plan, count


def rehearse(config: RunConfig, trainer: Trainer, data: ImageData, plan: Plan, run_dir: Path) -> None:
    """Print plan and sizes, then take two updates, an evaluation, and a save and restore, on synthetic images.

    It leaves nothing behind. Copies that --cache=disk made before stay.

    Raises:
        UsageError: if something cannot work; the message names the flag to change.
    """
    say(f"{plan.text}\n\n{_table(_rates(plan.rates))}\n\n{_table(_sizes(config, trainer, data))}")
    place = nearest_folder(run_dir)
    try:
        with _folder_in(place):  # so a folder that cannot be written is said before anything is compiled
            check_disk(run_dir, trainer, config.keep_checkpoints)
        say(f"\n{_table(_rehearsal(trainer, data, place))}")
    except (tf.errors.ResourceExhaustedError, RuntimeError) as e:  # JAX has a RuntimeError for it
        if isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UsageError(
            f"An update does not fit into the device's memory{_smaller(trainer.microbatch_size)} "
            f"({str(e).splitlines()[0]})"
        ) from e
    except OSError as e:
        raise UsageError(f"--run_dir={run_dir} cannot be written: {e.strerror or e}") from e
    copies = ", only the copies of --cache=disk" if config.cache == "disk" else ""
    say(f"\ndry run passed; no run folder was written{copies}")


def _smaller(microbatch_size: int) -> str:
    """Propose a smaller micro-batch, if there is one: the largest divisor, since the flags want a divisor."""
    sizes = [n for n in range(1, microbatch_size // 2 + 1) if microbatch_size % n == 0]
    if not sizes:
        return ""
    return f": --microbatch_size={sizes[-1]} takes {sizes[-1] / microbatch_size:.0%} of the activations"


def _rates(rate: np.ndarray) -> list[tuple[str, str]]:
    """Return the learning rate at the first, last and highest update, and at quarters of the run."""
    total = len(rate)
    points = {f"{part:.0%}": round(part * (total - 1)) for part in (0.25, 0.5, 0.75)}
    points = {"first": 0, "peak": int(rate.argmax()), **points, "last": total - 1}
    in_order = sorted(points.items(), key=lambda point: point[1])
    return [(f"rate, {name}", f"{rate[i]:.4g} at update {i + 1:,}") for name, i in in_order]


def _activation_bytes(model: keras.Model) -> int:
    """Return the size of one example's outputs of all layers, which the backward pass needs again."""
    total = 0
    for layer in layers_of(model, include_self=False):
        for tensor in output_tensors(layer):
            total += math.prod(d or 1 for d in tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size
    return total


def _sizes(config: RunConfig, trainer: Trainer, data: ImageData) -> list[tuple[str, str]]:
    """Return the memory of a device by use, the size of a checkpoint, and the size of an evaluation."""
    model, micro = trainer.model, trainer.microbatch_size
    image = math.prod(data.image_shape)
    batches = math.ceil(data.num_test / (micro * trainer.replicas))
    padding = batches * micro * trainer.replicas - data.num_test
    passes = count(batches, "batch", "es")
    checkpoint = checkpoint_bytes(trainer)
    device = {
        "weights": (bytes_of(model.variables), ""),
        "optimizer": (bytes_of(model.optimizer.variables), ""),
        "gradients": (
            2 * 4 * sum(math.prod(v.shape) for v in model.trainable_variables),
            "a micro-batch's and their sum",
        ),
        "activations": (_activation_bytes(model) * micro, f"all layer outputs of {micro} examples: an upper estimate"),
        "images": (image * micro, ""),
    }
    rows = [
        (f"{name} per device", f"{size / MIB:,.1f} MiB{remark and f', {remark}'}")
        for name, (size, remark) in device.items()
    ]
    return [
        *rows,
        ("in all per device", f"{sum(size for size, _ in device.values()) / MIB:,.1f} MiB"),
        ("checkpoint", f"{checkpoint / MIB:,.1f} MiB, {config.keep_checkpoints} kept"),
        ("evaluation", f"{data.num_test:,} images once each, in {passes} with {padding:,} padded"),
    ]


def _folder_in(place: Path) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir=place, prefix="dry-run-")


def _rehearsal(trainer: Trainer, data: ImageData, place: Path) -> list[tuple[str, str]]:
    """Take two updates, an evaluation, a save and a restore; return how long each of them took."""
    rng = np.random.default_rng(0)
    micro, classes = trainer.microbatch_size, data.num_classes
    images = rng.integers(0, 256, (micro, *data.image_shape), np.uint8)
    labels = np.eye(classes, dtype="float32")[rng.integers(0, classes, micro)]
    batch = tf.data.Dataset.from_tensors((images, labels, np.ones(micro, np.float32)))

    def train_feed(context: tf.distribute.InputContext, first_update: int) -> tf.data.Dataset:
        return batch.repeat()

    def test_feed(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return batch

    def timed(action: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return action(), time.perf_counter() - started

    clock: list[float] = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: clock.append(time.perf_counter()))
    started = time.perf_counter()
    trainer.fit(train_feed, epochs=1, steps_per_epoch=2, callbacks=[watch], verbose=0)
    scores, evaluation = timed(lambda: trainer.evaluate(test_feed))
    arrays, position = trainer.snapshot()

    def save_and_restore() -> Any:
        with _folder_in(place) as folder:
            checkpoints = CheckpointManager(folder)
            checkpoints.save(position["update"], arrays, {"position": position})
            checkpoints.wait()
            found = checkpoints.latest()
        assert found
        trainer.restore(found.arrays, found.metadata["position"], train_feed)
        return trainer.snapshot()[0]

    again, saving = timed(save_and_restore)
    different = [name for name, value in arrays.items() if not np.array_equal(value, again[name], equal_nan=True)]
    if different:
        raise UsageError(f"A checkpoint in --run_dir does not give back what was saved: {different[0]}")
    return [
        ("first update", f"{clock[0] - started:.1f} s, with compiling"),
        ("second update", f"{clock[-1] - clock[0]:.2f} s = {trainer.batch_size / (clock[-1] - clock[0]):,.0f} images/s")
        if len(clock) > 1
        else ("both updates", "in one call"),
        ("evaluation", f"{scores['n']:.0f} images in {evaluation:.1f} s, with compiling"),
        ("save and restore", f"{saving:.2f} s, the same bits"),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
