"""Warnings that a user of `train.py` sees."""

import errno
import logging as python_logging
import pathlib
import tempfile
import unittest
from contextlib import redirect_stderr
from io import StringIO
from unittest import mock

from absl import logging

from lars_keras.runtime.folder_lock import lock_folder
from lars_keras.training import averages
from running import command_line, logs


class WarningsTest(unittest.TestCase):
    def test_those_that_say_something_to_the_user_are_shown(self):
        self.addCleanup(logging.set_verbosity, logging.get_verbosity())
        logger, shown = logging.get_absl_logger(), StringIO()
        handler = python_logging.StreamHandler(shown)
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.removeFilter, logs._is_shown)
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

        def main(config):
            with mock.patch.object(averages, "long_averages", return_value=["The EMA is long."]):
                averages.warn_of_long_averages(None, 2)  # the plan has it
            with mock.patch.object(logger, "findCaller", lambda *_: ("a/tensorflow_datasets/b.py", 1, "f", None)):
                logging.warning("deprecated")
                logging.error("failed")
            with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOTSUP, "no")), lock_folder(folder, "run_dir"):
                pass

        self.assertEqual(command_line.run(main, ["train.py"], None), 0)
        locks = f"The file system of {folder} has no locks. Let one process at a time write to it."
        self.assertEqual(shown.getvalue().splitlines(), ["failed", locks])

    def test_each_run_of_a_process_has_them_in_its_log(self):
        """A handler that absl makes by itself stays with the first log, which is closed by then."""
        self.addCleanup(logging.set_verbosity, logging.get_verbosity())
        root = python_logging.getLogger()
        self.enterContext(mock.patch.object(root, "handlers", []))
        self.enterContext(mock.patch.object(python_logging.lastResort, "formatter", None))
        self.addCleanup(logging.get_absl_logger().removeFilter, logs._is_shown)
        logs.show_warnings()
        for number in (1, 2):
            with StringIO() as log:
                with redirect_stderr(log):
                    logging.warning("of run %d", number)
                self.assertEqual(log.getvalue(), f"WARNING: of run {number}\n")


if __name__ == "__main__":
    unittest.main()
