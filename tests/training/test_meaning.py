"""`Trainer` means what `model.fit` and `model.evaluate` mean, or refuses, on TensorFlow and JAX.

Run by pytest on TensorFlow, this file starts itself again with KERAS_BACKEND=jax.
"""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from tests.second_process import run_on

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype("float32")
Y = RNG.normal(size=(64, 1)).astype("float32")


def dataset(*arrays, batch=8):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch)


class Subclassed(keras.Model):
    """A model with a layer; the cases add what Keras lets a model have of its own."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)


class OverrideTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        "train_step", "test_step", "make_train_function", "make_test_function", "fit", "evaluate", "train_on_batch"
    )
    def test_a_loop_of_its_own_is_refused(self, name):
        inherited = type("Own", (Subclassed,), {name: lambda self, *args, **kwargs: None})
        for model in (inherited(), type("Child", (inherited,), {})()):
            model.compile("sgd", "mse")
            with self.assertRaisesRegex(ValueError, rf"none of a model's own: {name}\. Put"):
                Trainer(model, batch_size=16)

    def test_one_that_was_put_into_the_model_is_refused(self):
        model = Subclassed()
        model.compile("sgd", "mse")
        model.train_step = lambda data: {}
        with self.assertRaisesRegex(ValueError, "own: train_step"):
            Trainer(model, batch_size=16)

    def test_keras_models_have_none(self):
        inputs = keras.Input((4,))
        for model in (
            Subclassed(),
            keras.Sequential([inputs, keras.layers.Dense(1)]),
            keras.Model(inputs, keras.layers.Dense(1)(inputs)),
        ):
            model.compile("sgd", "mse")
            Trainer(model, batch_size=16)


if BACKEND == "tensorflow":

    class OnJaxTest(tf.test.TestCase):
        def test_on_jax(self):
            run_on("jax", self, __file__, XLA_FLAGS="--xla_force_host_platform_device_count=2")
