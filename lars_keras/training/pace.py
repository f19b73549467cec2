"""The number of updates in a call of the engine."""

_CALL = 0.1  # seconds; far more than the host needs between two calls, and often enough for a progress bar
_MOST = 128


class Pace:
    """Chooses how many updates the engine takes before callbacks are called.

    A GPU or TPU waits for the host between two calls. If no callback looks at single updates, calls may grow to about a
    tenth of a second.

    Args:
        updates: updates of a call.
        may_grow: True if a call may take more.

    Attributes:
        fewest: updates of the first call.
        updates: updates of the next call.
    """

    def __init__(self, updates: int, may_grow: bool):
        self.updates, self.fewest, self._may_grow = updates, updates, may_grow

    def took(self, updates: int, seconds: float) -> None:
        """Adapt the next call to the last one, which took `updates` updates in this time."""
        if not self._may_grow or updates < self.updates:  # an epoch's last call may be short
            return
        if seconds < _CALL / 2 and 2 * updates <= _MOST:
            self.updates = 2 * updates
        elif seconds > 2 * _CALL:
            self.updates = max(updates // 2, self.fewest)
