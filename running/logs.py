"""Log what concerns the user of a program."""

import logging as python_logging
from pathlib import Path

from absl import logging

# Parts of the paths of the files whose warnings are left out. Those of tensorflow-datasets are of its own deprecations.
# The plan has those of long averages, and a rehearsal is too short for any.
_LEFT_OUT = {"tensorflow_datasets", "averages.py"}


def show_warnings() -> None:
    """Show warnings and errors, except warnings that say nothing to the user of a program.

    They go to what is the standard error at that moment: a process of a comparison has one for each run.
    """
    if not python_logging.getLogger().handlers:
        handler = python_logging.lastResort
        assert handler
        handler.setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
        python_logging.getLogger().addHandler(handler)
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(_is_shown)


def _is_shown(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR or _LEFT_OUT.isdisjoint(Path(record.pathname).parts)
