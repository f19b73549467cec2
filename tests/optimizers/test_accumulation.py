"""`gradient_accumulation_steps` of the base class, which `fit` knows: sums and averages of several micro-batches."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from lars_keras import LAMB, LARS, schedules
from tests import cases

# As in test_backends.py: Keras converts tensors of torch in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def kernel(value, dtype="float32"):
    return keras.Variable(np.full((2, 3), value, dtype="float32"), dtype=dtype, name="kernel")


def as_numpy(variable):
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))


class AccumulationTest(parameterized.TestCase):
    @parameterized.parameters(LARS, LAMB)
    def test_updates(self, optimizer_class):
        """The 8 updates of 32 gradients, 4 in each, take the rates of 8 updates."""
        gradients, weights = np.float32(np.random.default_rng(0).normal(0.0, 1.0, (8, 4, 2, 3))), []
        for steps in (None, 4):
            schedule, variable = schedules.WarmupPolynomial(1.0, 3, 8), kernel(1.0)
            optimizer = optimizer_class(schedule, exclude=(".",), gradient_accumulation_steps=steps)
            for update in gradients:
                for g in update if steps else [update.mean(axis=0)]:
                    optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
            self.assertEqual(int(optimizer.iterations), 8)
            weights.append(as_numpy(variable))
        self.assertLess(cases.relative_error(weights[1], weights[0]), 2e-6)

    @parameterized.parameters(LARS, LAMB)
    def test_average_of_the_weights(self, optimizer_class):
        """The average moves with the updates, not with the micro-batches."""
        gradients, averages = np.float32(np.random.default_rng(1).normal(0.0, 1.0, (4, 3, 2, 3))), []
        for steps in (None, 3):
            optimizer = optimizer_class(0.5, use_ema=True, ema_momentum=0.75, gradient_accumulation_steps=steps)
            variable = kernel(1.0)
            for update in gradients:
                for g in update if steps else [update.mean(axis=0)]:
                    optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
            if steps:
                optimizer.apply([keras.ops.zeros((2, 3))], [variable])  # one more micro-batch is no update
            optimizer.finalize_variable_values([variable])
            averages.append(as_numpy(variable))
        self.assertLess(cases.relative_error(averages[1], averages[0]), 2e-6)

    def test_average_before_the_first_update(self):
        """It is the weights, not the zeros with which Keras begins."""
        optimizer, variable = LARS(0.5, use_ema=True, gradient_accumulation_steps=4), kernel(1.0)
        optimizer.apply([keras.ops.ones((2, 3))], [variable])
        optimizer.finalize_variable_values([variable])
        np.testing.assert_array_equal(as_numpy(variable), 1.0)

    def test_sum_in_bfloat16(self):
        """The sum is 260. In bfloat16 it would be 258, because 256 + 1 is 256 there."""
        optimizer = LARS(1.0, momentum=0.0, exclude=(".",), gradient_accumulation_steps=4)
        variable = kernel(0.0, "bfloat16")
        for g in (256.0, 1.0, 1.0, 2.0):
            optimizer.apply([keras.ops.full((2, 3), g, "bfloat16")], [variable])
        np.testing.assert_array_equal(as_numpy(variable), -65.0)

    def test_overwriting_by_the_average_is_refused(self):
        with self.assertRaisesRegex(ValueError, "Received: ema_overwrite_frequency=2, gradient_accumulation_steps=4"):
            LARS(use_ema=True, ema_overwrite_frequency=2, gradient_accumulation_steps=4)
        LARS(ema_overwrite_frequency=2, gradient_accumulation_steps=4)  # without an average it does nothing
