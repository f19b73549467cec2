"""The state of layers: what an update keeps, what it may not lose, and what making a model's variables leaves alone.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import dataclasses
import json
import math
import unittest
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import _keras_internals
from lars_keras.training import Trainer
from lars_keras.training.position import Position
from tests.training.test_meaning import BACKEND, Subclassed, X, Y, dataset, replicas, sequential


class Noise(keras.layers.Layer):
    """Adds random numbers, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seeds)


class Model(Subclassed):
    def __init__(self):
        super().__init__()
        self.noise = Noise()

    def call(self, x):
        return self.noise(self.dense(x))


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    return model


def values(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]


class WithoutMode(keras.Model):
    """A model whose `call` takes no `training`."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)

    def call(self, x):
        return self.out(self.norm(x))


class AsFitTest(tf.test.TestCase):
    def test_a_model_without_an_argument_for_the_mode(self):
        """Run its layers as in inference, as Keras does."""
        models = []
        for _ in range(2):
            keras.utils.set_random_seed(0)
            models.append(compiled(WithoutMode()))
            models[-1](X)
        stock, ours = models
        stock.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        Trainer(ours, batch_size=16, microbatch_size=8).fit(X, Y, epochs=2, shuffle=False, verbose=0)
        for expected, value in zip(values(stock), values(ours), strict=True):
            self.assertAllClose(expected, value, atol=1e-5)
        self.assertAllEqual(ours.norm.moving_mean, np.zeros(X.shape[-1]))

    def test_no_epoch_leaves_the_weights(self):
        model = compiled(sequential(keras.layers.Dense(1)), keras.optimizers.SGD(0.1, use_ema=True))
        trainer = Trainer(model, batch_size=16)
        trainer.fit(X, Y, verbose=0)
        model.set_weights([np.full_like(w, 7) for w in model.get_weights()])
        trainer.fit(X, Y, epochs=0, verbose=0)
        self.assertAllEqual(model.get_weights()[0], np.full_like(model.get_weights()[0], 7))

    def test_logs_of_the_end_are_those_of_the_last_epoch(self):
        found = {}
        callback = keras.callbacks.LambdaCallback(on_train_end=lambda logs: found.update(logs))
        trainer = Trainer(compiled(sequential(keras.layers.Dense(1))), batch_size=16)
        history = trainer.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[callback], verbose=0)
        self.assertEqual(found["val_loss"], history.history["val_loss"][-1])

    def test_mean_of_infinities(self):
        self.assertEqual(str(Position(losses=[math.inf, -math.inf]).mean_loss()), "nan")
        self.assertEqual(Position(losses=[1.0, 2.0]).mean_loss(), 1.5)
        for losses, mean in (
            ([math.inf, -math.inf, 1.0], "nan"),
            ([1.0, math.inf, 1e300], "inf"),
            ([math.nan, math.inf], "nan"),
        ):
            position = Position()
            position.add_losses(losses)
            self.assertEqual((str(position.mean_loss()), position.counted), (mean, len(losses)))

    def test_mean_of_many_losses(self):
        """It is exact however the losses come in, also after a restart, and takes as long in a long epoch."""
        rng = np.random.default_rng(0)
        losses = (rng.normal(size=2000) * 10.0 ** rng.integers(-15, 15, 2000)).tolist() + [1e15, 1e-15, -1e15]
        position = Position(losses=losses[:9])  # of an earlier version
        for i in range(9, len(losses), 7):
            position = Position(**json.loads(json.dumps(dataclasses.asdict(position))))
            position.add_losses(losses[i : i + 7])
            so_far = losses[: i + 7]
            self.assertEqual(position.mean_loss(), math.fsum(so_far) / len(so_far))
        self.assertLess(len(position.losses), 12)
        position.begin_epoch(3)
        position.add_losses([2.0])
        self.assertEqual((position.epoch, position.mean_loss()), (3, 2.0))


class KeptTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(1, 2)
    def test_frozen_weights_to_the_last_bit(self, devices):
        """Take a number of ghost batches that is no power of two, so that their mean would round."""
        with replicas(devices):
            frozen = [
                keras.layers.Dense(
                    64, kernel_initializer=keras.initializers.RandomNormal(seed=1), trainable=False, dtype=dtype
                )
                for dtype in ("float32", "bfloat16", "float16")
            ]
            trainer = Trainer(sequential(*frozen, keras.layers.Dense(1)), batch_size=12, microbatch_size=2)
            before = [value for layer in frozen for value in values(layer)]
            trainer.fit(dataset(X, Y), epochs=3, verbose=0)
        self.assertGreater(trainer.position.update, 10)
        after = [value for layer in frozen for value in values(layer)]
        self.assertLen({value.dtype for value in after}, 3)
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_frozen_statistics_to_the_last_bit(self):
        norm = keras.layers.BatchNormalization(trainable=False)
        trainer = Trainer(sequential(norm, keras.layers.Dense(1)), batch_size=12, microbatch_size=2)
        start = np.random.default_rng(0).random(4).astype("float32")
        for variable in (norm.moving_mean, norm.moving_variance):
            variable.assign(start)
        trainer.fit(dataset(X, Y), epochs=3, verbose=0)
        for variable in (norm.moving_mean, norm.moving_variance):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), start)

    def test_frozen_weights_are_not_summed(self):
        """A frozen network would double the memory of the sums, and the traffic."""
        layers = keras.layers.Dense(64, trainable=False), keras.layers.BatchNormalization(), keras.layers.Dense(1)
        trainer = Trainer(sequential(*layers), batch_size=16, microbatch_size=2)
        trainer.fit(dataset(X, Y), verbose=0)
        engine = trainer.engine
        sums = engine.step.begin(engine.read_state())[1] if BACKEND == "jax" else engine.step.zero_sums()
        sizes = [np.size(total) for total in keras.tree.flatten(sums) if np.size(total)]
        metrics = len(engine.step.variables["metrics"]) if BACKEND == "jax" else 0  # numbers, summed with the rest
        self.assertEqual(sum(sizes), 2 * 64 + 64 + 1 + 2 * 64 + 1 + metrics)

    def test_a_fit_that_fails_at_once(self):
        """Keep the restored position for the next `fit`."""

        def fail(logs):
            raise OSError("no disk")

        first, second = (Trainer(sequential(keras.layers.Dense(1)), batch_size=16) for _ in range(2))
        first.fit(X, Y, epochs=1.5, verbose=0)
        second.restore(*first.snapshot(), (X, Y))
        for hook in ({"on_train_begin": fail}, {"on_epoch_begin": lambda epoch, logs: fail(logs)}):
            with self.assertRaisesRegex(OSError, "no disk"):
                second.fit(X, Y, epochs=2, callbacks=keras.callbacks.LambdaCallback(**hook), verbose=0)
        second.fit(X, Y, epochs=2, verbose=0)
        self.assertTrue(second.resumed)
        self.assertLen(second.model.history.history["loss"], 1)

    def test_weights_that_a_callback_assigns(self):
        """The next update starts from them, also if two variables are given one array."""

        def made():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4)])
            model.layers[0].kernel.assign(np.arange(16, dtype="float32").reshape(4, 4) / 16)
            model.layers[1].kernel.assign(np.eye(4))
            return compiled(model, keras.optimizers.SGD(0.01, momentum=0.9))

        def halve(model, batch, value_of):
            if batch % 3 == 1:
                first, second = (layer.kernel for layer in model.layers)
                first.assign(keras.ops.multiply(first, 0.5))
                second.assign(value_of(first))

        own, reference = made(), made()
        assign = lambda batch, logs: halve(own, batch, lambda variable: variable.value)  # noqa: E731
        callback = keras.callbacks.LambdaCallback(on_train_batch_end=assign)
        Trainer(own, batch_size=16).fit(X, Y, epochs=3, shuffle=False, verbose=0, callbacks=[callback])
        updates = 0
        for start in 3 * list(range(0, len(X) - 15, 16)):
            reference.train_on_batch(X[start : start + 16], Y[start : start + 16])
            halve(reference, updates, keras.ops.convert_to_numpy)
            updates += 1
        self.assertGreater(updates, 6)
        for a, b in zip(values(own), values(reference), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    @unittest.skipUnless(BACKEND == "jax", "on JAX an update takes the arrays from the variables")
    def test_arrays_of_the_last_update_are_not_looked_at_again(self):
        model = compiled(sequential(keras.layers.Dense(4), keras.layers.Dense(1)))
        trainer = Trainer(model, batch_size=16)
        trainer.fit(X, Y, verbose=0)
        engine = trainer.engine
        engine._write_state(engine.read_state())  # the end of `fit` has assigned
        looked_at = mock.patch("lars_keras.training.jax.engine.backend_value", wraps=_keras_internals.backend_value)
        with looked_at as calls:
            engine.read_state()
            self.assertEqual(calls.call_count, 0)
            kernel = model.trainable_variables[0]
            kernel.assign(kernel + 1.0)
            state = engine.read_state()
            self.assertGreater(calls.call_count, 0)
        np.testing.assert_array_equal(state["trainable"][0], kernel.value)

    def test_as_keras(self):
        """A layer not built before: its calls and random numbers, in training and in evaluation."""
        own, reference = compiled(Model()), compiled(Model())
        trainer = Trainer(own, batch_size=16)
        history = trainer.fit(dataset(X, Y), epochs=2, verbose=0).history
        expected = reference.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        self.assertAllClose(history["loss"], expected["loss"], rtol=1e-5)
        losses = [trainer.evaluate(dataset(X, Y))["loss"] for _ in range(3)]
        self.assertAllClose(losses, [reference.evaluate(X, Y, 16, verbose=0) for _ in range(3)], rtol=1e-5)
        self.assertNotAllClose(losses[0], losses[1])
        self.assertEqual(float(own.noise.calls), 8 + 12)
        for a, b in zip(values(own), values(reference), strict=True):
            self.assertAllClose(a, b, rtol=1e-5)

    def test_validation_leaves_random_numbers(self):
        """The training after a validation is the same on any number of devices, and without one."""

        def trained(devices, **validation):
            with replicas(devices):
                model = compiled(Model())
            Trainer(model, batch_size=16, microbatch_size=4).fit(dataset(X, Y), epochs=3, verbose=0, **validation)
            return values(model.dense)

        expected = trained(1)
        for devices in (1, 2):
            for a, b in zip(trained(devices, validation_data=(X, Y)), expected, strict=True):
                self.assertAllClose(a, b, rtol=1e-5)

    def test_batch_size_of_the_model(self):
        """Models that take batches of one size only."""

        def fixed():
            inputs = keras.Input(batch_shape=(16, 4))
            return compiled(keras.Model(inputs, keras.ops.reshape(keras.layers.Dense(1)(inputs), (16,))))

        def squeezed():
            inputs = keras.Input((4,))
            squeeze = keras.layers.Lambda(keras.ops.squeeze, output_shape=())
            return compiled(keras.Model(inputs, squeeze(keras.layers.Dense(1)(inputs))))

        for make in (fixed, squeezed):
            with self.subTest(make.__name__):
                model, reference = make(), make()
                reference.set_weights(model.get_weights())
                trainer = Trainer(model, batch_size=16)
                history = trainer.fit(dataset(X, Y[:, 0]), epochs=2, verbose=0).history
                expected = reference.fit(X, Y[:, 0], batch_size=16, epochs=2, shuffle=False, verbose=0).history
                self.assertAllClose(history["loss"], expected["loss"], rtol=1e-5)
                self.assertAllClose(
                    trainer.evaluate(dataset(X, Y[:, 0]))["loss"], reference.evaluate(X, Y[:, 0], 16, verbose=0)
                )

    def test_models_that_are_not_built(self):
        """A layer that makes a variable from an array, which Keras does not allow in a scope; batches of one size."""

        class Scale(keras.layers.Layer):
            def build(self, shape):
                self.scale = keras.Variable(np.ones(shape[-1], "float32"), name="scale")

            def call(self, x):
                return x * self.scale

        class Own(Subclassed):
            def __init__(self):
                super().__init__()
                self.scale = Scale()

            def call(self, x):
                return self.dense(self.scale(x))

        squeezed = keras.layers.Lambda(lambda x: keras.ops.squeeze(x)[:, None])
        for name, make in (
            ("array", lambda: keras.Sequential([Scale(), keras.layers.Dense(1)])),
            ("subclass", Own),
            ("squeezed", lambda: keras.Sequential([keras.layers.Dense(1), squeezed])),
        ):
            with self.subTest(name):
                trainer = Trainer(compiled(make()), batch_size=16, microbatch_size=8)
                trainer.fit(dataset(X, Y), verbose=0)
                self.assertEqual(trainer.position.update, 4)
        wrong = compiled(keras.Sequential([keras.layers.Dense(4), keras.layers.Conv2D(2, 3)]))
        with self.assertRaisesRegex(ValueError, "expected min_ndim=4"):
            Trainer(wrong, batch_size=16).fit(dataset(X, Y), verbose=0)

    def test_sizes_of_the_snapshot(self):
        """They define the update, so another size is told."""
        trainer = Trainer(sequential(keras.layers.Dense(1)), batch_size=16, microbatch_size=8)
        trainer.fit(dataset(X, Y), verbose=0)
        snapshot = json.loads(json.dumps(trainer.snapshot()[1]))
        self.assertEqual(snapshot["sizes"], {"batch_size": 16, "microbatch_size": 8})
        for sizes in ({"batch_size": 32, "microbatch_size": 8}, {"batch_size": 16, "microbatch_size": 4}):
            other = Trainer(sequential(keras.layers.Dense(1)), **sizes)
            with self.assertLogs("absl", "WARNING") as logs:
                other.restore(trainer.snapshot()[0], snapshot, dataset(X, Y))
            self.assertIn(f"With {sizes} the run will not continue exactly", logs.output[0])
        with self.assertNoLogs("absl", "WARNING"):
            trainer.restore(trainer.snapshot()[0], snapshot, dataset(X, Y))
            trainer.restore(trainer.snapshot()[0], {k: v for k, v in snapshot.items() if k != "sizes"}, dataset(X, Y))
        with self.assertLogs("absl", "WARNING") as logs:
            Trainer(sequential(keras.layers.Dense(1)), batch_size=16, microbatch_size=64)
        self.assertRegex(logs.output[-1], "A replica has 16 examples .* not microbatch_size=64")

    def test_metric_of_several_values(self):
        """Compare logs and history, and restore a snapshot from JSON."""
        targets = np.eye(3, dtype="float32")[np.arange(64) % 3]

        def make():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
            model.compile(
                keras.optimizers.SGD(0.1), "categorical_crossentropy", weighted_metrics=[keras.metrics.F1Score()]
            )
            return model

        model, reference = make(), make()
        reference.set_weights(model.get_weights())
        trainer = Trainer(model, batch_size=16, microbatch_size=8)
        history = trainer.fit(dataset(X, targets), validation_data=dataset(X, targets), verbose=0).history
        expected = reference.fit(X, targets, 16, validation_data=(X, targets), shuffle=False, verbose=0).history
        for name in ("f1_score", "val_f1_score"):
            self.assertEqual(history[name][0].shape, (3,))
            self.assertAllClose(history[name], expected[name], rtol=1e-5)
        arrays, position = trainer.snapshot()
        other = Trainer(make(), batch_size=16, microbatch_size=8)
        other.restore(arrays, json.loads(json.dumps(position)), dataset(X, targets))
        self.assertAllEqual(other.position.logs["f1_score"], history["f1_score"][0])


class LostTest(parameterized.TestCase, tf.test.TestCase):
    """Assignments that an update would lose are refused by name."""

    def refused(self, layer, message):
        trainer = Trainer(sequential(layer, keras.layers.Dense(1)), batch_size=16, microbatch_size=8)
        with self.assertRaisesRegex(ValueError, message):
            trainer.fit(dataset(X, Y), verbose=0)

    def test_trainable_variable(self):
        layer = keras.layers.Dense(3)
        self.refused(keras.layers.SpectralNormalization(layer), "^Layers assign weights.*Received: .*/kernel$")

    def test_frozen_weight(self):
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(3), trainable=False)
        self.refused(layer, "^Layers assign weights.*Received: .*/kernel$")

    def test_variable_that_no_layer_tracks(self):
        class Hidden(keras.layers.Layer):
            total = [keras.Variable(0.0, name="hidden_total")]

            def call(self, x):
                self.total[0].assign_add(1.0)
                return x

        self.refused(Hidden(), "^Layers assign .*Received: hidden_total$")

    @unittest.skipIf(BACKEND == "jax", "Keras refuses it itself, when the model is made")
    def test_random_numbers_without_a_generator(self):
        class Global(keras.layers.Layer):
            def call(self, x):
                return x + keras.random.normal(keras.ops.shape(x))

        self.refused(Global(), "^Layers assign .*SeedGenerator")


class AverageTest(tf.test.TestCase):
    """`use_ema=True`."""

    def make(self):
        return sequential(
            keras.layers.Dense(1, kernel_initializer="ones"), optimizer=keras.optimizers.SGD(0.1, use_ema=True)
        )

    def test_an_end_of_its_own(self):
        """An optimizer that averages by itself hands the average over at the end of `fit`, as in Keras."""

        class Halving(keras.optimizers.SGD):
            def finalize_variable_values(self, var_list):
                for variable in var_list:
                    variable.assign(variable / 2)

        halved, plain = compiled(Subclassed(), Halving(0.1)), compiled(Subclassed(), keras.optimizers.SGD(0.1))
        for model in (halved, plain):
            Trainer(model, batch_size=16).fit(dataset(X, Y), verbose=0)
        for a, b in zip(values(halved), values(plain), strict=True):
            self.assertAllClose(a, b / 2, rtol=1e-6)

    def test_an_average_that_is_put_in_now_and_then(self):
        """Between two of these times a validation scores the average too, so the last one scores the final model."""
        optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)
        model, raw = sequential(keras.layers.Dense(1, kernel_initializer="ones"), optimizer=optimizer), []
        trainer = Trainer(model, batch_size=16)
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: raw.append(trainer.snapshot()[0]["model/0"])
        )
        history = trainer.fit(X, Y, epochs=1.25, validation_data=(X, Y), callbacks=look, verbose=0).history  # 5 updates
        self.assertNotAllClose(raw[-1], values(model)[0], rtol=1e-3)
        self.assertAllClose(history["val_loss"][-1], trainer.evaluate(X, Y)["loss"], rtol=1e-6)

    def test_before_the_first_update(self):
        """Keras's averages start at 0."""
        model, seen = self.make(), []
        look = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: seen.append(trainer.evaluate(X, Y)["loss"]))
        trainer = Trainer(model, batch_size=16)
        trainer.fit(dataset(X, Y), epochs=0, callbacks=look, verbose=0)
        self.assertAllEqual(values(model)[0], np.ones((4, 1)))
        self.assertAllClose(seen, [self.make().evaluate(X, Y, verbose=0)[0]], rtol=1e-5)

    def test_fit_of_keras_after_it(self):
        """Go on with Keras's own `fit`, which on JAX may not donate weights and averages that share memory."""
        model, reference = self.make(), self.make()
        Trainer(model, batch_size=16).fit(dataset(X, Y), verbose=0)
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        if BACKEND == "tensorflow":
            for _ in range(2):
                reference.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
            self.assertAllClose(values(model)[0], values(reference)[0], rtol=1e-5)
        Trainer(model, batch_size=16).fit(dataset(X, Y), verbose=0)  # weights and averages in one memory on JAX


if __name__ == "__main__":
    tf.test.main()
