"""Trains an image classifier in large batches.

    python train.py --flagfile=flags/demo.flags
    python train.py --flagfile=flags/alexnet_bn_8k.flags --data_dir=... --strategy=mirrored

All flags: `python train.py --help`. Exit codes: 0 done; 2 a bad flag, or a device or file
that is not there; 3 the loss is no longer a number; 4 another worker is gone.
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the first import of TensorFlow

import keras
import tensorflow as tf
from absl import flags as absl_flags
from absl import logging

import flags
import models
from flags import plan
from flags.run_dir import open_run_dir, write_plan, write_results
from lars_keras import data as datasets
from lars_keras.data import ImageData
from lars_keras.training import Trainer, make_optimizer, make_schedule
from lars_keras.training.errors import EXIT_DIVERGED, EXIT_USAGE, EXIT_WORKER_LOST, Diverged, UsageError, usage_errors
from lars_keras.training.guard import StopWhenDiverged
from lars_keras.training.progress import MetricsLog, Progress
from lars_keras.training.report import write_report
from lars_keras.training.strategy import hosts_are_remote, is_chief, make_strategy


def main(config: flags.RunConfig) -> None:
    with usage_errors():
        run_dir = open_run_dir(config)

        # ---- Strategy: first of all, because a TPU must be initialised before any tensor exists.
        strategy = make_strategy(config.strategy, replicas=config.replicas, tpu=config.tpu)
        keras.utils.set_random_seed(config.seed)
        keras.config.set_dtype_policy(config.precision)

        # ---- Data
        image_size = config.image_size
        if config.dataset == "imagenet2012" and image_size is None:
            image_size = models.default_image_size(config.model)
        data = datasets.load(
            config.dataset, data_dir=config.data_dir, image_size=image_size, remote=hosts_are_remote(strategy)
        )
        steps_per_epoch = data.num_train / config.batch_size
        total_updates = config.total_updates(data.num_train)

        # ---- Model and optimizer
        warmup_updates = config.warmup_updates(data.num_train)
        schedule = make_schedule(
            config.schedule,
            peak=config.learning_rate,
            warmup_updates=warmup_updates,
            total_updates=total_updates,
            power=config.power,
            end=config.end_learning_rate,
        )
        with strategy.scope():
            model = load_model(run_dir) if config.eval_only else make_model(config, data)
            model.compile(
                make_optimizer(config.optimizer, schedule, model.trainable_variables, **config.optimizer_options),
                loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing),
                weighted_metrics=[
                    keras.metrics.CategoricalAccuracy(name="top1"),
                    keras.metrics.TopKCategoricalAccuracy(k=min(5, data.num_classes), name="top5"),
                ],
            )
        trainer = Trainer(
            model,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            updates_per_call=config.updates_per_call,
            jit_compile=config.jit_compile if config.jit_compile == "auto" else config.jit_compile == "on",
        )
        train_feed, test_feed = make_feeds(data, trainer.replicas * trainer.microbatch_size, config.seed)

    # ---- Evaluation only
    if config.eval_only:
        print(plan.scores(trainer.evaluate(test_feed)))
        return

    # ---- Plan
    chief = is_chief(strategy)  # of several workers, one prints and writes
    rate = plan.rates(model.optimizer, total_updates)
    warnings = plan.warnings(config, model, data, rate)
    text = plan.text(config, data, trainer, rate, warmup_updates, run_dir, warnings)
    if chief:
        write_plan(run_dir, config, text, warnings, model.optimizer)
        print(text, flush=True)

    # ---- Training
    started = time.perf_counter()
    progress = Progress()
    history = trainer.fit(
        train_feed,
        epochs=total_updates / steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        validation_data=test_feed,
        validation_freq=config.eval_every,
        callbacks=[*([progress, MetricsLog(run_dir)] if chief else []), StopWhenDiverged()],
        verbose=0,
    )

    # ---- Results: the last evaluation came after the last update.
    if not chief:
        return
    final = {name[4:]: values[-1] for name, values in history.history.items() if name.startswith("val_")}
    model.save(run_dir / "model.keras")
    write_results(
        run_dir,
        final,
        updates=total_updates,
        seconds=round(time.perf_counter() - started, 3),
        images_per_second=progress.images_per_second,
    )
    print(plan.scores(final))
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


def load_model(run_dir: os.PathLike) -> keras.Model:
    return keras.models.load_model(os.path.join(run_dir, "model.keras"), compile=False)


def make_feeds(data: ImageData, element: int, seed: int):
    """Training and test examples as functions of the worker; an element has one ghost batch for each replica."""

    def shard(worker: tf.distribute.InputContext) -> tuple[int, int]:
        return worker.input_pipeline_id, worker.num_input_pipelines

    def one_hot(x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return x, tf.one_hot(y, data.num_classes), mask

    def train_feed(worker: tf.distribute.InputContext) -> tf.data.Dataset:
        return data.train_batches(element, seed=seed, shard=shard(worker)).map(one_hot)

    def test_feed(worker: tf.distribute.InputContext) -> tf.data.Dataset:
        return data.test_batches(element, shard=shard(worker)).map(one_hot)

    return train_feed, test_feed


def run(argv: list[str]) -> int:
    """Runs `main` with the flags in `argv`, and gives the process's exit code."""
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of its own deprecations
    values = flags.define()
    try:
        arguments = values(argv)[1:]
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
        print(f"train.py: {e}", file=sys.stderr)
        return EXIT_DIVERGED
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as e:
        print(f"train.py: another worker is gone: {str(e).splitlines()[0]}", file=sys.stderr)
        return EXIT_WORKER_LOST
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
