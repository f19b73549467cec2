"""Memory of the host from which batches go to the devices."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np

from lars_keras.training.inputs import Batch, aligned, copied

_SLOTS = 3  # one is filled while the devices read another; a third evens out


class Staging:
    """Copies batches to memory that is used again when the devices have read it.

    A user's memory may change when the next batch is asked for, and the devices read a batch later. Fresh memory for
    each batch would cost more than the copy itself, because the system clears it page by page.

    Call `copied` and `send` in turn. A batch may be sent in several parts.

    Args:
        again: use memory again; else each copy gets memory of its own, and batches may be sent without a copy.
    """

    def __init__(self, again: bool):
        self._slots = collections.deque(_Slot() for _ in range(_SLOTS * again))

    def copied(self, batch: Batch) -> Batch:
        """Return a copy of a batch. It holds until the devices have the arrays that `send` makes of it."""
        if not self._slots:
            return copied(batch)
        self._slots.rotate()
        return self._slots[0].filled(batch)

    def send(self, put: Callable[[Batch], Any], batch: Batch) -> Any:
        """Return the arrays that `put` makes on the devices of the last copy, or of a part of it."""
        for slot in self._slots:  # or the devices would hold batches that are used
            slot.sent = [arrays for arrays in slot.sent if not all(a.is_ready() for a in jax.tree.leaves(arrays))]
        arrays = put(batch)
        if self._slots:
            self._slots[0].sent.append(arrays)
        return arrays


class _Slot:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self._memory: list[np.ndarray] = []

    def filled(self, batch: Batch) -> Batch:
        """Return a copy of a batch in this memory, when the devices have read it."""
        jax.block_until_ready(self.sent)
        self.sent.clear()
        given = keras.tree.flatten(batch)
        self._memory += [np.empty(0, np.uint8)] * (len(given) - len(self._memory))
        return keras.tree.pack_sequence_as(batch, [self._copied(i, a) for i, a in enumerate(given)])

    def _copied(self, i: int, array: Any) -> Any:
        if array is None:
            return None
        if self._memory[i].nbytes < array.nbytes:
            self._memory[i] = aligned(array.nbytes)
        copy = self._memory[i][: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy
