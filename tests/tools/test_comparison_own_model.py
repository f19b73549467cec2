"""`compare.py` on a network of the user's."""

import contextlib
import io
import json
import pathlib
import sys
import tempfile
import types
import unittest.mock
from concurrent.futures import Future

from absl.testing import absltest

from tests import prepared
from tools.comparison import command

MODULE = """
import keras


def dense(image_shape, num_classes):
    inputs = keras.Input(image_shape, dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(num_classes, kernel_regularizer="l2")(x))
"""


def finished(function, *arguments):
    """Call a function in this process, which need not import TensorFlow anew."""
    future = Future()
    future.set_result(function(*arguments))
    return future


class OwnModelTest(absltest.TestCase):
    def test_two_runs_in_one_process(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "own_network.py").write_text(MODULE)
        (folder / "recipe.flags").write_text("--model=own_network:dense\n--batch_size=1024\n--epochs=1\n")
        self.enterContext(unittest.mock.patch.object(sys, "path", [str(folder), *sys.path]))
        self.addCleanup(sys.modules.pop, "own_network", None)
        arguments = [f"--recipes={folder}/recipe.flags", "--optimizer=lars", "--tuning_runs=0", "--seeds=0,1"]
        arguments += ["--jit_compile=off", "--workers=1", f"--out={folder}/out", f"--data_dir={prepared.digits()}"]
        out, err = io.StringIO(), io.StringIO()
        pool = types.SimpleNamespace(submit=finished, shutdown=lambda **_: None)
        here = unittest.mock.patch("concurrent.futures.ProcessPoolExecutor", lambda *_, **__: pool)
        with here, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.run(["compare.py", *arguments])
        self.assertEqual(code, 0, out.getvalue() + err.getvalue())
        (row,) = json.loads((folder / "out" / "compare.json").read_text())["table"]
        self.assertLen(row["top1"], 2)
        self.assertGreater(min(row["top1"]), 0.5, row)


if __name__ == "__main__":
    absltest.main()
