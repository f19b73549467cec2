"""Run files of tests again on another Keras backend, of which a process has only one."""

import importlib.util
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# Most of the time on JAX is XLA's. It compiles the same programs each time, so they are kept for the next time.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": os.fspath(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def run_on(backend, test, *arguments, **environment):
    """Run pytest with these arguments; `test`, a test case, is skipped where the backend is not installed."""
    if importlib.util.find_spec(backend) is None:
        test.skipTest(f"{backend} is not installed")
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
        env=COMPILED | os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    test.assertEqual(run.returncode, 0, run.stdout[-12000:] + run.stderr[-2000:])
    test.assertIn(" passed", run.stdout)
