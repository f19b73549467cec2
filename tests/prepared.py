"""Data sets that tests read and never change, prepared once in a session of any number of processes."""

import atexit
import contextlib
import fcntl
import functools
import os
import pathlib
import tempfile
import unittest.mock

import numpy as np

SESSION_FOLDER = "LARS_KERAS_TEST_DATA"  # set by conftest.py, which also removes the folder


@functools.cache
def _folder():
    """Return the folder of the session, or a folder of this process outside of one."""
    if SESSION_FOLDER in os.environ:
        return pathlib.Path(os.environ[SESSION_FOLDER])
    root = tempfile.TemporaryDirectory()
    atexit.register(root.cleanup)
    return pathlib.Path(root.name)


@contextlib.contextmanager
def _locked():
    with open(_folder() / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def digits():
    """Return a data folder with the digits."""
    from lars_keras.data.prepare import prepare

    root = str(_folder() / "digits")
    with _locked():
        prepare("digits", root)
    return root


@functools.cache
def digits_data():
    """Return the loaded digits."""
    import lars_keras.data

    return lars_keras.data.load("digits", data_dir=digits())


def without_decoding():
    """Patch `load` to take one gray image for all of a data set in memory: for what does not depend on the images."""
    from lars_keras.data import loading

    def decode_all(features, records):
        return np.full((1, *features["image"].shape), 127, np.uint8), np.zeros(1, np.int64)

    return unittest.mock.patch.object(loading, "_decode_all", decode_all)


@functools.cache
def imagenet(file_format="tfrecord"):
    """Return a data folder with the `imagenet2012` of `tests.data.images.write_imagenet`."""
    from tests.data.images import write_imagenet

    root = _folder() / file_format
    with _locked():
        if not root.exists():
            part = root.with_suffix(".part")
            write_imagenet(part, file_format)
            part.rename(root)
    return str(root)
