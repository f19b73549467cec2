"""Name the machine of a measurement."""

import contextlib
import os
import platform
from pathlib import Path

import keras


def machine() -> str:
    """Return the name of the machine or device that computes."""
    if keras.backend.backend() == "jax":
        import jax

        if jax.default_backend() != "cpu":
            return f"one {jax.devices()[0].device_kind}"
    return f"{platform.machine()} with {instructions()}, {os.cpu_count()} cores"


def instructions() -> str:
    """Return the widest vector instructions of this machine's CPU, as far as Linux tells."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "other")
    return "unknown instructions"
