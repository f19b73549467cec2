"""`Trainer` on JAX needs no TensorFlow for data that are not a `tf.data.Dataset`."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).parents[2]


class WithoutTensorFlowTest(unittest.TestCase):
    @unittest.skipUnless(importlib.util.find_spec("jax"), "jax is not installed")
    def test_trains_evaluates_snapshots_and_restores(self):
        run = subprocess.run(
            [sys.executable, "-m", "tests.jax.without_tensorflow"],
            env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        self.assertEqual(run.returncode, 0, run.stderr[-4000:])
        self.assertEqual(run.stdout.splitlines()[-1], "equal")


if __name__ == "__main__":
    unittest.main()
