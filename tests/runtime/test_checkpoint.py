"""Checkpoints on disk: verified, bounded in number, and never half a file."""

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import lars_keras.data
from lars_keras.files import temporary_name
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.errors import Preempted, UsageError
from lars_keras.runtime.recovery import require_same_checkpoint
from lars_keras.training.state import restore_variables, variables_by_name

ROOT = pathlib.Path(__file__).parents[2]


def arrays(seed, size=5000):
    rng = np.random.default_rng(seed)
    return {
        "0/model/a": rng.normal(size=size).astype("float32"),
        "1/model/b": rng.integers(0, 9, (2, 3)),
        "c": np.ones(()),
    }


class CheckpointTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "checkpoints")

    def saved(self, updates, **options):
        manager = CheckpointManager(self.path, **options)
        for update in updates:
            manager.save(update, arrays(update), {"position": {"update": update, "logs": {"loss": 0.1}}})
        manager.wait()
        return manager

    def test_what_is_read_is_what_was_saved(self):
        self.assertIsNone(CheckpointManager(self.path).latest())
        checkpoint = self.saved([3, 12]).latest()
        self.assertEqual(checkpoint.update, 12)
        self.assertEqual(checkpoint.metadata, {"position": {"update": 12, "logs": {"loss": 0.1}}})
        expected = arrays(12)
        self.assertEqual(list(checkpoint.arrays), list(expected))
        for name, array in expected.items():
            self.assertEqual(checkpoint.arrays[name].dtype, array.dtype)
            self.assertAllEqual(checkpoint.arrays[name], array)

    def test_hosts_must_have_the_same_file(self):
        """Compare more than the update: a rollback saves it again, with other data to come."""
        one = self.saved([12]).latest()
        manager = CheckpointManager(self.path)
        manager.save(12, arrays(12), {"position": {"update": 12, "batches_consumed": 15}})
        manager.wait()
        numbers = []
        cluster = types.SimpleNamespace(same_on_all_hosts=lambda number: numbers.append(number) or number == numbers[0])
        require_same_checkpoint(cluster, one)
        for other in (manager.latest(), None):
            with self.assertRaisesRegex(UsageError, f"this host: {other.path.name if other else 'none'}"):
                require_same_checkpoint(cluster, other)
        self.assertLess(max(numbers), 2**31)  # JAX's integers

    def test_damage_is_told_anywhere(self):
        """A bit flipped, or the end cut off, at 50 random places: the one before is used, with a warning."""
        manager = self.saved([1, 2])
        newest = manager.latest().path
        whole = newest.read_bytes()
        rng = np.random.default_rng(0)
        for i in range(50):
            place = int(rng.integers(len(whole)))
            damaged = bytearray(whole)
            if i % 2:
                damaged[place] ^= 1 << rng.integers(8)
            else:
                del damaged[place:]
            newest.write_bytes(damaged)
            with self.assertLogs(level="ERROR") as logs:
                checkpoint = manager.latest()
            self.assertEqual(checkpoint.update, 1)
            self.assertAllEqual(checkpoint.arrays["0/model/a"], arrays(1)["0/model/a"])
            self.assertIn(newest.name, logs.output[0])
        newest.write_bytes(whole)
        self.assertEqual(manager.latest().update, 2)

    def test_one_that_cannot_be_read_is_not_taken_for_damaged(self):
        """As on a shared disk that is away for a moment: a run that began anew would throw it away."""
        manager = self.saved([1, 2])
        for function, error in (
            ("hashlib.file_digest", OSError(errno.ESTALE, "Stale file handle")),
            ("numpy.load", MemoryError()),
            ("numpy.load", Preempted("stopped")),
        ):
            with mock.patch(function, side_effect=error), self.assertRaises(type(error)):
                manager.latest()
        self.assertEqual(manager.latest().update, 2)

    def test_how_many_are_kept(self):
        self.saved(range(1, 8), max_to_keep=2)
        self.assertEqual([p.name[:15] for p in sorted(self.path.iterdir())], ["update-00000006", "update-00000007"])

    def test_the_newest_is_kept_whatever_lies_beyond_it(self):
        """A run whose last checkpoints are damaged goes back, and what it writes then is not what is thrown away."""
        for keep in (1, 2):
            manager = self.saved([100, 140], max_to_keep=keep)
            for path in self.path.iterdir():
                path.write_bytes(b"damaged")
            with self.assertLogs(level="ERROR"):
                self.assertIsNone(manager.latest())
            manager.save(7, arrays(7), {"position": {}})
            manager.wait()
            self.assertEqual([p.name[:15] for p in self.path.iterdir()], ["update-00000007"])
            self.assertEqual(manager.latest().update, 7)

    def test_checkpoints_of_another_run_are_kept(self):
        self.saved([100, 140])
        names = sorted(p.name for p in self.path.iterdir())
        with self.assertRaisesRegex(UsageError, "holds a checkpoint of update 140, and this run is at update 0. Rest"):
            self.saved([0])
        damaged = self.path / names[-1]
        damaged.write_bytes(b"damaged")
        with self.assertRaisesRegex(UsageError, "update 140"):  # nobody has looked at it
            self.saved([120])
        self.assertEqual(sorted(p.name for p in self.path.iterdir()), names)

    def test_what_a_living_writer_writes_is_left_alone(self):
        self.saved([1])
        with mock.patch("os.getpid", return_value=os.getppid()):
            name = temporary_name("checkpoint.npz")
        (self.path / name).write_bytes(b"half")
        self.saved([2])
        self.assertTrue((self.path / name).exists())

    def test_bfloat16(self):
        keras.config.set_dtype_policy("bfloat16")
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile("sgd", "mse")
        weights = [w.astype("float32") for w in model.get_weights()]
        manager = CheckpointManager(self.path)
        manager.save(1, {name: np.array(v.numpy()) for name, v in variables_by_name(model).items()}, {})
        self.assertEqual({w.dtype.name for w in model.get_weights()}, {"bfloat16"})
        model.set_weights([w + 1 for w in weights])
        saved = manager.latest().arrays
        self.assertEqual([saved[f"model/{i}"].dtype.str for i in range(2)], ["|V2"] * 2)  # NumPy has no name for it
        restore_variables(model, saved)
        for own, expected in zip(model.get_weights(), weights, strict=True):
            self.assertAllEqual(own.astype("float32"), expected)

    def test_one_of_the_older_ones_for_every_hour(self):
        manager = CheckpointManager(self.path, max_to_keep=2, keep_every_n_hours=1)
        now = time.time()
        for update in range(1, 11):  # one every 20 minutes
            manager.save(update, arrays(update), {})
            manager.wait()
            newest = manager.latest().path
            os.utime(newest, (now + 1200 * update,) * 2)
        self.assertEqual(sorted(int(p.name[7:15]) for p in self.path.iterdir()), [1, 4, 7, 9, 10])

    def test_what_was_kept_stays(self):
        """A copy of the folder gives all files one time, and a clock may be set back."""
        manager = CheckpointManager(self.path, max_to_keep=2, keep_every_n_hours=1)

        def save(update, at):
            manager.save(update, arrays(update), {})
            manager.wait()
            os.utime(manager.latest().path, (at,) * 2)

        for update in range(1, 7):  # one every hour
            save(update, 3600.0 * update)
        for path in self.path.iterdir():
            os.utime(path, (1e6,) * 2)
        for update in range(7, 13):
            save(update, 1e5 + 1800 * update)
        kept = sorted(int(p.name[7:15]) for p in self.path.iterdir())
        self.assertEqual(kept, [1, 2, 3, 4, 7, 9, 11, 12])

    def test_an_old_one_that_cannot_be_removed(self):
        manager = self.saved([1, 2, 3])
        with (
            mock.patch.object(pathlib.Path, "unlink", side_effect=PermissionError("no")),
            self.assertLogs("absl", "ERROR") as logs,
        ):
            manager.save(4, arrays(4), {})
            manager.wait()
        self.assertIn("Old checkpoints could not be removed: no", logs.output[0])
        self.assertEqual(manager.latest().update, 4)

    def test_the_last_saved_counts_among_equal_updates(self):
        """The times of files do not, because a copy of the folder has others. So the one before goes."""
        manager = self.saved([3, 4])
        manager.save(4, arrays(99), {})
        self.assertAllEqual(manager.latest().arrays["0/model/a"], arrays(99)["0/model/a"])
        self.assertEqual(sorted(p.name[:15] for p in self.path.iterdir()), ["update-00000003", "update-00000004"])

    def test_a_full_disk_leaves_the_one_before(self):
        """The limit on file size stands for the disk: the operating system refuses to write."""
        manager = self.saved([1])
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with self.assertLogs(level="ERROR") as logs, self.assertRaises(OSError):
                manager.save(2, arrays(2), {})
                manager.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertIn("The checkpoint of update 2 could not be written", logs.output[0])
        self.assertLen(list(self.path.iterdir()), 1)
        self.assertEqual(manager.latest().update, 1)
        manager.save(3, arrays(3), {})
        manager.wait()
        self.assertEqual(manager.latest().update, 3)

    def test_what_a_killed_writer_leaves_is_removed(self):
        self.saved([1])
        with mock.patch("os.getpid", return_value=99_999_999):
            (self.path / temporary_name("checkpoint.npz")).write_bytes(b"half")
        (self.path / "notes.txt").write_bytes(b"mine")
        self.saved([2])
        self.assertEqual(sorted(p.name for p in self.path.iterdir() if p.suffix != ".npz"), ["notes.txt"])

    def test_due(self):
        clock = iter([0, 0, 59, 60, 60, 61]).__next__
        by_time = SavePolicy(minutes=1, clock=clock)
        by_time.reset(0)
        self.assertFalse(by_time.due(1))
        self.assertTrue(by_time.due(2))
        by_time.reset(2)
        self.assertFalse(by_time.due(3))
        by_updates = SavePolicy(updates=5)
        self.assertEqual([u for u in range(12) if by_updates.due(u)], list(range(5, 12)))
        self.assertFalse(SavePolicy().due(10**9))

    def test_the_rest_of_the_order_in_another_process(self):
        """Saved at each of 30 consecutive positions: a fresh process finds the same remaining order of examples."""
        data = lars_keras.data.ArrayData("d", *2 * [(np.zeros((37, 2, 2, 1), np.uint8), np.arange(37))], 37)
        stream = data.train_batches(8, count=40, seed=5).as_numpy_iterator()
        used = np.concatenate([labels for _, labels, _ in stream])
        manager = CheckpointManager(self.path, max_to_keep=30)
        for update in range(30):
            manager.save(update, {}, {"position": {"batches_consumed": update}})
        manager.wait()
        program = """
import json, sys
import numpy as np
from lars_keras.data import ArrayData
from lars_keras.runtime.checkpoint import _read
from pathlib import Path
data = ArrayData("d", *2 * [(np.zeros((37, 2, 2, 1), np.uint8), np.arange(37))], 37)
rest = {}
for path in Path(sys.argv[1]).iterdir():
    first = _read(path).metadata["position"]["batches_consumed"]
    batches = data.train_numpy(8, first=first, count=40 - first, seed=5)
    rest[first] = np.concatenate([labels for _, labels, _ in batches]).tolist()
print(json.dumps(rest))
"""
        run = subprocess.run(
            [sys.executable, "-c", program, self.path],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": "numpy"},
            capture_output=True,
            text=True,
            check=True,
        )
        rest = json.loads(run.stdout)
        self.assertEqual({int(k): v for k, v in rest.items()}, {u: used[8 * u :].tolist() for u in range(30)})


if __name__ == "__main__":
    tf.test.main()
