"""What happens before the first update; `test_on_jax.py` runs this file on JAX."""

import unittest

import keras
import numpy as np

from lars_keras.training.forward import build_model
from lars_keras.training.inputs import spec_of
from tests import step_cases as cases


@unittest.skipUnless(keras.backend.backend() == "jax", "TensorFlow runs operations without compiling them")
class SetupTest(unittest.TestCase):
    def test_no_layer_is_compiled(self):
        """Else each operation of a network is a program of its own: for ResNet-50, seconds on a CPU."""
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


if __name__ == "__main__":
    unittest.main()
