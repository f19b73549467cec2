"""Batches made one ahead of the devices."""

import concurrent.futures
import threading
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
        self._next = self._begin()

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
        self._next = self._begin()
        return batch

    def _begin(self) -> concurrent.futures.Future[Any]:
        """Start to make a batch.

        Loaders fork their workers here. A process that is forked in a thread of `ThreadPoolExecutor` fails at its end,
        because it waits for that thread, so each batch has a thread of its own.
        """
        batch: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def make() -> None:
            try:
                batch.set_result(self._make())
            except BaseException as e:
                batch.set_exception(e)

        threading.Thread(target=make, name="batches").start()
        return batch
