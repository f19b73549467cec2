"""The place of a run between two updates, which a snapshot saves."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass
class Position:
    """The place of a run between two updates.

    Attributes:
        update: updates finished.
        batches_consumed: global batches of training data used or skipped.
        epoch: the epoch that metrics are gathered for; -1 before the first.
        losses: losses of its updates so far.
        logs: the logs that callbacks got last.
        callbacks: the memory of callbacks (see `callback_memory`); None if not known.
        order: the values on which the order of arrays, or of batches by index, depends; None for other data.
    """

    update: int = 0
    batches_consumed: int = 0
    epoch: int = -1
    losses: list[float] = dataclasses.field(default_factory=list)
    logs: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: dict[str, Any] | None = None
    order: list[Any] | None = None

    def mean_loss(self) -> float:
        """Return the mean of `losses`, exactly rounded; NaN if infinities of both signs are among them."""
        try:
            return math.fsum(self.losses) / len(self.losses)
        except ValueError:
            return math.nan
