"""Files that are written completely or not at all."""

import pathlib
import tempfile
import unittest
import unittest.mock

from lars_keras.files import atomic_path
from running.results import write_results


class AtomicPathTest(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.dir / "model.keras"
        self.path.write_text("old")

    def names(self):
        return sorted(path.name for path in self.dir.iterdir())

    def test_the_old_file_stays_until_the_new_one_is_whole(self):
        (self.dir / ".writing-model.keras").write_text("half, from a kill")
        with atomic_path(self.path) as temporary:
            pathlib.Path(temporary).write_text("new")
            self.assertEqual(self.path.read_text(), "old")
        self.assertEqual((self.path.read_text(), self.names()), ("new", ["model.keras"]))

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
        callbacks = unittest.mock.Mock()
        callbacks.log.seconds, callbacks.progress.images_per_second = 1.0, 2.0
        callbacks.progress.data_wait, callbacks.images.count = 0.0, 0
        scores = {"top1": 0.5, "top5": 0.75, "loss": 1.0, "n": 4.0}
        with unittest.mock.patch("running.results.atomic_write_text", side_effect=OSError):
            self.assertRaises(OSError, write_results, folder, scores, 3, callbacks, [])
        self.assertIn("50.00", (folder / "report.html").read_text())
        self.assertFalse((folder / "results.json").exists())


if __name__ == "__main__":
    unittest.main()
