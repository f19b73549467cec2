"""Two processes that `keras.distribution.initialize()` joins train as one process does: docs/hosts.md's program."""

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import unittest

import keras
import numpy as np

from tests.test_blocks import blocks
from tests.workers import ROOT, wait

JOINED = """
keras.distribution.initialize()  # before anything else asks for a device
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
"""
JOINED_BY_TRAIN = """
from lars_keras.training.cluster import make_cluster

make_cluster("multi_worker")
"""
FITTED = "model.fit(images[rows], labels[rows], batch_size=256 // hosts, shuffle=False, verbose=0)"
FITTED_BY_KERAS_3_10 = """
import tensorflow as tf

model.fit(tf.data.Dataset.from_tensor_slices((images[rows], labels[rows])).batch(256 // hosts), verbose=0)
"""
EPILOGUE = """
import sys

from lars_keras.training.cluster import has_peers

# A micro-batch that two hosts cannot share evenly, and examples that two devices cannot.
scores = Trainer(model, batch_size=66, microbatch_size=33).evaluate(images[:51], labels[:51])
many = Trainer(model, batch_size=16, microbatch_size=8).evaluate(images, labels)  # a batch must wait for those before
for _ in range(2):
    trainer.save_model("saved.keras", write=jax.process_index() == 0)
trainer.restore(*trainer.snapshot(), (images, labels))
np.savez(sys.argv[1], *model.get_weights(), *scores.values(), *many.values())


few = images[:51], labels[:51]
trainer.fit(images, labels, epochs=3, validation_data=few, callbacks=SaveBest(trainer), verbose=0)
assert os.path.exists("best.keras") or jax.process_index() > 0


class StopLast(keras.callbacks.Callback):
    def __init__(self, update):
        super().__init__()
        self.update = update

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch + 1 >= self.update and jax.process_index() == jax.process_count() - 1

    def on_updates_end(self, last):
        self.last = last


for update, stopped in ((1, jax.process_count()), (7, 7)):  # within an epoch, and in its last call
    callback = StopLast(update)
    trainer.fit(images, labels, epochs=3, callbacks=callback, verbose=0)
    assert (trainer.position.update, callback.last) == (stopped, True), trainer.position


def check_refused(call, *texts):
    try:
        call()
    except ValueError as e:
        assert jax.process_count() > 1 and all(text in str(e) for text in texts), e
    else:
        assert jax.process_count() == 1


checkpoint = keras.callbacks.ModelCheckpoint("best.keras")
check_refused(lambda: trainer.fit(images, labels, callbacks=checkpoint), "trainer.save_model", "ModelCheckpoint")
keras.distribution.set_distribution(None)
check_refused(lambda: Trainer(model, batch_size=66), "train a model of its own", "2 processes, and no distribution")
assert has_peers() == (jax.process_count() > 1)
"""


class HostsTest(unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def start(self, program, out, devices, **environment):
        """Start the program in a process with so many devices; it writes its weights to `out`."""
        path = self.folder / f"{out}.py"
        path.write_text(program)
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        environment["PYTHONPATH"] = os.fspath(ROOT)
        return subprocess.Popen(
            [sys.executable, path, self.folder / out],
            cwd=self.folder,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def weights(self, name):
        with np.load(self.folder / f"{name}.npz") as arrays:
            return list(arrays.values())

    @unittest.skipUnless(importlib.util.find_spec("jax"), "jax is not installed")
    def test_two_processes_are_one(self):
        """The second joins by the call of `train.py --strategy=multi_worker`."""
        program = "".join(code for _, code in blocks("docs/hosts.md", "python")) + EPILOGUE
        with socket.create_server(("127.0.0.1", 0)) as s:
            address = f"127.0.0.1:{s.getsockname()[1]}"
        joined = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
        alone = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "1"}
        self.assertIn(JOINED, program)
        self.assertIn(FITTED, program)
        if keras.__version__.startswith("3.10."):
            program = program.replace(FITTED, FITTED_BY_KERAS_3_10)
        programs = program, program.replace(JOINED, JOINED_BY_TRAIN)
        two = [
            self.start(text, f"{i}.npz", 1, **joined, KERAS_DISTRIBUTION_PROCESS_ID=str(i))
            for i, text in enumerate(programs)
        ]
        for process, output in zip(two, wait(two), strict=True):
            self.assertEqual(process.returncode, 0, output)
        one = [self.start(program, "one.npz", 2, **alone, KERAS_DISTRIBUTION_PROCESS_ID="0")]
        self.assertIn("step", wait(one)[0])
        for first, second, expected in zip(*map(self.weights, ("0", "1", "one")), strict=True):
            np.testing.assert_array_equal(first, second)
            self.assertLess(np.linalg.norm(first - expected), 1e-5 * np.linalg.norm(expected))


if __name__ == "__main__":
    unittest.main()
