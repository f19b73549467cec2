"""Files that are written completely or not at all."""

import contextlib
import errno
import os
import pathlib
import socket
import tempfile
import time
import unittest
from unittest import mock

from lars_keras.files import atomic_path, atomic_write_text, temporary_name
from running.results import write_results


class AtomicPathTest(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.dir / "model.keras"
        self.path.write_text("old")

    def names(self):
        return sorted(path.name for path in self.dir.iterdir())

    def test_the_old_file_stays_until_the_new_one_is_whole(self):
        (self.dir / temporary_name("model.keras")).write_text("half, from a kill")
        with atomic_path(self.path) as temporary:
            pathlib.Path(temporary).write_text("new")
            self.assertEqual(self.path.read_text(), "old")
        self.assertEqual((self.path.read_text(), self.names()), ("new", ["model.keras"]))

    def test_the_new_one_is_on_the_disk_before_it_gets_the_name(self):
        done, fsync, replace = [], os.fsync, os.replace
        with (
            mock.patch("os.fsync", lambda n: (done.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n))),
            mock.patch("os.replace", lambda a, b: (done.append("renamed"), replace(a, b))),
            atomic_path(self.path) as temporary,
        ):
            pathlib.Path(temporary).write_text("new")
        self.assertEqual(done, [temporary, "renamed", str(self.dir)])

    def test_a_file_system_that_cannot_tell(self):
        for number, refused in ((errno.EINVAL, False), (errno.EIO, True)):
            with mock.patch("os.fsync", side_effect=OSError(number, "no")):
                with self.assertRaises(OSError) if refused else contextlib.nullcontext():
                    atomic_write_text(self.path, str(number))
        self.assertEqual((self.path.read_text(), self.names()), (str(errno.EINVAL), ["model.keras"]))

    def test_two_processes_write_at_a_time(self):
        with atomic_path(self.path) as one:
            pathlib.Path(one).write_text("one")
            with mock.patch("os.getpid", return_value=os.getppid()), atomic_path(self.path) as two:
                pathlib.Path(two).write_text("two")
            self.assertEqual(self.path.read_text(), "two")
        self.assertEqual((self.path.read_text(), self.names()), ("one", ["model.keras"]))

    def test_what_killed_processes_leave_is_removed(self):
        host = socket.gethostname()
        for name, age, removed in (
            (f".writing-{host}-99999999-page.html", 0, True),
            (f".writing-{host}-{os.getppid()}-page.html", 0, False),
            (".writing-elsewhere-1-page.html", 0, False),
            (".writing-elsewhere-1-page.html", 25, True),
            (".writing-model.keras", 25, True),
            ("notes.txt", 25, False),
        ):
            path = self.dir / name
            path.write_text("half")
            os.utime(path, (time.time() - 3600 * age,) * 2)
            atomic_write_text(self.path, "new")
            self.assertEqual(not path.exists(), removed, (name, age))

    def test_an_error_leaves_the_old_file(self):
        with self.assertRaises(ZeroDivisionError), atomic_path(self.path) as temporary:
            pathlib.Path(temporary).write_text("half")
            raise ZeroDivisionError
        self.assertEqual((self.path.read_text(), self.names()), ("old", ["model.keras"]))

    def test_an_address_is_written_directly(self):
        with atomic_path("gs://bucket/model.keras") as path:
            self.assertEqual(path, "gs://bucket/model.keras")


class ResultsTest(unittest.TestCase):
    def test_they_come_after_the_report(self):
        """A run that is killed before them is not finished, and writes all of its last files again."""
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "config.json").write_text("{}")
        callbacks = mock.Mock()
        callbacks.log.seconds, callbacks.progress.images_per_second = 1.0, 2.0
        callbacks.progress.data_wait, callbacks.images.count = 0.0, 0
        scores = {"top1": 0.5, "top5": 0.75, "loss": 1.0, "n": 4.0}
        with mock.patch("running.results.atomic_write_text", side_effect=OSError):
            self.assertRaises(OSError, write_results, folder, scores, 3, callbacks, [])
        self.assertIn("50.00", (folder / "report.html").read_text())
        self.assertFalse((folder / "results.json").exists())


if __name__ == "__main__":
    unittest.main()
