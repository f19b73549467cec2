"""Trains an image classifier in large batches.

    python train.py --flagfile=flags/recipes/demo.flags
    python train.py --flagfile=flags/recipes/alexnet_bn_8k.flags --data_dir=... --strategy=mirrored

    KERAS_BACKEND=jax python train.py --flagfile=flags/recipes/demo.flags

The same --run_dir goes on with a run that was interrupted. All flags: `python train.py --help`. Exit codes: 0 done;
2 a bad flag, or a device or file that is not there; 3 diverged; 4 another worker is gone; 5 too many images cannot be
read; 6 the disk took no checkpoint or result; 75 stopped by a signal and saved.
"""

import contextlib
import dataclasses
import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the first import of TensorFlow
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself only with AVX-512, see BUILD-notes.md

import keras
import tensorflow as tf
from absl import flags as absl_flags
from absl import logging

import flags
import models
from lars_keras import data as datasets
from lars_keras.data import ImageData
from lars_keras.metrics import MaskedExamples
from lars_keras.report.layers import LayerTelemetry
from lars_keras.report.log import MetricsLog, Progress
from lars_keras.report.page import write_report
from lars_keras.runtime.checkpoint import Checkpoint, CheckpointManager, SavePolicy
from lars_keras.runtime.divergence import CorruptImageLimit, DivergenceGuard
from lars_keras.runtime.errors import (
    EXIT_BAD_DATA,
    EXIT_DIVERGED,
    EXIT_NOT_SAVED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    EXIT_WORKER_LOST,
    Diverged,
    Preempted,
    TooManyBadImages,
    UsageError,
    usage_errors,
)
from lars_keras.runtime.preemption import StopOnSignal
from lars_keras.runtime.recovery import CheckpointCallback, check_all_found, fit_with_recovery
from lars_keras.training import Trainer
from lars_keras.training.cluster import hosts_are_remote, is_chief, make_strategy, says_worker_is_lost
from running import plan
from running.folder import open_run_dir, write_plan, write_results
from running.optimizers import make_optimizer, make_schedule
from running.rehearsal import dry_run


def main(config: flags.RunConfig) -> None:
    if config.eval_only:  # on the test split, also where rates were chosen on a share of the training images
        config = dataclasses.replace(config, validation_split=0.0)
    with usage_errors():
        run_dir = open_run_dir(config)
        folder = CheckpointManager(
            run_dir / "checkpoints", keep=config.keep_checkpoints, keep_hours=config.keep_checkpoint_hours
        )

        # ---- Strategy: first of all, because a TPU must be initialised before any tensor exists.
        strategy = make_strategy(
            config.strategy,
            replicas=config.replicas,
            tpu=config.tpu,
            shard_optimizer_state=config.shard_optimizer_state,
        )
        keras.utils.set_random_seed(config.seed)
        keras.config.set_dtype_policy(config.precision)

        # ---- Data
        image_size = config.image_size
        if config.dataset in datasets.ANY_SIZE and image_size is None:
            image_size = models.default_image_size(config.model)
        data = datasets.load(
            config.dataset,
            data_dir=config.data_dir,
            image_size=image_size,
            augment=config.augment,
            cache=config.cache,
            cache_dir=config.cache_dir,
            remote=hosts_are_remote(strategy),
            validation_split=config.validation_split,
        )
        steps_per_epoch = data.num_train / config.batch_size
        total_updates = config.total_updates(data.num_train)
        warmup_updates = config.warmup_updates(data.num_train)

        # ---- Model and optimizer
        with strategy.scope():
            model = load_model(run_dir) if config.eval_only else make_model(config, data)
            compile_model(model, config, data)
        trainer = Trainer(
            model,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            steps_per_execution=config.steps_per_execution,
            jit_compile=config.jit_compile if config.jit_compile == "auto" else config.jit_compile == "on",
            layer_norms=True,
            reduce_dtype=config.reduce_dtype,
            layer_ratios=config.telemetry_every > 0,
        )
        train_feed, test_feed = make_feeds(data, trainer, config.seed)

    # ---- Evaluation only
    if config.eval_only:
        print(plan.scores(trainer.evaluate(test_feed), data.num_test))
        return

    # ---- Where the run is
    about = {
        "flags": dataclasses.asdict(config),
        "replicas": trainer.replicas,
        "backend": keras.backend.backend(),
        "rollbacks": [],
    }
    notes = []
    with usage_errors():
        checkpoint = None if config.dry_run else folder.latest()
        check_all_found(strategy, checkpoint)
        if checkpoint:
            about["rollbacks"] = checkpoint.info["rollbacks"]
            notes = resume(config, trainer, checkpoint, train_feed, total_updates)
        data.unreadable_images.load(run_dir / "bad_images.json")

    # ---- Plan
    chief = is_chief(strategy)  # of several workers, one prints and writes
    rate = plan.rates(model.optimizer, total_updates)
    warnings = plan.warnings(config, model, data, rate)
    text = plan.text(config, data, trainer, rate, warmup_updates, run_dir, warnings, notes)
    if config.dry_run:
        print(text)
        with usage_errors():
            dry_run(config, trainer, data, rate, run_dir)
        return
    if chief:
        write_plan(run_dir, config, text, warnings, model.optimizer)
        print(text, flush=True)

    # ---- Training
    progress, log = Progress(), MetricsLog(run_dir)
    for note in notes if chief else ():
        log.note(trainer.position.update, note)

    def on_rollback(rollback: dict[str, Any]) -> None:
        text = f"went back to update {rollback['update']}: {rollback['reason']}"
        print(text, file=sys.stderr, flush=True)
        log.note(rollback["update"], text)

    def on_bad_image(update: int, where: str, reason: str) -> None:
        with contextlib.suppress(OSError):  # the log has it, too
            data.unreadable_images.save(run_dir / "bad_images.json")
        log.note(update, f"left out an image that cannot be read, {where}: {reason}")

    bound = CorruptImageLimit(data, config.max_bad_images, on_bad_image if chief else lambda *_: None)
    save = CheckpointCallback(trainer, folder, SavePolicy(config.checkpoint_updates, config.checkpoint_minutes), about)
    try:
        with StopOnSignal() as stop:
            history = fit_with_recovery(
                train_feed,
                save,
                max_rollbacks=config.max_rollbacks,
                on_rollback=on_rollback if chief else lambda rollback: None,
                epochs=total_updates / steps_per_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_data=test_feed,
                validation_freq=config.eval_every,
                callbacks=[
                    *(
                        [LayerTelemetry(trainer, log, config.telemetry_every)]
                        if chief and config.telemetry_every
                        else []
                    ),
                    DivergenceGuard(trainer),
                    *([progress, log] if chief else []),
                    bound,
                    stop,
                ],
                verbose=0,
            )
    except (Diverged, TooManyBadImages):
        if chief:
            print(f"report: {write_report(run_dir)}", flush=True)
        raise

    # ---- Results: the last evaluation came after the last update.
    trainer.save_model(run_dir / "model.keras", write=chief)
    if not chief:
        return
    final = {name: history.history[f"val_{name}"][-1] for name in ("top1", "top5", "loss", "n")}
    write_results(
        run_dir,
        final,
        updates=total_updates,
        seconds=round(log.seconds, 3),
        images_per_second=progress.images_per_second,
        data_wait=progress.data_wait,
        rollbacks=about["rollbacks"],
        bad_images=bound.count,
    )
    print(plan.scores(final, data.num_test))
    print(f"report: {write_report(run_dir)}")


def make_model(config: flags.RunConfig, data: ImageData) -> keras.Model:
    return models.get(
        config.model,
        num_classes=data.num_classes,
        input_shape=data.image_shape,
        mean=data.mean,
        # The original AlexNet's initial values are made for pixels that are centred but not scaled.
        std=None if config.model == "alexnet" else data.std,
        sync_batch_norm=config.sync_batch_norm,
        seed=config.seed,
    )


def compile_model(model: keras.Model, config: flags.RunConfig, data: ImageData) -> None:
    schedule = make_schedule(
        config.schedule,
        peak=config.learning_rate,
        warmup_updates=config.warmup_updates(data.num_train),
        total_updates=config.total_updates(data.num_train),
        power=config.power,
        end=config.end_learning_rate,
    )
    model.compile(
        make_optimizer(config.optimizer, schedule, model.trainable_variables, **config.optimizer_options),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing),
        weighted_metrics=[
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(k=min(5, data.num_classes), name="top5"),
            MaskedExamples(),
        ],
    )


def resume(
    config: flags.RunConfig, trainer: Trainer, checkpoint: Checkpoint, train_feed: Any, total_updates: int
) -> list[str]:
    """Puts the trainer where the checkpoint was made, and says so.

    Raises:
        UsageError: if the run would not go on exactly as it began, and that is not allowed, or is past its end.
    """
    before = checkpoint.info["flags"]
    changes = config.changes(before)
    if checkpoint.info["replicas"] != trainer.replicas:
        changes.append(f"replicas: {trainer.replicas}, was {checkpoint.info['replicas']}")
    backend = checkpoint.info.get("backend", "tensorflow")
    if backend != keras.backend.backend():
        changes.append(f"KERAS_BACKEND={keras.backend.backend()}, was {backend}")
    if changes and not config.allow_inexact_resume:
        raise UsageError(
            f"--run_dir={config.run_dir} holds a run that began otherwise: {'; '.join(changes)}. Give it the same "
            "flags, or none, to go on exactly, another --run_dir to begin again, or --allow_inexact_resume."
        )
    if checkpoint.update > total_updates:
        raise UsageError(
            f"--run_dir={config.run_dir} holds a run that has taken {checkpoint.update} updates, more than the "
            f"{total_updates} that the flags now ask for. Give more --epochs, or another --run_dir."
        )
    trainer.restore(checkpoint.arrays, checkpoint.info["position"], train_feed)
    notes = [f"went on after update {checkpoint.update}, from {checkpoint.path.name}"]
    return notes + [f"went on inexactly: {'; '.join(changes)}"] * bool(changes)


def load_model(run_dir: os.PathLike) -> keras.Model:
    path = os.path.join(run_dir, "model.keras")
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as e:  # whatever the libraries make of a damaged archive
        raise UsageError(f"{path} cannot be loaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e


def make_feeds(data: ImageData, trainer: Trainer, seed: int):
    """Training and test examples as functions of the worker; an element has one ghost batch for each replica."""
    element = trainer.replicas * trainer.microbatch_size

    def shard(worker: tf.distribute.InputContext) -> tuple[int, int]:
        return worker.input_pipeline_id, worker.num_input_pipelines

    def one_hot(x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return x, y if y.shape.rank == 2 else tf.one_hot(y, data.num_classes), mask

    def train_feed(worker: tf.distribute.InputContext, first_update: int) -> tf.data.Dataset:
        first = first_update * trainer.accumulation_steps
        return data.train_batches(element, first=first, seed=seed, shard=shard(worker)).map(one_hot)

    def test_feed(worker: tf.distribute.InputContext) -> tf.data.Dataset:
        return data.test_batches(element, shard=shard(worker)).map(one_hot)

    return train_feed, test_feed


def run(argv: list[str]) -> int:
    """Runs `main` with the flags in `argv`, and gives the process's exit code."""
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of its own deprecations
    try:
        values, arguments = flags.parse(argv)
        if values["help"].value:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        with usage_errors():
            if arguments:
                raise UsageError(f"Every argument must be a flag, --name=value. Received: {' '.join(arguments)}")
            config = flags.read(values)
        main(config)
    except (absl_flags.Error, UsageError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return EXIT_USAGE
    except Diverged as e:
        hint = "A lower --learning_rate or a longer --warmup may help; the checkpoints are from before."
        print(f"train.py: {e} {hint}", file=sys.stderr)
        return EXIT_DIVERGED
    except TooManyBadImages as e:
        print(f"train.py: {e}", file=sys.stderr)
        return EXIT_BAD_DATA
    except Preempted as e:
        print(f"train.py: {e}, saved; start it again with the same --run_dir to go on", file=sys.stderr)
        return EXIT_PREEMPTED
    except OSError as e:
        print(f"train.py: cannot write: {e}. Checkpoints that were written before are whole.", file=sys.stderr)
        return EXIT_NOT_SAVED
    except (tf.errors.OpError, RuntimeError, ValueError) as e:
        if not says_worker_is_lost(e):
            raise
        print(f"train.py: another worker is gone: {str(e).splitlines()[0]}", file=sys.stderr)
        return EXIT_WORKER_LOST
    return 0


if __name__ == "__main__":
    code = run(sys.argv)
    if code == EXIT_WORKER_LOST and keras.backend.backend() == "jax":
        os._exit(code)  # at an ordinary exit JAX waits for the worker that is gone, and then aborts
    sys.exit(code)
