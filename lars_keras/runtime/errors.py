"""What ends a run."""


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
