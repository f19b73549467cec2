"""Warm-up, decay and scaling of the learning rate, counted in optimizer updates.

Steps are optimizer updates, from 0. With `gradient_accumulation_steps`, Keras's own optimizers count micro-batches.
"""

import abc
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from lars_keras.checks import as_number, check_count, check_number


class _Warmup(keras.optimizers.schedules.LearningRateSchedule, abc.ABC):
    """`start + (peak - start) * (t + 1) / warmup_updates`, then `decay(t - warmup_updates)`.

    The last update of the warm-up runs at the peak. Goyal et al. 2017 (arXiv 1706.02677), section 2.2.
    """

    def __init__(self, peak: float, warmup_updates: int, start: float):
        self.peak = check_number("peak", peak)
        self.warmup_updates = check_count("warmup_updates", warmup_updates)
        self.start = check_number("start", start)

    def __call__(self, step: Any) -> Any:
        t = ops.cast(step, "float32")
        ramp = self.start + (self.peak - self.start) * (t + 1.0) / max(self.warmup_updates, 1)
        after = self.decay(ops.maximum(t - self.warmup_updates, 0.0))
        return ops.where(t < self.warmup_updates, ramp, after)

    @abc.abstractmethod
    def decay(self, t: Any) -> Any:
        """Return the rate `t` updates after the warm-up, a float32 scalar."""

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "warmup_updates": self.warmup_updates, "start": self.start}


class _WarmupTo(_Warmup):
    """Decays from `peak` to `end` in `total_updates - warmup_updates` updates."""

    def __init__(
        self,
        peak: float,
        warmup_updates: int,
        total_updates: int,
        start: float = 0.0,
        end: float = 0.0,
    ):
        super().__init__(peak, warmup_updates, start)
        self.total_updates = check_count("total_updates", total_updates)
        self.end = check_number("end", end)
        if self.total_updates <= self.warmup_updates:
            raise ValueError(
                "`total_updates` must be above `warmup_updates`. "
                f"Received: total_updates={total_updates}, warmup_updates={warmup_updates}"
            )

    def left(self, t: Any) -> Any:
        """Return the fraction of the decay that is left: 1 after the warm-up, 0 at the end."""
        return 1.0 - ops.minimum(t / (self.total_updates - self.warmup_updates), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "total_updates": self.total_updates, "end": self.end}


@keras.saving.register_keras_serializable(package="lars_keras")
class WarmupPolynomial(_WarmupTo):
    """`end + (peak - end) * (1 - x) ** power` after a linear warm-up.

    Power 2 is the decay of the LARS paper (arXiv 1708.03888, section 5) and of MLPerf's ResNet-50.

    Args:
        peak: highest rate.
        warmup_updates: length of the warm-up; 0 for none.
        total_updates: length of warm-up and decay; `end` from then on.
        power: exponent, above 0.
        start: rate from which the warm-up rises.
        end: last rate.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        peak: float,
        warmup_updates: int,
        total_updates: int,
        power: float = 2.0,
        start: float = 0.0,
        end: float = 0.0,
    ):
        super().__init__(peak, warmup_updates, total_updates, start, end)
        self.power = check_number("power", power, above=0.0)

    def decay(self, t: Any) -> Any:
        return self.end + (self.peak - self.end) * self.left(t) ** self.power

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "power": self.power}


@keras.saving.register_keras_serializable(package="lars_keras")
class WarmupCosine(_WarmupTo):
    """`end + (peak - end) * (1 + cos(pi x)) / 2` after a linear warm-up. Loshchilov, Hutter 2017 (arXiv 1608.03983).

    Args:
        peak: highest rate.
        warmup_updates: length of the warm-up; 0 for none.
        total_updates: length of warm-up and decay; `end` from then on.
        start: rate from which the warm-up rises.
        end: last rate.

    Raises:
        ValueError: for a value out of range.
    """

    def decay(self, t: Any) -> Any:
        return self.end + (self.peak - self.end) * 0.5 * (1.0 - ops.cos(math.pi * self.left(t)))


@keras.saving.register_keras_serializable(package="lars_keras")
class WarmupExponential(_WarmupTo):
    """`peak * (end / peak) ** x` after a linear warm-up: a geometric decay, with the same factor every update.

    Args:
        peak: highest rate, above 0.
        warmup_updates: length of the warm-up; 0 for none.
        total_updates: length of warm-up and decay; `end` from then on.
        start: rate from which the warm-up rises.
        end: last rate, above 0.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, peak: float, warmup_updates: int, total_updates: int, start: float = 0.0, end: float = 1e-3):
        super().__init__(peak, warmup_updates, total_updates, start, end)
        if not self.peak or not self.end:
            raise ValueError(f"`peak` and `end` must be above 0. Received: peak={peak!r}, end={end!r}")

    def decay(self, t: Any) -> Any:
        return self.end * (self.peak / self.end) ** self.left(t)


@keras.saving.register_keras_serializable(package="lars_keras")
class WarmupStep(_Warmup):
    """`peak * factor ** (number of boundaries reached)` after a linear warm-up.

    Args:
        peak: highest rate.
        warmup_updates: length of the warm-up; 0 for none.
        boundaries: updates, in rising order, at which the rate is multiplied by `factor` once more; counted from the
            start of training. No boundary may lie within the warm-up.
        factor: in (0, 1].
        start: rate from which the warm-up rises.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        peak: float,
        warmup_updates: int,
        boundaries: Sequence[int],
        factor: float = 0.1,
        start: float = 0.0,
    ):
        super().__init__(peak, warmup_updates, start)
        if isinstance(boundaries, str) or not isinstance(boundaries, Iterable):
            raise ValueError(f"`boundaries` must be a list of updates. Received: boundaries={boundaries!r}")
        self.boundaries = [check_count("boundaries", b) for b in boundaries]
        self.factor = check_number("factor", factor, above=0.0)
        if self.factor > 1.0:
            raise ValueError(f"`factor` must be in (0, 1]. Received: factor={factor!r}")
        if self.boundaries != sorted(set(self.boundaries)):
            raise ValueError(f"`boundaries` must rise. Received: boundaries={list(boundaries)}")
        if self.boundaries and self.boundaries[0] < self.warmup_updates:
            raise ValueError(
                "`boundaries` must not lie within the warm-up. "
                f"Received: boundaries={list(boundaries)}, warmup_updates={warmup_updates}"
            )

    def decay(self, t: Any) -> Any:
        rate = ops.ones_like(t) * self.peak
        for boundary in self.boundaries:
            rate = ops.where(t >= boundary - self.warmup_updates, rate * self.factor, rate)
        return rate

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "boundaries": self.boundaries, "factor": self.factor}


def duration_in_updates(duration: str | int | float, *, batch_size: int, num_examples: int) -> int:
    """Convert a duration to optimizer updates, rounded up.

    Args:
        duration: `"5 epochs"`, `"100 steps"` (updates), `"1e6 examples"`, or a number of updates.
        batch_size: global batch size.
        num_examples: examples in an epoch.

    Returns:
        The smallest number of updates that covers the duration. So a recipe with a new batch size needs no other edit.

    Raises:
        ValueError: for a text of another form, a negative number or a fraction of a step; if `batch_size` or
            `num_examples` is not a whole number above 0.
    """
    batch_size = check_count("batch_size", batch_size, at_least=1)
    num_examples = check_count("num_examples", num_examples, at_least=1)
    match = re.fullmatch(r"\s*([-+.\deE]+?)\s*(epochs?|steps?|updates?|examples?)?\s*", str(as_number(duration)))
    try:
        number = float(match[1]) if match else -1.0
    except ValueError:
        number = -1.0
    if not match or not 0.0 <= number < math.inf:
        raise ValueError(
            "A duration is a number of at least 0, followed by 'epochs', 'steps' or 'examples', as in '2.5 epochs'. "
            f"Received: {duration!r}"
        )
    unit = (match[2] or "steps").rstrip("s")
    if unit in ("step", "update"):
        if number != int(number):
            raise ValueError(f"A duration in steps must be whole. Received: {duration!r}")
        return int(number)
    examples = number * num_examples if unit == "epoch" else number
    # 1e-9: 0.1 epochs of 30 examples are 3 examples, not 3.0000000000000004.
    return math.ceil(examples / batch_size - 1e-9)


def linear_scaling(base_rate: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Return `base_rate * batch_size / base_batch_size`. Goyal et al. 2017 (arXiv 1706.02677), section 2.1."""
    return check_number("base_rate", base_rate) * _ratio(batch_size, base_batch_size)


def sqrt_scaling(base_rate: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Return `base_rate * sqrt(batch_size / base_batch_size)`. Krizhevsky 2014 (arXiv 1404.5997), section 5."""
    return check_number("base_rate", base_rate) * math.sqrt(_ratio(batch_size, base_batch_size))


def _ratio(batch_size: int, base_batch_size: int) -> float:
    of = check_count("batch_size", batch_size, at_least=1)
    return of / check_count("base_batch_size", base_batch_size, at_least=1)
