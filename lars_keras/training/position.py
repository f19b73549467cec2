"""The place of a run between two updates, which a snapshot saves."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass
class Position:
    """The place of a run between two updates.

    Attributes:
        update: number of finished updates.
        batches_consumed: global batches of training data used or skipped.
        epoch: the epoch whose metrics are being gathered; -1 before the first.
        ended: number of epochs whose end callbacks have seen.
        losses: a few numbers whose exact sum is the sum of the losses of the epoch so far.
        counted: number of these losses; by default each number is one loss, as earlier versions saved them.
        logs: the last logs that callbacks got.
        callbacks: the memory of callbacks (see `callback_memory`); None if not known.
        order: the values on which the order of arrays, or of batches by index, depends; None for other data.
        rollbacks: the rollbacks of the run; see `lars_keras.runtime.recovery.fit_with_recovery`.
    """

    update: int = 0
    batches_consumed: int = 0
    epoch: int = -1
    ended: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    counted: int = -1
    logs: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: dict[str, Any] | None = None
    order: list[Any] | None = None
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.counted < 0:
            self.counted = len(self.losses)

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, without losses."""
        self.epoch, self.losses, self.counted = epoch, [], 0

    def add_losses(self, losses: Iterable[float]) -> None:
        """Add losses of updates exactly: the rounding errors of the sum are kept beside it (Shewchuk 1997).

        So the mean does not depend on where a run was stopped, and computing it takes no longer in a long epoch.
        """
        for total in losses:
            rest = []
            for part in self.losses:
                large, small = (total, part) if abs(total) >= abs(part) else (part, total)
                total = large + small
                if lost := small - (total - large):
                    rest.append(lost)
            self.losses = [*rest, total] if math.isfinite(total) else [total]
            self.counted += 1

    def mean_loss(self) -> float:
        """Return the mean of the losses, exactly rounded; NaN if infinities of both signs are among them."""
        try:
            return math.fsum(self.losses) / self.counted
        except ValueError:
            return math.nan
