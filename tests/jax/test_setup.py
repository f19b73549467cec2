"""The setup before the first update; `test_on_jax.py` runs this file on JAX."""

import unittest

import keras
import numpy as np

from lars_keras.training import Trainer
from lars_keras.training.forward import build_model
from lars_keras.training.inputs import spec_of
from tests import step_cases as cases


@unittest.skipUnless(keras.backend.backend() == "jax", "TensorFlow runs operations without compiling them")
class SetupTest(unittest.TestCase):
    def test_no_layer_is_compiled(self):
        """Otherwise each operation is a program of its own: for ResNet-50, seconds on a CPU."""
        import jax

        compiled = []

        def listener(event, duration, **_):
            if "backend_compile" in event:
                compiled.append(event)

        model = cases.batch_norm()()
        model.compile("sgd", "mse", metrics=["mae"])
        spec = spec_of((np.zeros((4, cases.FEATURES), "float32"), np.zeros((4, cases.CLASSES), "float32")))
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            jax.clear_caches()  # of the same operations in other tests
            build_model(model, spec, 4)
            self.assertLessEqual(len(compiled), len(model.metrics_variables))  # their zeros; no operation of a layer
            compiled.clear()
            jax.jit(lambda x: x - 12.0)(np.zeros(3))
            self.assertEqual(len(compiled), 1)  # the listener hears of it
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
        self.assertEqual(len(model.metrics), 2)
        for variable in model.metrics_variables:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), np.zeros(variable.shape))

    def test_a_layer_may_keep_what_it_makes_as_it_is_built(self):
        class Places(keras.Model):
            def build(self, input_shape):
                self.places = keras.ops.arange(input_shape[-1], dtype="float32")
                self.scaling = keras.layers.Normalization(mean=1.0, variance=4.0)
                self.scaling.build(input_shape)
                self.head = keras.layers.Dense(2)
                self.head.build(input_shape)

            def call(self, x):
                return self.head(self.scaling(x) + self.places)

        model, x = Places(), np.ones((8, 3), "float32")
        model.compile("sgd", "mse", metrics=["mae"])
        history = Trainer(model, batch_size=4, microbatch_size=2).fit(x, x[:, :2], epochs=2, verbose=0)
        self.assertTrue(np.isfinite(history.history["loss"]).all())


if __name__ == "__main__":
    unittest.main()
