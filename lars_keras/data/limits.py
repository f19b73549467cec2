"""Limits of the processor and the memory that this process has, also in a container."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # version 2; in a container, the files there are the container's own


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(allowed, 1)


def free_memory() -> int:
    """Return the bytes of memory that this process may still take."""
    import psutil  # comes with [train]; counting cores does not need it

    free = psutil.virtual_memory().available
    limit, used = _read("memory.max"), _read("memory.current")
    if limit.isdigit() and used.isdigit():
        counts = dict(line.split(" ", 1) for line in _read("memory.stat").splitlines())
        reclaimable = int(counts.get("inactive_file", 0))  # cached files count as used
        free = min(free, int(limit) - int(used) + reclaimable)
    return max(free, 0)


def _read(name: str) -> str:
    """Return the contents of a file of the control group; empty if there is none."""
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
