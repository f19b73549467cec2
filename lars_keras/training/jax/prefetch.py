"""Batches made one ahead, and given to the devices one ahead."""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import jax


class Prefetcher:
    """Makes batches in a thread, always one ahead: the next batch is made while an update runs.

    The devices hold the batch that they work on and the next one. A host that is faster waits for them.

    Args:
        make: makes the next batch on the host.
        put: gives a batch to the devices.

    Attributes:
        idle: seconds, since the start, for which the devices had nothing to do because a batch was missing.
    """

    def __init__(self, make: Callable[[], Any], put: Callable[[Any], Any]):
        self._make, self._put, self.idle = make, put, 0.0
        self._before: Any = ()
        self._next = self._begin()

    def __call__(self, at_work_on: Any) -> Any:
        """Return the next batch, on the devices.

        Args:
            at_work_on: arrays that the last program gives; the devices are idle from then on. They must not be donated.
        """
        if not self._next.done():
            jax.block_until_ready(at_work_on)  # nothing can be given to them before the batch is there anyway
            since = time.perf_counter()
            self._next.exception()  # waits
            self.idle += time.perf_counter() - since
        batch = self._next.result()
        self._next = self._begin()
        jax.block_until_ready(self._before)  # so that one program waits behind the one that runs, and no more
        self._before = at_work_on
        return self._put(batch)

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
