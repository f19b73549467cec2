"""Compute the least time of an update from its programs, and the largest micro-batch."""

import dataclasses

from lars_keras.pod.chips import Chip
from lars_keras.pod.measure import Program


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The bounds of an update. At best compute, HBM and links overlap, so the longest of the three is the bound.

    Attributes:
        seconds: seconds of an update, for `"compute"`, `"memory"` and `"interconnect"`.
        bound: the name of the longest.
        seconds_per_update: time of the longest.
        images_per_second: examples of the global batch per second, at best.
        compute_utilization: fraction of the chip's peak compute at that time.
    """

    seconds: dict[str, float]
    bound: str
    seconds_per_update: float
    images_per_second: float
    compute_utilization: float


def roofline(programs: list[Program], chip: Chip, cores: int, batch_size: int) -> Roofline:
    """Return the bounds of an update, without any overhead.

    Args:
        programs: programs of an update, on one device.
        chip: its figures.
        cores: devices of a chip.
        batch_size: global batch size.
    """
    work = {
        "compute": sum(p.times * p.flops for p in programs) * cores / chip.flops,
        "memory": sum(p.times * p.hbm_bytes for p in programs) * cores / chip.hbm_bandwidth,
        "interconnect": sum(p.times * c.sent for p in programs for c in p.collectives) * cores / chip.ici_bandwidth,
    }
    seconds = max(work.values())
    return Roofline(
        seconds=work,
        bound=max(work, key=lambda kind: work[kind]),
        seconds_per_update=seconds,
        images_per_second=batch_size / seconds,
        compute_utilization=work["compute"] / seconds,
    )


def largest_microbatch(fixed_and_per_example: tuple[float, float], capacity: float, local_batch: int) -> int | None:
    """Return the largest divisor of a device's part of the batch whose memory fits, or None."""
    fixed, per_example = fixed_and_per_example
    fits = [m for m in range(1, local_batch + 1) if local_batch % m == 0 and fixed + per_example * m <= capacity]
    return max(fits, default=None)


def line_through(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Return `(fixed, per example)` of memory that grows with the micro-batch, from two sizes."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return large[1] - slope * large[0], slope
