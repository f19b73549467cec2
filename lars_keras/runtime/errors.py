"""What ends a run, and with which exit code."""

import contextlib
from collections.abc import Iterator

EXIT_USAGE = 2  # a bad flag or a missing device or file: nothing was started
EXIT_DIVERGED = 3  # the run diverged; its last checkpoint is from before
EXIT_WORKER_LOST = 4  # another process of a multi-worker run is gone
EXIT_BAD_DATA = 5  # more images could not be read than --max_bad_images allows
EXIT_NOT_SAVED = 6  # the disk took no checkpoint or result
EXIT_PREEMPTED = 75  # stopped by a signal, saved: start it again to go on


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what would do."""


class Diverged(RuntimeError):
    """The numbers of a run are not finite, or exploding.

    Attributes:
        update: the first bad update, from 1.
    """

    def __init__(self, message: str, update: int):
        super().__init__(message)
        self.update = update


class Preempted(RuntimeError):
    """A signal asked the run to stop."""


class TooManyBadImages(RuntimeError):
    """More images could not be read than are allowed."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """While a run is set up, an argument or file that is refused is the user's to mend, not a bug to trace."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise UsageError(str(e)) from e
