"""Every test of the JAX backend, in one process: importing takes longer than most files of tests.

One of them alone: `KERAS_BACKEND=jax pytest --noconftest -n 0 tests/training/test_shapes.py`, with
XLA_FLAGS=--xla_force_host_platform_device_count=8 where it needs devices.
"""

import os
import pathlib
import pickle
import tempfile
import unittest

import pytest

from tests.jax import test_engine
from tests.second_process import run_on

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
FILES = (
    "tests/jax/test_engine.py",
    "tests/jax/test_plain_fit.py",
    "tests/jax/test_prefetch.py",
    "tests/jax/test_setup.py",
    "tests/training/test_callbacks.py",
    "tests/training/test_evaluate.py",
    "tests/training/test_meaning.py",
    "tests/training/test_gradients.py",
    "tests/training/test_masks.py",
    "tests/training/test_reads.py",
    "tests/training/test_metrics.py",
    "tests/training/test_data_forms.py",
    "tests/training/test_batch_data.py",
    "tests/training/test_shapes.py",
    "tests/training/test_state.py",
    "tests/training/test_noise_scale.py",
    "tests/optimizers/test_accumulation.py",
    "tests/optimizers/test_attributes.py",
    "tests/optimizers/test_backends.py",
    "tests/optimizers/test_internals.py",
    "tests/optimizers/test_settings.py",
    "tests/optimizers/test_sgd.py",
    "tests/test_blocks.py",
    "tests/cli/test_fast_recipe.py::ViewsTest::test_padded_batches_are_scored_once",
)
ON_TENSORFLOW_ONLY = (
    "tests/optimizers/test_internals.py::SourceTest",
    "tests/optimizers/test_settings.py::RawRateTest",
)


class OnJaxTest(unittest.TestCase):
    def test_on_jax(self):
        """Most of the time is LLVM's, which optimizes programs that run for milliseconds. What JAX and XLA do stays."""
        self.check_on_jax(JAX_DISABLE_MOST_OPTIMIZATIONS="1")

    @pytest.mark.slow
    def test_on_jax_with_all_optimizations(self):
        self.check_on_jax()

    @pytest.mark.slow
    def test_the_rest_of_the_tables(self):
        files = "tests/jax/test_engine.py", "tests/training/test_meaning.py"
        self.run_with_results(test_engine.CASES, "-m", "slow", *files)

    @pytest.mark.slow
    def test_keras_tests_of_optimizers(self):
        run_on("jax", self, "tests/optimizers/test_as_keras.py")

    def check_on_jax(self, **environment):
        deselected = [word for test in ON_TENSORFLOW_ONLY for word in ("--deselect", test)]
        self.run_with_results(test_engine.QUICK, *deselected, *FILES, **environment)

    def run_with_results(self, names, *arguments, **environment):
        """Run pytest on JAX, with the TensorFlow engine's results of `test_engine.CASES` in a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "tensorflow.pickle"
            path.write_bytes(pickle.dumps(test_engine.tensorflow_results(names)))
            environment |= {test_engine.FROM_TENSORFLOW: os.fspath(path), "XLA_FLAGS": EIGHT_DEVICES}
            run_on("jax", self, *arguments, **environment)


if test_engine.BACKEND != "tensorflow":
    del OnJaxTest

if __name__ == "__main__":
    unittest.main()
