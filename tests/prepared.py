"""Data sets that take a while to prepare, once in a process."""

import atexit
import functools
import tempfile

from lars_keras.data.prepare import prepare


@functools.cache
def digits():
    """Returns a data folder with the digits, which nobody may change."""
    root = tempfile.TemporaryDirectory()
    atexit.register(root.cleanup)
    prepare("digits", root.name)
    return root.name
