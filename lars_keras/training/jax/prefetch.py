"""Make batches one ahead, and give them to the devices one ahead."""

import atexit
import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

_Batch: TypeAlias = tuple[threading.Event, concurrent.futures.Future[Any]]
"""Is set when the batch is made; the batch on the devices."""

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_for_threads() -> None:
    """Wait for batches in the making, because the exit aborts threads in compiled code; not for data that hang."""
    for thread in list(_threads):
        thread.join(timeout=5)


class Prefetcher:
    """Makes batches in a thread, always one ahead: the next batch is made while an update runs.

    The devices hold the batch that they work on and the next one. A faster host waits for the devices.

    Args:
        make: makes the next batch on the host.
        put: gives a batch to the devices.
        count: batches to make.

    Attributes:
        idle: seconds, since the start, for which the devices had nothing to do because a batch was missing.
    """

    def __init__(self, make: Callable[[], Any], put: Callable[[Any], Any], count: int):
        self._make, self._put, self._left, self.idle = make, put, count, 0.0
        self._next: _Batch | None = self._begin(()) if count else None

    def __call__(self, at_work_on: Any) -> Any:
        """Return the next batch, on the devices.

        Args:
            at_work_on: results of the last program; when they are ready, the devices are idle. They must not be
                donated.
        """
        assert self._next is not None  # `count` calls, no more
        made, batch = self._next
        self._left -= 1
        if not made.is_set():
            jax.block_until_ready(at_work_on)  # nothing can be given to them before the batch is there anyway
            since = time.perf_counter()
            made.wait()
            self.idle += time.perf_counter() - since
        arrays = batch.result()
        self._next = self._begin(at_work_on) if self._left else None
        return arrays

    def _begin(self, at_work_on: Any) -> _Batch:
        """Start to make a batch, and give it to the devices once they have computed `at_work_on`.

        Loaders fork their workers here. A process that is forked in a thread of `ThreadPoolExecutor` fails at its end,
        because it waits for that thread, so each batch has a thread of its own.
        """
        made, batch = threading.Event(), concurrent.futures.Future[Any]()

        def make() -> None:
            try:
                arrays = self._make()
                made.set()
                jax.block_until_ready(at_work_on)
                batch.set_result(self._put(arrays))
            except BaseException as e:
                batch.set_exception(e)
                made.set()

        thread = threading.Thread(target=make, name="batches", daemon=True)
        _threads.add(thread)
        thread.start()
        return made, batch
