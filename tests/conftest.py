"""Settings of the test process, made before TensorFlow, JAX or Matplotlib is imported."""

import importlib.metadata
import os
import shutil
import tempfile

for name, value in {
    "KERAS_BACKEND": "tensorflow",
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "Agg",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
    "TF_ENABLE_ONEDNN_OPTS": "1",  # as train.py
    "TF_NUM_INTEROP_THREADS": "2",  # the order of a parallel sum follows the number of threads
    "TF_NUM_INTRAOP_THREADS": "2",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
from absl import logging  # noqa: E402

from tests.frozen import pytest_collection_finish  # noqa: E402, F401
from tests.prepared import SESSION_FOLDER  # noqa: E402

TPU_BUILD = any(d.name.replace("_", "-") == "tensorflow-tpu" for d in importlib.metadata.distributions())

# Each starts processes and waits for them: at the end, a worker alone would wait.
LONGEST = ("tests/jax/test_on_jax.py", "tests/pod/test_check.py")


def pytest_configure(config):
    """Make the session's data folder, and eight logical devices, except in a process that only starts others."""
    if SESSION_FOLDER not in os.environ:  # its workers inherit it
        os.environ[SESSION_FOLDER] = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SESSION_FOLDER), ignore_errors=True))
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)


def pytest_collection_modifyitems(items):
    """Drop `tf.test.TestCase.test_session`, which looks like a test and is none; take the longest tests first."""
    items[:] = [item for item in items if getattr(item, "originalname", item.name) != "test_session"]
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Log warnings in each test; `train.py`, run in the same process, leaves errors only."""
    logging.set_verbosity(logging.WARNING)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test that asks the TPU build of TensorFlow for XLA on the CPU, which it does not have."""
    report = yield
    if TPU_BUILD and report.failed and "for platform Host" in report.longreprtext:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: tensorflow-tpu has no XLA for the CPU")
    return report
