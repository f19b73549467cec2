"""A run that is interrupted, preempted or thrown back ends as the run that was not."""

import functools
import os
import pathlib
import shutil
import signal
import tempfile
import time
import types
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LARS
from lars_keras.data import ArrayData
from lars_keras.data.augment import pad_crop_flip
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.divergence import DivergenceGuard
from lars_keras.runtime.errors import Diverged, Preempted, UsageError
from lars_keras.runtime.preemption import SIGNALS, StopOnSignal
from lars_keras.runtime.recovery import CheckpointCallback, fit_with_recovery
from lars_keras.training import Trainer
from lars_keras.training.position import Position
from tests import step_cases as cases
from tools import kill_and_resume

UPDATES, PER_EPOCH, BATCH = 11, 4.5, 32


class Poison(keras.layers.Layer):
    """The identity, whose gradient is NaN while `on` is set; its input keeps its gradient's place in the model."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.on = self.add_weight(shape=(), initializer="zeros", trainable=False, name="on")

    def call(self, x):
        poison = tf.where(self.on > 0, np.nan, 1.0)

        @tf.custom_gradient
        def scaled(x, scale):
            return x * scale, lambda g: (g * scale, tf.reduce_sum(g * x) * poison)

        return scaled(x, tf.convert_to_tensor(self.scale))


def data():
    rng = np.random.default_rng(0)
    split = rng.integers(0, 256, (144, 8, 8, 3), np.uint8), np.arange(144) % 10
    return ArrayData("small", split, split, 10, crop_flip=pad_crop_flip)


def model():
    """With all that has state: moving statistics, dropout, a moving average of the weights, metrics."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, use_bias=False, name="conv1"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(),
            Poison(name="poison"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3, seed=2),
            keras.layers.Dense(10, name="logits"),
        ]
    )


class Run:
    """A model and its trainer, as each process of a run makes them, with the checkpoints of one folder."""

    def __init__(self, strategy="none", steps_per_execution=1):
        keras.utils.set_random_seed(1)
        with cases.strategy(strategy).scope():
            self.model = model()
            self.model.compile(
                LARS(3.0, trust_coefficient=0.02, excluded_lr_scale=0.01, use_ema=True, ema_momentum=0.8),
                keras.losses.CategoricalCrossentropy(from_logits=True),
                weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
            )
        options = {"steps_per_execution": steps_per_execution, "variable_norms": True}
        self.trainer = Trainer(self.model, batch_size=BATCH, microbatch_size=8, **options)
        self.data = data()

    def at(self, folder, **policy):
        self.manager = CheckpointManager(folder, max_to_keep=100)
        self.save = CheckpointCallback(self.trainer, self.manager, SavePolicy(**policy or {"updates": 1}))
        self.logs = {}
        return self

    def train_feed(self, context, first):
        element = 8 * self.trainer.replicas
        batches = self.data.train_batches(element, first=first * self.trainer.accumulation_steps, seed=3)
        return batches.map(lambda x, y, m: (x, tf.one_hot(y, 10), m))

    def test_feed(self, context):
        return self.data.test_batches(48).map(lambda x, y, m: (x, tf.one_hot(y, 10), m))

    def go(self, stop_after=None, callbacks=(), **options):
        def note(kind):
            def callback(index, logs):
                self.logs[kind, index] = {k: v for k, v in logs.items() if k != "data_wait"}  # time differs
                if kind == "update" and index + 1 == stop_after:
                    raise KeyboardInterrupt

            return callback

        watch = keras.callbacks.LambdaCallback(on_train_batch_end=note("update"), on_epoch_end=note("epoch"))
        try:
            fit_with_recovery(
                self.train_feed,
                self.save,
                callbacks=[*callbacks, self.save, watch] if stop_after else [*callbacks, watch],
                epochs=UPDATES / PER_EPOCH,
                steps_per_epoch=PER_EPOCH,
                validation_data=self.test_feed,
                verbose=0,
                **options,
            )
        except KeyboardInterrupt:
            self.manager.wait()
        return self

    def restored(self, update=None):
        """Forgets all that is in memory and restores a checkpoint, the newest or that of an update."""
        for path in list(self.manager.directory.iterdir()):
            if update is not None and int(path.name[7:15]) > update:
                path.unlink()
        for variable in [*self.model.variables, *self.model.optimizer.variables, *self.model.metrics_variables]:
            variable.assign(variable + 1)
        self.trainer.position = Position(update=99, batches_consumed=99, epoch=99, losses=[99.0])
        self.logs = {}
        checkpoint = self.manager.latest()
        self.trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], self.train_feed)
        return self

    def state(self):
        variables = [*self.model.variables, *self.model.optimizer.variables]
        return {f"{i} {v.name.rpartition('_')[2]}": np.array(v.numpy()) for i, v in enumerate(variables)}


@functools.cache
class Whole:
    """A run that nothing has interrupted, trained once for all tests of a process.

    Attributes:
        logs, state, scores: at its end.
        positions: the updates of its checkpoints.
    """

    def __init__(self, strategy="none", steps_per_execution=1):
        self._folder = tempfile.TemporaryDirectory()
        self._run = Run(strategy, steps_per_execution).at(self._folder.name).go()
        self.logs, self.state = self._run.logs, self._run.state()
        self.scores = self._run.trainer.evaluate(self._run.test_feed)
        self.positions = sorted(int(p.name[7:15]) for p in pathlib.Path(self._folder.name).iterdir())

    def copied(self, folder):
        """Copy its checkpoints into a new folder."""
        return shutil.copytree(self._folder.name, folder)

    def trainer(self, folder, **policy):
        """Return its run, put back to the start, to be used again with another folder."""
        with tempfile.TemporaryDirectory() as start:
            self._run.at(self.copied(pathlib.Path(start, "c"))).restored(0)
        return self._run.at(folder, **policy)


class ResumeTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_same_end(self):
        self.check_same_end("none", 1)

    @pytest.mark.slow
    def test_same_end_from_anywhere(self):
        self.check_same_end("none", 1, everywhere=True)

    @parameterized.parameters(("mirrored2", 1), ("one", 1), ("none", 3))
    @pytest.mark.slow
    def test_same_end_of_other_loops(self, strategy, steps_per_execution):
        self.check_same_end(strategy, steps_per_execution)

    def check_same_end(self, strategy, steps_per_execution, everywhere=False):
        """From some positions, or every second and the ends of epochs: the same weights, slots, metrics and logs.

        On one device bit for bit; on two replicas, whose sums have no fixed order, within 1e-5.
        """
        tolerance = 1e-5 if strategy == "mirrored2" else 0
        whole = Whole(strategy, steps_per_execution)
        self.assertGreater(len(whole.positions), UPDATES / steps_per_execution)
        ends_of_an_epoch = [u for u in whole.positions if u in (5, 9)]
        some = [ends_of_an_epoch[-1], whole.positions[-2]]
        if everywhere:
            some += [0, *whole.positions[::2], *ends_of_an_epoch]
        again = Run(strategy, steps_per_execution)  # the first time in a process that has not trained
        for update in sorted(set(some), reverse=True):
            again.at(whole.copied(self.dir / str(update))).restored(update)
            self.assertEqual(again.trainer.position.update, update)
            again.go()
            state = again.state()
            for name, value in whole.state.items():
                difference = np.linalg.norm(state[name].astype("f8") - value)
                self.assertLessEqual(difference, tolerance * np.linalg.norm(value.astype("f8")), f"{name}, {update}")
            tail = {k: v for k, v in whole.logs.items() if k in again.logs}
            self.assertEqual(list(again.logs), list(tail))
            for k in tail:
                self.assertAllClose(again.logs[k], tail[k], rtol=tolerance, atol=0)
            self.assertEqual(len([k for k in tail if k[0] == "update"]) > 0, update < UPDATES)
            self.assertIn(("epoch", 2), tail)

    def test_broken_off_within_an_epoch(self):
        again = Whole().trainer(self.dir / "b").go(stop_after=7).restored().go()
        self.assertEqual(min(again.logs), ("epoch", 1))
        self.assertAllEqual([k for k in again.logs if k[0] == "update"], [("update", u) for u in range(7, UPDATES)])
        self.assertEqual(again.logs, {k: v for k, v in Whole().logs.items() if k in again.logs})
        state = again.state()
        for name, value in Whole().state.items():
            self.assertAllEqual(state[name], value, name)

    @pytest.mark.slow
    def test_other_replicas(self):
        """Allowed by the library; `train.py` asks. Without batch statistics it would be the same to rounding."""
        two = Run("mirrored2").at(Whole().copied(self.dir / "a")).restored(6)
        self.assertEqual(two.trainer.position.update, 6)
        count = [v for v in two.model.metrics_variables if v.name == "count"][-1]
        self.assertEqual(float(count.numpy()), BATCH)  # one update of the second epoch
        two.go()
        self.assertEqual(two.trainer.position.update, UPDATES)

    def test_hosts_that_begin_at_different_updates_are_refused(self):
        """They would average the gradients of different weights."""
        asked = []
        for update in (None, 3):
            run = Whole().trainer(self.dir / str(update))
            if update:
                run.go(stop_after=update).restored()
            before = run.state()
            with (
                unittest.mock.patch.object(
                    type(run.trainer.cluster), "same_on_all_hosts", lambda _, number: asked.append(number)
                ),
                self.assertRaisesRegex(UsageError, f"different updates.*at update {update or 0}"),
            ):
                run.go()
            self.assertAllClose(run.state(), before, rtol=0, atol=0)
        self.assertLen(set(asked), 2)

    def test_another_model_is_refused(self):
        run = Whole().trainer(self.dir / "a").go(stop_after=2)
        arrays, position = run.trainer.snapshot()
        before = run.state()
        with self.assertRaisesRegex(ValueError, "another model or optimizer.*logits/bias"):
            other = {k: v[..., :5] if v.shape == (10,) else v + 1 for k, v in arrays.items()}
            run.trainer.restore(other, position, run.train_feed)
        with self.assertRaisesRegex(ValueError, "another model or optimizer"):
            run.trainer.restore({}, position, run.train_feed)
        self.assertAllClose(run.state(), before, rtol=0, atol=0)

    def test_evaluation_has_the_average_and_training_has_not(self):
        whole = Whole()
        for name, value in whole.scores.items():  # the weights were the average then
            self.assertAllClose(whole.logs["epoch", 2][f"val_{name}"], value, rtol=1e-6)
        (kernel,) = [v for k, v in whole.state.items() if k.endswith(" kernel") and v.shape[-1] == 10]
        with np.load(CheckpointManager(whole.copied(self.dir / "a")).latest().path) as saved:
            kernels = [v for v in saved.values() if v.shape == kernel.shape]
        self.assertNotAllClose(kernels[0], kernel, rtol=1e-3)  # the weights that go on
        self.assertTrue(any(np.array_equal(k, kernel) for k in kernels[1:]))


class RollbackTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def poisoned(self, run, updates):
        """Return a callback that poisons the gradient of one layer in these updates of training data."""
        on = run.model.get_layer("poison").on

        def begin(batch, logs):
            on.assign(float(run.trainer.position.batches_consumed in updates))

        return keras.callbacks.LambdaCallback(on_train_batch_begin=begin)

    def test_back_to_the_checkpoint_and_past_the_window(self):
        run = Whole().trainer(self.dir, updates=3)
        told = []
        run.go(callbacks=[DivergenceGuard(run.trainer), self.poisoned(run, {7})], on_rollback=told.append)
        self.assertLen(told, 1)
        self.assertEqual((told[0]["update"], told[0]["failed"]), (6, 8))
        self.assertRegex(told[0]["reason"], "The gradient of .*poison/scale is not finite in update 8")
        position = run.trainer.position
        self.assertEqual((position.update, position.batches_consumed), (UPDATES, UPDATES + 2))
        self.assertTrue(all(np.isfinite(v).all() for v in run.state().values()))
        self.assertEqual(run.manager.latest().metadata["position"]["rollbacks"], told)

    def test_skipping_is_not_forgotten_by_a_kill(self):
        run = Whole().trainer(self.dir, updates=100)
        run.go(stop_after=1, callbacks=[DivergenceGuard(run.trainer), self.poisoned(run, {0})])
        again = run.restored()
        self.assertEqual((again.trainer.position.update, again.trainer.position.batches_consumed), (0, 1))

    def test_a_permanent_fault_ends_the_run_with_its_checkpoint(self):
        run = Whole().trainer(self.dir, updates=2)
        told = []
        with self.assertRaisesRegex(Diverged, "gradient of .*poison/scale") as caught:
            run.go(
                callbacks=[DivergenceGuard(run.trainer), self.poisoned(run, set(range(4, 99)))],
                on_rollback=told.append,
                max_rollbacks=2,
            )
        self.assertEqual(caught.exception.update, 5)
        self.assertEqual([t["update"] for t in told], [4, 4])
        checkpoint = run.manager.latest()
        self.assertEqual(checkpoint.update, 4)
        self.assertTrue(all(np.isfinite(v).all() for v in checkpoint.arrays.values()))
        again = run.restored()
        with self.assertRaisesRegex(Diverged, "gradient of .*poison/scale"):  # these rollbacks count in a restart too
            again.go(callbacks=[DivergenceGuard(again.trainer), self.poisoned(again, {6})], max_rollbacks=2)
        run.restored().go()  # usable
        self.assertEqual(run.trainer.position.update, UPDATES)


class KerasFitTest(tf.test.TestCase):
    def test_callbacks_in_keras_own_fit(self):
        x, y = np.ones((64, 3), "f4"), np.ones((64, 1), "f4")

        def fit(loss, *callbacks):
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model.compile("sgd", loss)
            model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)

        fit("mse", DivergenceGuard())
        with self.assertRaisesRegex(Diverged, "loss is nan in update 1"):
            fit(lambda y, p: keras.ops.sum(p) * float("nan"), DivergenceGuard())
        signal_at_3 = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: os.kill(os.getpid(), signal.SIGINT) if batch == 3 else None,
            on_train_batch_end=lambda batch, logs: time.sleep(0.3) if batch == 3 else None,
        )
        handlers = [signal.getsignal(number) for number in SIGNALS]
        with self.assertRaisesRegex(Preempted, "stopped after update 4"), StopOnSignal() as stop:
            fit("mse", signal_at_3, stop)
        self.assertEqual([signal.getsignal(number) for number in SIGNALS], handlers)

    def test_signals_are_caught_in_a_block_only(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        with StopOnSignal() as left:
            pass
        for stop in (StopOnSignal(), left):
            with self.assertRaisesRegex(ValueError, "with StopOnSignal"):
                model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0, callbacks=[stop])

    def test_signals_of_batch_systems(self):
        def stopped_by(number, **options):
            with StopOnSignal(**options) as stop:
                stop._cluster = types.SimpleNamespace(any_across_hosts=lambda *flags: list(flags))
                os.kill(os.getpid(), number)
                time.sleep(0.2)
                try:
                    stop.on_train_batch_end(3)
                except Preempted as e:
                    return str(e)

        # The process may have been started under nohup.
        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
            self.assertEqual(stopped_by(number), "stopped after update 4")
        self.assertEqual(stopped_by(signal.SIGUSR2, signals=[signal.SIGUSR2]), "stopped after update 4")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.assertIsNone(stopped_by(signal.SIGHUP))
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

    def test_a_loss_that_explodes_late_in_an_epoch_of_keras_own_fit(self):
        """Keras tells the mean over the epoch so far, here 86."""
        x = np.full((96, 1), 3.0, "f4")
        x[88:] = 1000.0
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.0), lambda y, p: p)
        with self.assertRaisesRegex(Diverged, "loss is 1000 in update 24, 333 times its median"):
            model.fit(x, x, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[DivergenceGuard()])


class KillTest(tf.test.TestCase):
    def test_a_killed_process(self):
        """Kill one run once; `make prove-resume` kills 40 times a cell, also replicas, workers and JAX."""
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        proof = kill_and_resume.Proof(folder, "single", steps=8, log=lambda line: None)
        proof.prove(1)
        (line,) = proof.ledger
        self.assertEqual((line["kills"], line["relative_difference"]), (1, 0.0))
        proof.prove(1)  # is done
        self.assertLen(proof.ledger, 1)


if __name__ == "__main__":
    tf.test.main()
