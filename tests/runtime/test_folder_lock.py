"""One process at a time writes to a folder."""

import os
import pathlib
import subprocess
import sys
import tempfile

import tensorflow as tf

from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.folder_lock import lock_folder

_HOLD = """
import pathlib, sys, time
from lars_keras.runtime.folder_lock import lock_folder
with lock_folder(pathlib.Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(600)
"""


class FolderLockTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def lock(self, path="a", **options):
        return lock_folder(self.dir / path, "out", **options)

    def test_one_holder_at_a_time(self):
        with self.lock(), self.lock("b"):
            with self.assertRaisesRegex(UsageError, r"`out` is in use by process \d+ on .*Received: out=.*/a$"):
                self.lock().__enter__()
        with self.lock():
            pass

    def test_another_process_and_its_death(self):
        command = [sys.executable, "-c", _HOLD, self.dir / "a"]
        environment = {**os.environ, "KERAS_BACKEND": "numpy"}  # whose import is the shortest one
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
            try:
                self.assertEqual(other.stdout.readline(), "held\n")
                with self.assertRaisesRegex(UsageError, f"in use by process {other.pid} on "):
                    self.lock().__enter__()
            finally:
                other.kill()
        self.assertTrue((self.dir / "a/.lock").exists())  # left behind, and without effect
        with self.lock():
            pass

    def test_what_is_left(self):
        with self.lock("new/a"):
            pass
        self.assertFalse((self.dir / "new").exists())
        with self.lock("new/a"):
            (self.dir / "new/a/result").touch()
        self.assertEqual([path.name for path in (self.dir / "new/a").iterdir()], ["result"])

    def test_a_new_folder(self):
        (self.dir / "a").mkdir()
        with self.assertRaisesRegex(UsageError, "`out` exists already"):
            self.lock(must_be_new=True).__enter__()
        with self.lock("b", must_be_new=True):
            pass


if __name__ == "__main__":
    tf.test.main()
