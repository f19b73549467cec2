"""Run of `train.py` in the process of a test, on data that load at once."""

import contextlib
import functools
import io
import unittest.mock
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
from markupsafe import Markup

import train
from lars_keras import data as datasets
from lars_keras.data import ArrayData
from lars_keras.report import charts

SMALL = (
    "--model=lenet1989",
    "--batch_size=64",
    "--microbatch_size=16",
    "--epochs=12",
    "--eval_every=6",
    "--learning_rate=15",
    "--warmup=0",
)


@functools.cache
def _digits():
    rng = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n, dtype="int32") % 2
        images = rng.integers(0, 60, (n, 16, 16, 1), dtype="uint8")
        images[labels == 1, 4:12, 4:12] += 150
        return images, labels

    return split(160), split(37)


def few_digits():
    """Return 160 training and 37 test images in two easy classes."""
    return ArrayData("digits", *_digits(), 10, description="two easy classes")


@contextlib.contextmanager
def without_drawing():
    """Leave the report without the lines of its charts, which take longer than a short run."""
    with (
        unittest.mock.patch.object(charts, "_svg", lambda title, *_: Markup()),
        unittest.mock.patch.object(charts, "_heat_map", lambda title, *_: charts.Chart(title)),
    ):
        yield


def run(*arguments, data=None, draw=False):
    """Run train.py on `data`, or on what that returns as `load`; returns exit code, stdout and stderr.

    The report has pictures only with `draw`.
    """
    out, err = io.StringIO(), io.StringIO()
    load = data if callable(data) else lambda *_, **__: data or few_digits()
    with (
        unittest.mock.patch.object(datasets, "load", load),
        contextlib.nullcontext() if draw else without_drawing(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = train.run(["train.py", *arguments])
    return code, out.getvalue(), err.getvalue()


def parse_only(*arguments):
    """Run train.py up to its main path; returns exit code, the `RunConfig` or None, stdout and stderr."""
    seen = []
    with unittest.mock.patch.object(train, "main", seen.append):
        code, out, err = run(*arguments)
    return code, (seen or [None])[0], out, err
