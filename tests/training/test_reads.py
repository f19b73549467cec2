"""A loss or metric reads more than the model: numbers of the optimizer, and variables of nobody.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from absl.testing import parameterized

from lars_keras.training import Trainer
from tests.training.test_meaning import BACKEND, Subclassed, X, Y, replicas


class Annealed(Subclassed):
    """Grows its loss with the updates, as the weight of a term that is annealed does."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred - y)) * keras.ops.cast(self.optimizer.iterations, "float32")


class Read(keras.metrics.Metric):
    """The learning rate at the last batch, or now."""

    def __init__(self, optimizer, name):
        super().__init__(name=name)
        self.optimizer, self.at_batch = optimizer, self.add_weight(name="at_batch", initializer="zeros")

    def update_state(self, y, y_pred, sample_weight=None):
        self.at_batch.assign(self.optimizer.learning_rate)

    def result(self):
        return keras.ops.convert_to_tensor(self.at_batch if self.name == "at_batch" else self.optimizer.learning_rate)


class OptimizerIsReadTest(parameterized.TestCase, tf.test.TestCase):
    """A loss or metric reads the optimizer as it is at the update. Keras's `fit` fails here on JAX."""

    @parameterized.product(microbatch_size=(None, 16), devices=(1, 2))
    def test_as_by_hand(self, microbatch_size, devices):
        with replicas(devices):
            model = Annealed()
            optimizer = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
            names = ("at_batch", "now") if devices == 1 else ()  # replicas cannot add them up
            model.compile(optimizer, metrics=[Read(optimizer, name) for name in names])
            trainer = Trainer(model, batch_size=64, microbatch_size=microbatch_size)
            history = trainer.fit(X, Y, epochs=4, shuffle=False, verbose=0, validation_data=(X, Y)).history
        weights, x, y, losses = np.ones((5, 1)), np.c_[X, np.ones(64)].astype("float64"), Y.astype("float64"), []
        weights[4] = 0
        for i in range(5):
            errors = x @ weights - y
            losses.append(i * np.mean(errors**2))
            scored = (i + 1) * np.mean((x @ (weights - 0.1 * 0.5**i * i * 2 * x.T @ errors / 64) - y) ** 2)
            if i < 4:
                self.assertAllClose(history["val_loss"][i], scored, rtol=1e-5)
            weights -= 0.1 * 0.5**i * i * 2 * x.T @ errors / 64
        self.assertAllClose(history["loss"], losses[:4], rtol=1e-5)
        if devices == 1:
            rates = 0.1 * 0.5 ** np.arange(5)
            self.assertAllClose(history["at_batch"], rates[:4], rtol=1e-6)
            self.assertAllClose(history["now"], rates[1:], rtol=1e-6)
            self.assertAllClose(history["val_at_batch"], rates[1:], rtol=1e-6)


class Kernel(Read):
    """The sum of the kernel at the last batch, or now."""

    def __init__(self, layer, name):
        super().__init__(None, name)
        self.layer = layer

    def update_state(self, y, y_pred, sample_weight=None):
        self.at_batch.assign(keras.ops.sum(self.layer.kernel))

    def result(self):
        return (
            keras.ops.convert_to_tensor(self.at_batch) if self.name == "at_batch" else keras.ops.sum(self.layer.kernel)
        )


class WeightsAreReadTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(None, 16)
    def test_by_a_metric(self, microbatch_size):
        """A metric reads the weights before the update, and its result those after it."""
        model, sums = Subclassed(), [4.0]
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[Kernel(model.dense, n) for n in ("at_batch", "now")])
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: sums.append(float(np.sum(model.dense.get_weights()[0])))
        )
        trainer = Trainer(model, batch_size=64, microbatch_size=microbatch_size)
        options = {"epochs": 3, "validation_data": (X, Y), "callbacks": note, "verbose": 0}
        history = trainer.fit(X, Y, **options).history
        self.assertGreater(abs(sums[-1] - sums[0]), 0.01)
        for name, expected in {
            "at_batch": sums[:3],
            "now": sums[1:],
            "val_at_batch": sums[1:],
            "val_now": sums[1:],
        }.items():
            self.assertAllClose(history[name], expected, rtol=1e-6)


class FreeVariableTest(tf.test.TestCase):
    def test_a_value_that_is_kept_is_named(self):
        """Keep the value of a variable that is not the model's on JAX, as in `fit`. TensorFlow reads it."""
        factor = keras.Variable(1.0, name="factor")
        model = Subclassed()
        model.compile("sgd", lambda y, y_pred: factor * keras.ops.mean(keras.ops.abs(y - y_pred), -1))
        change = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: factor.assign(0.0))
        with self.assertLogs(level="WARNING") as logs:
            logging.warning("at least one")
            trainer = Trainer(model, batch_size=32, microbatch_size=16)
            losses = trainer.fit(X, Y, epochs=2, callbacks=[change], verbose=0).history["loss"]
        named = [line for line in logs.output if "neither the model's" in line]
        self.assertEqual([line.rpartition(": ")[2] for line in named], ["factor"] if BACKEND == "jax" else [])
        self.assertEqual(losses[1] > 0, BACKEND == "jax")


if __name__ == "__main__":
    tf.test.main()
