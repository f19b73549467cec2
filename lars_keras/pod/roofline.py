"""From the programs of an update to its time, at best, and a verdict."""

from typing import Any

from lars_keras.pod.chips import Chip
from lars_keras.pod.measure import Program


def roofline(programs: list[Program], chip: Chip, cores: int, batch_size: int, updates: int) -> dict[str, Any]:
    """The bounds of an update, in seconds, and what they come to.

    The three kinds of work overlap at best, so the longest of them bounds the update. No overhead is in it.

    Args:
        programs: of an update.
        chip: its figures.
        cores: devices that share a chip.
        batch_size: global.
        updates: of the whole recipe.
    """
    work = {
        "compute": sum(p.times * p.flops for p in programs) * cores / chip.flops,
        "memory": sum(p.times * p.hbm_bytes for p in programs) * cores / chip.hbm_bandwidth,
        "interconnect": sum(p.times * c.sent for p in programs for c in p.collectives) * cores / chip.ici_bandwidth,
    }
    seconds = max(work.values())
    return {
        "seconds": work,
        "bound": max(work, key=lambda kind: work[kind]),
        "seconds_per_update": seconds,
        "images_per_second": batch_size / seconds,
        "hours": updates * seconds / 3600,
        "share_of_peak_compute": work["compute"] / seconds,
    }


def largest_microbatch(fixed_and_per_example: tuple[float, float], room: float, share: int) -> int | None:
    """The largest divisor of a device's share of the batch whose memory fits into `room`; None if none does."""
    fixed, per_example = fixed_and_per_example
    fits = [m for m in range(1, share + 1) if share % m == 0 and fixed + per_example * m <= room]
    return max(fits, default=None)


def line_through(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """`(fixed, per example)` of memory that grows with the micro-batch, from two sizes."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return large[1] - slope * large[0], slope
