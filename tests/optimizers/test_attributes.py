"""Attributes of LARS and LAMB that are read or set after construction, as those of Keras's optimizers.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from lars_keras import LARS

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def traced(function):
    """Return what a function of a scalar returns for 0.5, while the backend traces it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)(tf.constant(0.5))
    import jax

    return jax.jit(function)(0.5)


class LearningRateTest(parameterized.TestCase):
    def test_attribute_of_a_user(self):
        """An array or a tensor that is being traced cannot be compared with another."""
        optimizer = LARS(0.5)
        optimizer.seen = np.arange(3)
        optimizer.seen = np.arange(3)
        self.assertLen(optimizer.seen, 3)

        def keep(x):
            optimizer.seen = x
            return x

        traced(keep)
