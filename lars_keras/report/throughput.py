"""Speed of a training process."""

import math
import time
from collections.abc import Callable

Clock = Callable[[], float]  # returns seconds


class Throughput:
    """Measures images per second, the fraction of time spent waiting for data, and the time left.

    The speed excludes the first call of the training function, because that call compiles. It also excludes the time
    between epochs, because evaluations and checkpoints fall into it.

    Args:
        batch_size: global batch size.
        first_update: updates finished before this process began.
        clock: function that returns seconds.
    """

    def __init__(self, batch_size: int, first_update: int = 0, clock: Clock = time.perf_counter):
        self._batch_size = batch_size
        self._clock = clock
        self._finished = first_update
        self._mark: float | None = None  # time of the last record; None before the first
        self._compiled = (first_update, 0.0)  # updates and time of the first record
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0

    def record(self, finished: int, waited: float = math.nan) -> None:
        """Record that the run has finished this many updates by now.

        Args:
            finished: updates of the whole run.
            waited: seconds that the devices waited for data since the last record.
        """
        now = self._clock()
        if self._mark is None:
            self._compiled = (finished, now)
        else:
            self._images += (finished - self._finished) * self._batch_size
            self._seconds += now - self._mark
            self._waited += waited
        self._finished, self._mark = finished, now

    def restart(self) -> None:
        """Exclude the time since the last record."""
        if self._mark is not None:
            self._mark = self._clock()

    @property
    def images_per_second(self) -> float:
        """Mean speed so far; NaN before the second record."""
        return self._images / self._seconds if self._seconds else math.nan

    @property
    def data_wait(self) -> float:
        """Fraction of the measured time spent waiting for data; NaN before the second record, or if unknown."""
        return self._waited / self._seconds if self._seconds else math.nan

    def seconds_left(self, total: int) -> float:
        """Return the time to `total` updates at the pace since compilation, evaluations included; NaN if unknown."""
        if self._mark is None or self._finished == self._compiled[0]:
            return math.nan
        updates, since = self._compiled
        return (total - self._finished) * (self._mark - since) / (self._finished - updates)
