"""Batches made one ahead of the devices."""

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import jax


class Prefetcher:
    """Makes batches in a thread, always one ahead: the next batch is made while an update runs.

    Args:
        make: makes the next batch.

    Attributes:
        idle: seconds, since the start, for which the devices had nothing to do because a batch was missing.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self.idle = make, 0.0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(make)

    def __call__(self, at_work_on: Any) -> Any:
        """Return the next batch.

        Args:
            at_work_on: arrays that the devices compute; from then on they are idle.
        """
        if not self._next.done():
            jax.block_until_ready(at_work_on)  # nothing can be given to them before the batch is there anyway
            since = time.perf_counter()
            self._next.exception()  # waits
            self.idle += time.perf_counter() - since
        batch = self._next.result()
        self._next = self._thread.submit(self._make)
        return batch
