"""Exceptions that end a run."""


class UsageError(ValueError):
    """The user asked for something impossible. The message names what is possible."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is not finite or explodes.

    Attributes:
        update: the first bad update, counted from 1.
    """

    def __init__(self, message: str, update: int):
        super().__init__(message)
        self.update = update


class Preempted(BaseException):
    """A signal asked the run to stop.

    Like `KeyboardInterrupt`, it is not an `Exception`, so code that catches the errors of a library lets it through.
    """


class TooManyUnreadableImages(RuntimeError):
    """More images are unreadable than the limit tolerates."""
