"""Run files of tests again on another Keras backend, of which a process has only one."""

import importlib.util
import os
import pathlib
import subprocess
import sys

from tests import prepared


def run_on(backend, test, *arguments, **environment):
    """Run pytest with these arguments; `test`, a test case, is skipped where the backend is not installed."""
    if importlib.util.find_spec(backend) is None:
        test.skipTest(f"{backend} is not installed")
    compiled_programs = {  # many tests compile the same ones
        "JAX_COMPILATION_CACHE_DIR": prepared.folder("compiled_by_jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.frozen",
            "--noconftest",
            *arguments,
        ],
        env=os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"} | compiled_programs | environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    test.assertEqual(run.returncode, 0, run.stdout[-12000:] + run.stderr[-2000:])
    test.assertIn(" passed", run.stdout)
