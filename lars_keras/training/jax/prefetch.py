"""Make batches one ahead, and give them to the devices one ahead."""

import atexit
import concurrent.futures
import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import jax


@dataclasses.dataclass
class _Batch:
    """A batch to be made, and given to the devices once they have computed `at_work_on`."""

    at_work_on: Any
    made: threading.Event = dataclasses.field(default_factory=threading.Event)
    on_devices: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)


_Requests: TypeAlias = queue.SimpleQueue[_Batch | None]
_threads: weakref.WeakKeyDictionary[threading.Thread, _Requests] = weakref.WeakKeyDictionary()


@atexit.register
def _wait_for_threads() -> None:
    """Wait for batches in the making, because the exit aborts threads in compiled code; not for data that hang."""
    for thread, requests in list(_threads.items()):
        requests.put(None)
        thread.join(timeout=5)


def _make_batches(make: Callable[[], Any], put: Callable[[Any], Any], count: int, requests: _Requests) -> None:
    """Make `count` batches as they are asked for, or as many as there are before None."""
    for _ in range(count):
        batch = requests.get()
        if batch is None:
            return
        try:
            arrays = make()
            batch.made.set()
            jax.block_until_ready(batch.at_work_on)
            batch.on_devices.set_result(put(arrays))
        except BaseException as e:
            batch.on_devices.set_exception(e)
            batch.made.set()
        batch = arrays = None  # while this waits


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
        self.idle, self._left = 0.0, count
        self._requests: _Requests = queue.SimpleQueue()
        self._next: _Batch | None = None
        if not count:
            return
        self._ask(())
        # Loaders fork their workers in this thread. In one of `ThreadPoolExecutor` the forks would fail at their ends.
        thread = threading.Thread(
            target=_make_batches, args=(make, put, count, self._requests), name="batches", daemon=True
        )
        _threads[thread] = self._requests
        weakref.finalize(self, self._requests.put, None).atexit = False
        thread.start()

    def __call__(self, at_work_on: Any) -> Any:
        """Return the next batch, on the devices.

        Args:
            at_work_on: results of the last program; when they are ready, the devices are idle. They must not be
                donated.
        """
        assert self._next is not None  # `count` calls, no more
        batch, self._next = self._next, None
        self._left -= 1
        if not batch.made.is_set():
            jax.block_until_ready(at_work_on)  # nothing can be given to them before the batch is there anyway
            since = time.perf_counter()
            batch.made.wait()
            self.idle += time.perf_counter() - since
        arrays = batch.on_devices.result()
        if self._left:
            self._ask(at_work_on)
        return arrays

    def _ask(self, at_work_on: Any) -> None:
        self._next = _Batch(at_work_on)
        self._requests.put(self._next)
