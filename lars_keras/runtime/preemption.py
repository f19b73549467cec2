"""Stop a run in an orderly way before its machine is taken away."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from lars_keras.runtime.errors import Preempted
from lars_keras.training.cluster import cluster_of
from lars_keras.training.votes import take_agreed

_ALWAYS = (signal.SIGTERM, signal.SIGINT)  # a shell lets its background jobs ignore SIGINT
_REPEAT_SECONDS = 1.0  # a signal that follows sooner is the same one
SIGNALS = (*_ALWAYS, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)

_END = b"\0"  # no signal has this number
_entered: list["StopOnSignal"] = []  # the innermost last
_forking = threading.local()


class StopOnSignal(keras.callbacks.Callback):
    """Raises `Preempted` after the training or evaluation batch in which a signal arrives.

    All hosts stop after the same update. Another signal ends the process at once, unless it arrives within a second of
    the first: a batch system may signal a process and its parent, which passes it on. A line on standard error
    acknowledges each. A signal other than SIGTERM and SIGINT that the process ignores stays ignored, such as SIGHUP
    under `nohup`.

    ```python
    with StopOnSignal() as stop:
        trainer.fit(..., callbacks=[stop])
    ```

    Args:
        signals: signals to stop for. The default covers the warnings of batch systems: SIGTERM, SIGINT, SIGHUP, SIGUSR1
            and SIGXCPU.

    Raises:
        ValueError: by `fit`, outside the block.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS) -> None:
        super().__init__()
        self._signals, self._received = tuple(signals), threading.Event()
        self.agreed: bool | None = None

    def __enter__(self) -> "StopOnSignal":
        # Python runs its signal handlers between bytecode instructions, and an update is one instruction. Python's C
        # handler writes to this pipe immediately.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in self._signals
            if number in _ALWAYS or signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        _entered.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        if self not in _entered:  # in a forked process
            return
        _entered.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        self._restore_handlers()
        os.write(self._write, _END)  # closing it would not do: a process that was forked may hold it, too
        self._thread.join()
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._write)
        os.close(self._read)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        while (number := os.read(self._read, 1)) != _END:
            if number[0] not in self._handlers:
                continue
            if not self._received.is_set():
                self._received.set()
                first = time.monotonic()
                _say(f"{signal.strsignal(number[0])}: stopping after this batch. Another signal ends the run at once.")
            elif time.monotonic() - first >= _REPEAT_SECONDS:
                _say(f"{signal.strsignal(number[0])} again: ended at once; what came after the last checkpoint is lost")
                os._exit(128 + number[0])

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        if self not in _entered:
            raise ValueError("`StopOnSignal` catches signals only in a block: `with StopOnSignal() as stop: ...`.")

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._cluster, self._update = cluster_of(model), 0

    def vote(self, update: int, logs: Mapping[str, float]) -> bool:
        """Return True if a signal has arrived here; see `lars_keras.training.votes.Voter`."""
        return self._received.is_set()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._update = batch + 1
        self._check(f"after update {batch + 1}")

    def on_test_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._check("during an evaluation")

    def _check(self, when: str) -> None:
        if take_agreed(self, self._cluster, self._update):
            raise Preempted(f"stopped {when}")


def _before_fork() -> None:
    """Hold signals back in this thread, so that none reaches the child before it has its handlers back."""
    numbers = {number for stop in _entered for number in stop._handlers}
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _leave_in_child() -> None:
    """Give a forked process its signals back. It would ignore SIGTERM, and write to the pipe of its parent."""
    if _entered:
        signal.set_wakeup_fd(-1)
    while _entered:
        stop = _entered.pop()
        stop._restore_handlers()
        stop._close_pipe()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_leave_in_child)


def _say(line: str) -> None:
    """Write a line to standard error at once, even if another thread is in the middle of a print."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{line}\n".encode())
