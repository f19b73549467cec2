"""What ends a run, and with which exit code."""

import contextlib
from collections.abc import Iterator

EXIT_USAGE = 2  # a bad flag or a missing device or file: nothing was started
EXIT_DIVERGED = 3  # the loss is no longer a number
EXIT_WORKER_LOST = 4  # another process of a multi-worker run is gone


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what would do."""


class Diverged(RuntimeError):
    """The loss is not finite."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """While a run is set up, an argument or file that is refused is the user's to mend, not a bug to trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError) as e:
        raise UsageError(str(e)) from e
