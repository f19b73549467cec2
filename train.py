"""Train an image classifier in large batches.

    python train.py --flagfile=flags/recipes/demo.flags
    python train.py --flagfile=flags/recipes/alexnet_bn_8k.flags --data_dir=... --strategy=mirrored

    KERAS_BACKEND=jax python train.py --flagfile=flags/recipes/demo.flags

The same --run_dir resumes an interrupted run. Exit codes: 0 done; 2 a bad flag, or a missing device or file;
3 diverged; 4 another host is gone; 5 too many unreadable images; 6 a file could not be written or read; 75 stopped by a
signal and saved.
"""

import running.start  # noqa: F401, I001  (before the first import of TensorFlow)

import contextlib
import sys
from collections.abc import Sequence

import keras

import flags
from lars_keras import data as datasets
from lars_keras.report.progress import say
from lars_keras.runtime.checkpoint import SavePolicy
from lars_keras.runtime.preemption import StopOnSignal
from lars_keras.runtime.recovery import CheckpointCallback, fit_with_recovery
from lars_keras.training import Trainer
from running import command_line
from running.callbacks import RunCallbacks
from running.devices import start_devices
from running.disk import check_disk
from running.errors import usage_errors
from running.feeds import make_feeds, require_same_data
from running.folder import hold_run_dir, open_run_dir, write_plan
from running.model import compile_model, make_model
from running.plan import make_plan
from running.rehearsal import rehearse
from running.results import final_scores, report_of_failure, scores_line, write_results
from running.resume import RunCheckpoints, resume, set_results_aside
from running.score import score_run
from running.views import score_views


def main(config: flags.RunConfig, more_callbacks: Sequence[keras.callbacks.Callback] = ()) -> None:
    """Train a model, or score one, according to the flags. `running/` has the functions called here."""
    if config.eval_only:
        score_run(config)
        return
    with contextlib.ExitStack() as held:
        _train(config, more_callbacks, held)


def _train(
    config: flags.RunConfig, more_callbacks: Sequence[keras.callbacks.Callback], held: contextlib.ExitStack
) -> None:
    with usage_errors():
        run_dir = open_run_dir(config)

        # ---- Devices: first of all, because a TPU must be initialized before any tensor exists.
        cluster = start_devices(config)
        chief = cluster.is_chief  # of several hosts, one prints and writes
        if chief and not config.dry_run:
            held.enter_context(hold_run_dir(run_dir, config))

        # ---- Data
        data = datasets.load(config.dataset, remote=cluster.remote_input, **config.data_options)
        require_same_data(cluster, data)
        steps_per_epoch = data.num_train / config.batch_size  # the batch that crosses the end of an epoch is whole
        total_updates = config.total_updates(data.num_train)

        # ---- Model, with its optimizer, schedule, loss and metrics
        with cluster.scope():
            model = make_model(config, data)
            compile_model(model, config, data)

        # ---- Trainer: takes the place of `model.fit`
        trainer = Trainer(
            model,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            steps_per_execution=config.steps_per_execution,
            jit_compile=config.compiles,
            variable_norms=True,
            reduce_dtype=config.reduce_dtype,
            trust_ratios=config.telemetry_every > 0,
            noise_scale=config.noise_scale_every > 0,
        )
        train_feed, test_feed = make_feeds(data, trainer, config.seed)

        # ---- Resume, if the folder holds a run that was interrupted
        checkpoints = RunCheckpoints(run_dir, config)
        resumed = resume(config, checkpoints, run_dir, trainer, data, train_feed)

        # ---- Plan
        plan = make_plan(config, data, trainer, run_dir, resumed.notes)
        if config.dry_run:
            rehearse(config, trainer, data, plan, run_dir)
            return
        if chief:
            check_disk(run_dir, trainer, config.keep_checkpoints)
    callbacks = RunCallbacks(config, trainer, data, run_dir, chief)
    if chief:
        set_results_aside(run_dir, trainer.position.update)
        write_plan(run_dir, config, data, plan, model.optimizer)
        say(plan.text)
        for note in resumed.notes:
            callbacks.log.note(trainer.position.update, note)

    # ---- Fit
    policy = SavePolicy(config.checkpoint_updates, config.checkpoint_minutes)
    stop = held.enter_context(StopOnSignal())  # to the end: after the last update a signal would only undo the results
    with report_of_failure(run_dir, callbacks.log, write=chief):
        history = fit_with_recovery(
            train_feed,
            CheckpointCallback(trainer, checkpoints, policy, resumed.record, save_first=resumed.changed),
            max_rollbacks=config.max_rollbacks,
            on_rollback=callbacks.on_rollback,
            epochs=total_updates / steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_data=test_feed,
            validation_freq=config.eval_every,
            callbacks=[*callbacks.in_order(stop), *more_callbacks],
            verbose=0,
        )

    # ---- Results
    trainer.save_model(run_dir / "model.keras", write=chief)  # collective: hosts may hold shards of the weights
    scores = final_scores(history) | score_views(config, data, trainer, test_feed)
    if not chief:
        return
    report = write_results(run_dir, scores, total_updates, callbacks, trainer.position.rollbacks)
    say(scores_line(scores, data.num_test))
    say(f"report: {report}")


def run(argv: list[str]) -> int:
    """Run `main` with the flags in `argv`, and return the exit code of the process."""
    return command_line.run(main, argv, usage=__doc__)


if __name__ == "__main__":
    command_line.leave(lambda: run(sys.argv))
