"""The end of a run: its last state is saved, a restart knows that it is over, callbacks go on as if never stopped."""

import errno
import pathlib
import tempfile
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from lars_keras import LARS
from lars_keras.runtime import checkpoint
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.divergence import DivergenceGuard
from lars_keras.runtime.errors import Diverged, UsageError
from lars_keras.runtime.recovery import CheckpointCallback, fit_with_recovery
from lars_keras.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`")
_RNG = np.random.default_rng(0)
X, Y = _RNG.normal(size=(64, 4)).astype("f4"), _RNG.normal(size=(64, 1)).astype("f4")


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


class Stop(keras.callbacks.Callback):
    """Stops after an update, or at the end of an epoch."""

    def __init__(self, update=None, epoch=None):
        super().__init__()
        self.update, self.epoch = update, epoch

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.update:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.stop_training = True


class Script:
    """Train for a run of 4 updates in an epoch; every process of the run calls it."""

    def __init__(self, folder, optimizer=None, restore=True):
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        self.model.compile(optimizer or LARS(0.1), "mse", weighted_metrics=["mae"])
        self.trainer = Trainer(self.model, batch_size=16)
        self.manager = CheckpointManager(folder, max_to_keep=10)
        if restore and (found := self.manager.latest()):
            self.trainer.restore(found.arrays, found.metadata["position"], dataset())
        self.start = self.trainer.position.update

    def fit(self, *callbacks, epochs=5, recovery=False, first=True, **policy):
        save = CheckpointCallback(self.trainer, self.manager, SavePolicy(**policy or {"minutes": 10}))
        options = {"epochs": epochs, "validation_data": dataset(), "verbose": 0}
        if recovery:
            history = fit_with_recovery(dataset(), save, callbacks=callbacks, **options)
        else:
            ordered = [save, *callbacks] if first else [*callbacks, save]
            history = self.trainer.fit(dataset(), callbacks=ordered, **options)
            self.manager.wait()
        self.history = history.history
        return self

    @property
    def saved(self):
        return sorted(int(path.name[7:15]) for path in self.manager.directory.iterdir())

    @property
    def weights(self):
        return np.concatenate([w.ravel() for w in self.model.get_weights()])

    def rate(self):
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


class HostTestCase(tf.test.TestCase):
    """Tests of what the host does around updates. They run eagerly: compiling a step takes longer than 20 of them."""

    def setUp(self):
        super().setUp()
        tf.config.run_functions_eagerly(True)
        self.addCleanup(tf.config.run_functions_eagerly, False)

    def folder(self):
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))


class RunEndTest(HostTestCase):
    def test_a_lone_first_checkpoint_of_another_run_is_kept(self):
        folder = self.folder()
        Script(folder).fit(Stop(update=1), epochs=1)
        for path in folder.glob("update-00000001-*"):
            path.unlink()
        before = list(folder.iterdir())
        self.assertLen(before, 1)
        with self.assertRaisesRegex(UsageError, "holds a checkpoint of update 0, and this run is at update 0. Restore"):
            Script(folder, restore=False).fit(epochs=1)
        self.assertEqual(list(folder.iterdir()), before)
        self.assertEqual(Script(folder).fit(epochs=1).saved, [0, 4])

    def test_the_last_state_is_saved(self):
        for recovery in (False, True):
            policies = {"minutes": 10}, {"updates": 8}, {"updates": 10}
            for policy, saved in zip(policies, ([0, 20], [0, 8, 16, 20], [0, 10, 20]), strict=True):
                folder = self.folder()
                run = Script(folder).fit(recovery=recovery, **policy)
                self.assertEqual(run.saved, saved)
                again = Script(folder).fit(recovery=recovery, **policy)
                self.assertEqual((again.start, again.trainer.position.update, again.saved), (20, 20, run.saved))
                self.assertEqual(again.history["val_loss"], run.history["val_loss"][-1:])

    def test_also_of_a_run_that_a_function_stops_at_an_epoch(self):
        run = Script(self.folder())
        stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: setattr(run.model, "stop_training", e == 2))
        self.assertEqual(run.fit(stop, updates=8).saved, [0, 8, 12])

    def test_a_resumed_run_saves_on_its_schedule(self):
        folder = self.folder()
        Script(folder).fit(Stop(update=13), updates=8)
        self.assertEqual(Script(folder).fit(updates=8, epochs=4).saved, [0, 8, 13, 16])

    def test_a_disk_that_is_full_at_the_end(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        with unittest.mock.patch.object(checkpoint.os, "replace", side_effect=full), self.assertRaises(OSError):
            Script(self.folder()).fit(epochs=1, recovery=True)

    def test_a_rollback_skips_up_to_the_update_that_diverged(self):
        run = Script(self.folder())
        run.trainer = Trainer(run.model, batch_size=16, steps_per_execution=4)

        class Fails(keras.callbacks.Callback):
            failed = False

            def on_train_batch_end(self, batch, logs=None):
                if not self.failed:
                    self.failed = True
                    raise Diverged("no number", 2)

        run.fit(Fails(), epochs=1, recovery=True)
        self.assertEqual((run.trainer.position.update, run.trainer.position.batches_consumed), (4, 6))

    def test_also_of_a_run_that_is_stopped(self):
        whole = Script(self.folder()).fit(updates=8)
        for first in (True, False):
            for stop, update in ((Stop(update=13), 13), (Stop(epoch=2), 12)):
                folder = self.folder()
                self.assertEqual(Script(folder).fit(stop, first=first, updates=8).saved, [0, 8, update])
                again = Script(folder).fit(first=first, updates=8)
                self.assertEqual((again.start, again.trainer.position.update), (update, 20))
                self.assertAllEqual(again.weights, whole.weights)
                self.assertEqual(again.history["mae"], whole.history["mae"][-len(again.history["mae"]) :])

    def test_a_fraction_of_an_epoch_is_saved_and_goes_on(self):
        folder = self.folder()
        self.assertEqual(Script(folder).fit(epochs=1.5).saved, [0, 6])
        again = Script(folder).fit(epochs=3)
        whole = Script(self.folder()).fit(epochs=3)
        self.assertAllEqual(again.weights, whole.weights)
        self.assertEqual(again.history["mae"], whole.history["mae"][1:])  # not those of the evaluation in between

    def test_the_weights_that_go_on_and_not_their_average(self):
        whole = Script(self.folder(), keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)).fit(epochs=6)
        for stop in ([], [Stop(epoch=2)], [keras.callbacks.EarlyStopping(patience=0, baseline=0.0)]):
            folder = self.folder()
            optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
            Script(folder, optimizer).fit(*stop, epochs=3)
            again = Script(folder, keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)).fit(epochs=6)
            self.assertAllEqual(again.weights, whole.weights)

    def test_a_last_update_that_is_not_finite_is_not_saved(self):
        run = Script(self.folder(), keras.optimizers.SGD(1e30)).fit(keras.callbacks.TerminateOnNaN())
        self.assertEqual(run.saved, [0])

    def test_a_new_run_keeps_what_an_earlier_one_saved(self):
        for recovery in (False, True):
            folder = self.folder()
            run = Script(folder).fit(updates=5)
            with self.assertRaisesRegex(UsageError, "holds a checkpoint of update 20, and this run is at update 0"):
                Script(folder, restore=False).fit(epochs=1, recovery=recovery)
            with self.assertRaisesRegex(UsageError, "holds a checkpoint of update 20"):  # a second phase
                run.fit(epochs=1, recovery=recovery)
            self.assertEqual(run.saved, [0, 5, 10, 15, 20])


class CallbackMemoryTest(HostTestCase):
    def check(self, callback, optimizer, cuts, read):
        whole = Script(self.folder(), optimizer()).fit(callback(), epochs=8)
        for cut in cuts:
            folder = self.folder()
            Script(folder, optimizer()).fit(callback(), Stop(**cut), epochs=8)
            again = Script(folder, optimizer()).fit(callback(), epochs=8)
            self.assertEqual(read(again), read(whole), cut)
            self.assertAllEqual(again.weights, whole.weights)

    def test_early_stopping(self):
        self.check(
            lambda: keras.callbacks.EarlyStopping(patience=4),
            lambda: LARS(0.0),
            ({"update": 9}, {"epoch": 1}),
            lambda run: run.trainer.position.update,
        )

    def test_a_restart_of_a_run_that_early_stopping_ended(self):
        folder = self.folder()
        for start in (0, 12):
            run = Script(folder, LARS(0.0)).fit(keras.callbacks.EarlyStopping(patience=2), epochs=8)
            self.assertEqual((run.start, run.trainer.position.update), (start, 12))

    def test_rate_on_a_plateau(self):
        self.check(
            lambda: keras.callbacks.ReduceLROnPlateau(patience=3, factor=0.1, min_delta=1e9),
            lambda: keras.optimizers.SGD(1e-2),
            ({"update": 9}, {"update": 12}, {"epoch": 3}),
            Script.rate,
        )

    def test_medians_of_the_guard(self):
        """A resumed run is guarded from its first update on."""
        folder = self.folder()
        Script(folder).fit(DivergenceGuard(window=5), Stop(update=9), updates=8)
        guard = DivergenceGuard(window=5)
        Script(folder).fit(guard, Stop(update=10), updates=8)
        with self.assertRaisesRegex(Diverged, "median over the last 5 updates"):
            guard.on_train_batch_end(10, {"step_loss": 1e6})

    def test_the_best_model_is_not_overwritten_by_a_worse(self):
        folder = self.folder()
        best = str(folder / "best.keras")

        def fit(rate, epochs):
            keep = keras.callbacks.ModelCheckpoint(best, save_best_only=True)
            run = Script(folder / "c", keras.optimizers.SGD(rate))
            run.model.optimizer.learning_rate = rate
            return run.fit(keep, epochs=epochs).history["val_loss"]

        first = fit(0.1, 3)
        second = fit(1.5, 5)
        self.assertGreater(min(second[1:]), min(first))
        score = keras.models.load_model(best).evaluate(X, Y, verbose=0)[0]
        self.assertAllClose(score, min(first), rtol=1e-5)

    def test_what_is_not_restored_is_said(self):
        folder = self.folder()
        Script(folder).fit(epochs=1)
        with self.assertLogs(level="WARNING") as logs:
            Script(folder).fit(keras.callbacks.EarlyStopping(restore_best_weights=True), epochs=2)
        self.assertIn("does not say what EarlyStopping/0 remembered", logs.output[0])
        with self.assertLogs(level="WARNING") as logs:
            Script(folder).fit(keras.callbacks.EarlyStopping(restore_best_weights=True), epochs=3)
            Script(folder).fit(keras.callbacks.EarlyStopping(restore_best_weights=True), epochs=4)
        self.assertIn("does not hold the best weights of EarlyStopping", logs.output[-1])

    def test_an_evaluation_calls_what_keras_calls(self):
        calls = []

        class Note(keras.callbacks.Callback):
            def on_test_begin(self, logs=None):
                calls.append("begin")

            def on_test_batch_begin(self, batch, logs=None):
                calls.append(f"before {batch}")

            def on_test_batch_end(self, batch, logs=None):
                calls.append(f"after {batch}")

            def on_test_end(self, logs=None):
                calls.append(f"end {sorted(logs)}")

        Script(self.folder()).fit(Note(), epochs=1)
        batches = [f"{when} {i}" for i in range(4) for when in ("before", "after")]
        self.assertEqual(calls, ["begin", *batches, "end ['loss', 'mae', 'n']"])


if __name__ == "__main__":
    tf.test.main()
