"""A pytest plugin that keeps what was imported out of garbage collections."""

import gc


def pytest_collection_finish():
    """Freeze all objects; collections that walk over those of TensorFlow take a third of the processor time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
