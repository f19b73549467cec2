"""LARS on the JAX and torch backends: a Keras backend is chosen at import, so each has its own process.

Run by pytest on TensorFlow, this file starts itself again with KERAS_BACKEND set, and only then holds the
comparisons with the oracle.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
from absl.testing import parameterized

from lars_keras import LARS, schedules
from tests import cases
from tests.reference import ReferenceLARS

BACKEND = keras.backend.backend()


def on(backend):
    """Returns a decorator that keeps a test class on one backend."""
    return lambda test: test if BACKEND == backend else None


class Comparison(parameterized.TestCase):
    def assert_close(self, variables, optimizer, oracle, tolerance=2e-6, message=""):
        actual, expected = variables + cases.slots(optimizer), oracle.weights + oracle.slots
        for a, e in zip(actual, expected, strict=True):
            a = keras.ops.convert_to_numpy(keras.ops.cast(a, "float32"))
            self.assertLess(cases.relative_error(a, e), tolerance, message)


@on("tensorflow")
class SecondProcessTest(parameterized.TestCase):
    @parameterized.parameters("jax", "torch")
    def test_backend(self, backend):
        if importlib.util.find_spec(backend) is None:
            self.skipTest(f"{backend} is not installed")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        self.assertEqual(run.returncode, 0, run.stdout[-6000:] + run.stderr[-2000:])
        self.assertIn(" passed", run.stdout)
