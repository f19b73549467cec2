"""`Trainer.evaluate`: data that can be read once, weights by output, no data, a frozen model, the EMA weights.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import functools
import math
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from lars_keras.training.scoring import score_batch, summary

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype("float32")
Y = RNG.normal(size=(32, 1)).astype("float32")
W = RNG.random(32).astype("float32")


def batches():
    return [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


def make(optimizer="sgd"):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(optimizer, "mse")
    return model


@functools.cache
def score_of_keras():
    """Return the loss of `make`."""
    return make().evaluate(X, Y, verbose=0)


def outputs(*names):
    inputs = keras.Input((4,))
    kernels = {"a": "ones", "b": "zeros"}
    made = {name: keras.layers.Dense(1, name=name, kernel_initializer=kernels[name])(inputs) for name in names}
    model = keras.Model(inputs, made)
    model.compile("sgd", {name: "mse" for name in names}, loss_weights=dict.fromkeys(names, 0.5))
    return model


def generator():
    yield from batches()


class ReadOnceTest(parameterized.TestCase, tf.test.TestCase):
    """Looking at the shapes of the first batch loses no batch."""

    @parameterized.parameters("generator", "function", "function of a generator")
    def test_every_example_once(self, form):
        kept = generator()
        data = {
            "generator": kept,
            "function": lambda context: iter(batches()),
            "function of a generator": lambda c: kept,
        }
        trainer = Trainer(make(), batch_size=8)
        scores = trainer.evaluate(data[form])
        self.assertEqual(scores["n"], 32)
        self.assertAllClose(scores["loss"], score_of_keras(), rtol=1e-5)
        again = generator() if form == "generator" else lambda context: iter(batches())
        self.assertEqual(trainer.evaluate(again), scores)

    def test_in_training_after_restore(self):
        """A function of a generator gives `restore` the shapes, and the same batch to `fit`."""
        kept, reference, trainer = iter(batches()), Trainer(make(), batch_size=8), Trainer(make(), batch_size=8)
        reference.evaluate(X, Y)
        snapshot = reference.snapshot()
        data = lambda context, update: kept  # noqa: E731
        trainer.restore(*snapshot, data)
        trainer.fit(data, steps_per_epoch=4, verbose=0)
        reference.fit(batches(), verbose=0)
        self.assertAllEqual(*(np.array(t.model.get_weights()[0]) for t in (trainer, reference)))

    def test_a_generator_for_each_validation_is_refused(self):
        with self.assertRaisesRegex(ValueError, "that can be read again and again"):
            Trainer(make(), batch_size=8).fit(X, Y, validation_data=generator(), verbose=0)

    def test_a_generator_function_was_not_called(self):
        trainer = Trainer(make(), batch_size=8)
        for call, advice in (
            (lambda: trainer.fit(generator, steps_per_epoch=2, verbose=0), r"Call it: `fit\(generator\(\)\)`"),
            (lambda: trainer.evaluate(generator), r"Call it: `evaluate\(generator\(\)\)`"),
            (lambda: trainer.fit(X, Y, validation_data=generator, verbose=0), r"list of its .*`list\(generator\(\)\)`"),
        ):
            with self.assertRaisesRegex(ValueError, advice):
                call()

        def of_context(context):
            yield from batches()

        self.assertEqual(trainer.evaluate(of_context)["n"], 32)

    def test_a_generator_again_with_class_weight(self):
        endless, trainer = (batch for _ in range(9) for batch in batches()), Trainer(make(), batch_size=8)
        trainer.fit(endless, steps_per_epoch=2, verbose=0)
        with self.assertRaisesRegex(ValueError, "`class_weight` needs arrays"):
            trainer.fit(endless, steps_per_epoch=2, class_weight={0: 1.0}, verbose=0)


class WeightsTest(parameterized.TestCase, tf.test.TestCase):
    def test_one_output_by_its_name(self):
        trainer = Trainer(outputs("a"), batch_size=8)
        of_array, of_name = (trainer.evaluate(X, {"a": Y}, sample_weight=w) for w in (W, {"a": W}))
        self.assertEqual(of_array, of_name)
        self.assertAllClose(of_array["n"], W.sum(), rtol=1e-6)
        losses = (X.sum(1) - Y[:, 0]) ** 2
        self.assertAllClose(of_array["loss"], 0.5 * (W * losses).sum() / W.sum(), rtol=1e-5)

    @parameterized.parameters(False, True)
    def test_several_outputs_as_keras(self, by_output):
        """The loss is the weighted sum of the losses of the outputs that come with it."""
        model = outputs("a", "b")
        weight = {"a": W, "b": 2 * W} if by_output else W
        targets = {"a": Y, "b": Y}
        scores = Trainer(model, batch_size=8).evaluate(X, targets, sample_weight=weight)
        expected = model.evaluate(X, targets, sample_weight=weight, batch_size=8, verbose=0, return_dict=True)
        self.assertAllClose(scores.pop("n"), 32 if by_output else W.sum(), rtol=1e-6)
        self.assertAllClose(scores, expected, rtol=1e-5)
        self.assertAllClose(scores["loss"], 0.5 * (scores["a_loss"] + scores["b_loss"]), rtol=1e-5)

    @parameterized.parameters(False, True)
    def test_padding_of_several_outputs(self, by_output):
        model = outputs("a", "b")

        def scored(x, y, w, padded):
            x, y, w = map(keras.ops.convert_to_tensor, (x, y, w))
            weight = {"a": w, "b": 2 * w} if by_output else w
            return summary(*map(float, score_batch(model, x, {"a": y, "b": y}, weight, padded)))

        whole = scored(X[:5], Y[:5], W[:5], False)
        padded = scored(X[:8], Y[:8], np.array([*W[:5], 0, 0, 0], "float32"), True)
        self.assertAllClose(padded, whole, rtol=1e-5)

    def test_no_weight_is_no_score(self):
        zeros, targets = np.zeros(32, "float32"), {"a": Y, "b": Y}
        for model, y, weight in (
            (make(), Y, zeros),
            (outputs("a"), {"a": Y}, {"a": zeros}),
            (outputs("a", "b"), targets, zeros),
            (outputs("a", "b"), targets, {"a": zeros, "b": zeros}),
        ):
            scores = Trainer(model, batch_size=8).evaluate(X, y, sample_weight=weight)
            self.assertTrue(math.isnan(scores["loss"]))
            self.assertEqual(scores["n"], 0)

    def test_no_valid_entry_is_no_score(self):
        model = keras.Sequential([keras.Input((3, 4)), keras.layers.Masking(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        scores = Trainer(model, batch_size=8).evaluate(np.zeros((8, 3, 4), "float32"), np.ones((8, 3, 1), "float32"))
        self.assertTrue(math.isnan(scores["loss"]))


class FrozenTest(tf.test.TestCase):
    def test_scored(self):
        model = make()
        model.trainable = False
        model.compile("sgd", "mse")
        trainer = Trainer(model, batch_size=8)
        self.assertAllClose(trainer.evaluate(X, Y)["loss"], score_of_keras(), rtol=1e-5)
        with self.assertRaisesRegex(ValueError, "no trainable variables"):
            trainer.fit(X, Y, verbose=0)

    def test_variables_are_looked_for_once(self):
        if keras.backend.backend() != "jax":
            self.skipTest("TensorFlow finds them in the program of the update")
        trainer = Trainer(make(), batch_size=8)
        trainer.evaluate(X, Y)
        with unittest.mock.patch.object(
            trainer.engine.step, "find_unreached", wraps=trainer.engine.step.find_unreached
        ) as found:
            for _ in range(2):
                trainer.fit(X, Y, verbose=0)
        self.assertEqual(found.call_count, 1)


class AverageTest(tf.test.TestCase):
    """`evaluate` scores the EMA weights while a run goes on, and what the model has after its end."""

    def averaged(self):
        return Trainer(make(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)), batch_size=8)

    @classmethod
    @functools.cache
    def reference(cls):
        return make()

    def average(self, trainer):
        """Return the score of the EMA weights, from Keras."""
        weights = trainer.model.optimizer._model_variables_moving_average
        reference = self.reference()
        reference.set_weights([np.array(keras.ops.convert_to_numpy(w)) for w in weights])
        return reference.evaluate(X, Y, verbose=0)

    def test_in_callbacks(self):
        trainer, seen, kept = self.averaged(), [], []

        def look(**_):
            before = trainer.snapshot()[0]
            seen.append((trainer.evaluate(X, Y)["loss"], self.average(trainer)))
            kept.extend(zip(before.values(), trainer.snapshot()[0].values(), strict=True))

        trainer.fit(
            X,
            Y,
            validation_data=(X, Y),
            callbacks=keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: look(),
                on_epoch_end=lambda epoch, logs: look() or seen.append((logs["val_loss"], seen[-1][0])),
            ),
            verbose=0,
        )
        self.assertLen(seen, 6)
        for score, expected in seen:
            self.assertAllClose(score, expected, rtol=1e-5)
        for before, after in kept:
            self.assertAllEqual(before, after)
        self.assertAllClose(trainer.evaluate(X, Y)["loss"], seen[-1][0], rtol=1e-6)
        trainer.model.set_weights(make().get_weights())
        self.assertAllClose(trainer.evaluate(X, Y)["loss"], score_of_keras(), rtol=1e-5)

    def test_keras_evaluates_in_callbacks(self):
        """The model has the EMA weights there, and on JAX Keras donates their arrays."""
        trainer, seen = self.averaged(), []

        def look():
            seen.append((trainer.model.evaluate(X, Y, verbose=0), self.average(trainer)))
            seen.append((trainer.model.predict(X, verbose=0), self.reference().predict(X, verbose=0)))

        plain = self.averaged()
        end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: look())
        trainer.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=end, verbose=0)
        plain.fit(X, Y, epochs=3, verbose=0)
        self.assertLen(seen, 6)
        for score, expected in seen:
            self.assertAllClose(score, expected, rtol=1e-5)
        self.assertAllEqual(*(np.array(t.model.get_weights()[0]) for t in (plain, trainer)))

    def test_evaluations_leave_the_training(self):
        plain, watched = self.averaged(), self.averaged()
        look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: watched.evaluate(X, Y))
        plain.fit(X, Y, verbose=0)
        watched.fit(X, Y, callbacks=look, verbose=0)
        self.assertAllEqual(*(np.array(t.model.get_weights()[0]) for t in (plain, watched)))

    def test_evaluations_leave_metrics_and_random_numbers(self):
        """Random numbers that the model also draws in inference, and metrics of the epoch so far."""

        class Noisy(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.seeds = keras.random.SeedGenerator(3)

            def call(self, x):
                return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.seeds)

        def fit(evaluations):
            model = keras.Sequential([keras.Input((4,)), Noisy(), keras.layers.Dense(1, kernel_initializer="ones")])
            model.compile("sgd", "mse", metrics=["mae"])
            trainer, snapshots = Trainer(model, batch_size=8, microbatch_size=4), []

            def look(batch, logs):
                for _ in range(evaluations):
                    trainer.evaluate(X[:5], Y[:5])
                snapshots.append(trainer.snapshot()[0])

            callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
            history = trainer.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=callback, verbose=0).history
            return history, snapshots

        (plain, snapshots), (watched, own) = fit(0), fit(2)
        self.assertEqual(plain, watched)
        for a, b in zip(snapshots, own, strict=True):
            self.assertAllEqual(a.keys(), b.keys())
            for name, value in a.items():
                self.assertAllEqual(value, b[name])

    def test_the_epoch_of_the_last_update(self):
        """Score it whatever `validation_freq` says, also if a callback stops the run within it."""

        def stop(batch, logs):
            trainer.model.stop_training = batch == 5

        for callback, epochs, scored in ((None, 3, 3), (keras.callbacks.LambdaCallback(on_train_batch_end=stop), 9, 2)):
            trainer = Trainer(make(), batch_size=8)
            options = {"validation_data": (X, Y), "validation_freq": 7, "callbacks": callback, "verbose": 0}
            history = trainer.fit(X, Y, epochs=epochs, **options)
            self.assertEqual((history.epoch[-1] + 1, len(history.history["val_loss"])), (scored, 1))

    def test_after_keras_has_swapped(self):
        trainer, seen = self.averaged(), []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append((trainer.evaluate(X, Y)["loss"], logs["val_loss"]))
        )
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        trainer.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[swap, look], verbose=0)
        for score, expected in seen:
            self.assertAllClose(score, expected, rtol=1e-5)

    def test_restored(self):
        first, second, snapshots = self.averaged(), self.averaged(), []
        keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: snapshots.append(first.snapshot()))
        first.fit(X, Y, epochs=2, callbacks=keep, verbose=0)
        second.restore(*snapshots[5], (X, Y))
        self.assertAllClose(second.evaluate(X, Y)["loss"], self.average(second), rtol=1e-5)
        before = second.snapshot()[0]
        with self.assertLogs(level="WARNING") as logs:
            second.fit(X, Y, epochs=1, verbose=0)
        self.assertIn("at update 6, and this `fit` ends with update 4", "".join(logs.output))
        for name, value in second.snapshot()[0].items():
            self.assertAllEqual(value, before[name])
        second.fit(X, Y, epochs=2, verbose=0)
        self.assertEqual(second.position.update, 8)
        self.assertAllEqual(*(np.array(t.model.get_weights()[0]) for t in (first, second)))


class Uneven(keras.losses.Loss):
    """A mean over the examples only without weights."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        losses = keras.ops.mean((y_true - y_pred) ** 2, -1)
        if sample_weight is None:
            return keras.ops.mean(losses)
        return keras.ops.sum(losses * sample_weight) / keras.ops.sum(sample_weight)


class SecondCallTest(tf.test.TestCase):
    """Check with other data, too, what the first data show."""

    def test_without_targets(self):
        trainer = Trainer(make(), batch_size=8)
        trainer.evaluate(X, Y)
        for call in (
            lambda: trainer.fit(X, verbose=0),
            lambda: trainer.evaluate(X),
            lambda: trainer.evaluate(lambda context: iter([(X,)])),
            lambda: trainer.evaluate([(X,)]),
            lambda: trainer.fit(X, Y, validation_data=(X,), verbose=0),
        ):
            with self.assertRaisesRegex(ValueError, "The loss needs targets"):
                call()

    def test_weights(self):
        model = make()
        model.compile("sgd", Uneven())
        trainer = Trainer(model, batch_size=8, microbatch_size=4)
        trainer.fit(X, Y, verbose=0)
        with self.assertRaisesRegex(ValueError, "is not the mean over its examples.* Received: uneven"):
            trainer.fit(X, Y, sample_weight=W, verbose=0)
        trainer.fit(X, Y, verbose=0)


if __name__ == "__main__":
    tf.test.main()
