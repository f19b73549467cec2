"""Callbacks are called by `Trainer` as by `model.fit`, with the same logs.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import contextlib
import functools
import io
import re
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from tests.training.test_meaning import replicas

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype("float32")
Y = RNG.normal(size=(64, 1)).astype("float32")
SCORED = X[:25], Y[:25]  # in batches of 8


def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=["mae"])
    return model


class Scores(keras.callbacks.Callback):
    """Keeps the logs of each batch of the validations."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_test_batch_end(self, batch, logs=None):
        self.logs.append((batch, logs))


class ResumedTest(parameterized.TestCase, tf.test.TestCase):
    """A run that goes on from a snapshot, in a new trainer, ends as one that was never stopped."""

    CALLBACKS = {
        "rate": lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        "plateau": lambda: keras.callbacks.ReduceLROnPlateau("loss", patience=2, min_delta=1e9),
        "stop": lambda: keras.callbacks.EarlyStopping("loss", patience=3, min_delta=1e9),
    }

    def go(self, trainer, name, epochs, *more):
        begun = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: self.begun.append(epoch))
        callbacks = [self.CALLBACKS[name](), begun, *more]
        trainer.fit(X, Y, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)
        weights = [np.array(keras.ops.convert_to_numpy(w)) for w in trainer.model.weights]
        return (
            trainer.position.update,
            float(keras.ops.convert_to_numpy(trainer.model.optimizer.learning_rate)),
            weights,
        )

    def check(self, name, snapshot, epochs):
        trainer = Trainer(make(), batch_size=16)
        trainer.restore(*snapshot, (X, Y))
        updates, rate, weights = self.go(trainer, name, epochs)
        self.assertEqual((updates, rate), self.expected[:2])
        for w, expected in zip(weights, self.expected[2], strict=True):
            self.assertAllEqual(w, expected)

    @parameterized.parameters(*CALLBACKS)
    def test_from_the_middle_and_the_end_of_an_epoch(self, name):
        snapshots, self.begun = {}, []

        def take(batch, logs):
            if trainer.position.update in (6, 8):
                snapshots[trainer.position.update] = trainer.snapshot()

        trainer = Trainer(make(), batch_size=16)
        self.expected = self.go(trainer, name, 5, keras.callbacks.LambdaCallback(on_train_batch_end=take))
        for snapshot in snapshots.values():
            self.check(name, snapshot, 5)
        with self.subTest("after a fit that had ended"):
            ended = Trainer(make(), batch_size=16)
            self.go(ended, name, 2)
            self.begun = []
            self.check(name, ended.snapshot(), 5)
            self.assertEqual(self.begun[0], 2)


class EvaluationTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(1, 2)
    def test_logs_of_its_batches(self, devices):
        """They are the scores so far, as in Keras, and do not change the score at the end."""
        with replicas(devices):
            model, seen = make(), Scores()
            trainer = Trainer(model, batch_size=16, microbatch_size=8 // devices)
            history = trainer.fit(X, Y, epochs=2, validation_data=SCORED, callbacks=seen, shuffle=False, verbose=0)
            plain = Trainer(make(), batch_size=16, microbatch_size=8 // devices)
            alone = plain.fit(X, Y, epochs=2, validation_data=SCORED, shuffle=False, verbose=0)
        reference, expected = make(), Scores()
        options = {"validation_data": SCORED, "validation_batch_size": 8, "shuffle": False, "verbose": 0}
        reference.fit(X, Y, batch_size=16, epochs=2, callbacks=[expected], **options)
        self.assertLen(seen.logs, 8)
        for (batch, logs), (number, those_of_keras) in zip(seen.logs, expected.logs, strict=True):
            self.assertEqual((batch, logs.pop("n")), (number, min(8 * (batch + 1), 25)))
            self.assertEqual(logs.keys(), those_of_keras.keys())
            self.assertAllClose(logs, those_of_keras, rtol=1e-5)
        for name in ("val_loss", "val_mae"):
            self.assertEqual(history.history[name], alone.history[name])

    def test_they_are_fetched_for_who_reads_them(self):
        trainer = Trainer(make(), batch_size=16, microbatch_size=8)
        trainer.evaluate(*SCORED)
        for callback, times in ((keras.callbacks.Callback(), 1), (keras.callbacks.ProgbarLogger(), 1), (Scores(), 5)):
            with unittest.mock.patch.object(
                trainer.engine, "_results_fn", side_effect=trainer.engine._results_fn
            ) as fetched:
                trainer.fit(X, Y, validation_data=SCORED, callbacks=callback, verbose=0)
            self.assertEqual(fetched.call_count - 4 * (keras.backend.backend() == "jax"), times)

    @classmethod
    @functools.cache
    def scored(cls):
        """Return a trainer whose model scores itself, too, both with a program that is compiled."""
        return Trainer(make(), batch_size=16, microbatch_size=8)

    @parameterized.parameters(0, 1, 2, "auto")
    def test_verbose(self, verbose):
        trainer, shown = self.scored(), []
        for evaluate in (trainer.evaluate, functools.partial(trainer.model.evaluate, batch_size=8)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                evaluate(*SCORED, verbose=verbose)
            shown.append(re.findall(r"\d/|loss: [\d.]+|mae: [\d.]+", printed.getvalue()))
        self.assertEqual(shown[0][-3:], shown[1][-3:])  # how much is shown before depends on the time
        self.assertLen(shown[0][-3:], 3 if verbose else 0)
        self.assertEqual(trainer.evaluate(*SCORED).keys(), {"loss", "mae", "n"})


class Hooks(Scores):
    """Notes the hook of `Trainer`, and votes."""

    def __init__(self):
        super().__init__()
        self.agreed, self.lasts, self.votes = None, [], []

    def vote(self, update, logs):
        self.votes.append(update)
        return False

    def on_updates_end(self, last):
        self.lasts.append(last)


class CallbackListTest(tf.test.TestCase):
    def test_its_members_are_called(self):
        pack = keras.callbacks.CallbackList
        for wrap in (lambda c: pack([c]), lambda c: [keras.callbacks.Callback(), pack([pack([c])])]):
            hooks, trainer = Hooks(), Trainer(make(), batch_size=32)
            trainer.fit(X, Y, validation_data=SCORED, callbacks=wrap(hooks), verbose=0)
            self.assertEqual(hooks.lasts, [True])
            self.assertEqual(hooks.votes[:2], [1, 2])
            self.assertIn("loss", hooks.logs[0][1])
            self.assertIn(hooks, trainer.callbacks)

    def test_its_members_are_checked(self):
        callbacks = keras.callbacks.CallbackList([keras.callbacks.BackupAndRestore(self.get_temp_dir())])
        with self.assertRaisesRegex(ValueError, "Received: BackupAndRestore"):
            Trainer(make(), batch_size=32).fit(X, Y, callbacks=callbacks, verbose=0)


class StopTest(parameterized.TestCase, tf.test.TestCase):
    class Stop(keras.callbacks.Callback):
        """Stops the training in one of the hooks, and notes which are called."""

        def __init__(self, where):
            super().__init__()
            self.where, self.calls = where, []

        def note(self, name):
            self.calls.append(name)
            if name == self.where:
                self.model.stop_training = True

        def on_train_begin(self, logs=None):
            self.note("train")

        def on_epoch_begin(self, epoch, logs=None):
            self.note(f"epoch {epoch}")

        def on_train_batch_end(self, batch, logs=None):
            self.note("batch")

        def on_test_batch_end(self, batch, logs=None):
            self.note("scored")

        def on_epoch_end(self, epoch, logs=None):
            self.note(f"end of epoch {epoch}")

        def on_train_end(self, logs=None):
            self.note("end")

    @classmethod
    @functools.cache
    def models(cls):
        """Return a trainer and a model, whose programs serve all parameters."""
        return Trainer(make(), batch_size=16), make()

    @parameterized.parameters("train", "epoch 0", "epoch 1", "batch", "scored", "end of epoch 1")
    def test_stop_training(self, where):
        """Keras takes a batch before it looks."""
        trainer, reference = self.models()
        for model in (trainer.model, reference):
            model.set_weights([np.ones((4, 1)), np.zeros(1)])
        stop, expected = self.Stop(where), self.Stop(where)
        options = {"epochs": 3, "validation_data": SCORED, "shuffle": False, "verbose": 0}
        history = trainer.fit(X, Y, callbacks=stop, **options)
        of_keras = reference.fit(X, Y, batch_size=16, validation_batch_size=16, callbacks=[expected], **options)
        self.assertEqual(stop.calls, expected.calls)
        self.assertAllClose({name: history.history[name] for name in of_keras.history}, of_keras.history, rtol=1e-5)


if __name__ == "__main__":
    tf.test.main()
