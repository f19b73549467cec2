"""Gradient noise scale: the batch size above which more examples add little progress.

An update averages the gradients of `n` ghost batches of `b` examples each; `B = b n`. With `g_b` the mean of the
squared norms of the ghost-batch gradients, and `g_B` the squared norm of their mean, unbiased estimates of the
squared norm of the true gradient and of the trace of the covariance of an example's gradient are

    |G|^2 = (B g_B - b g_b) / (B - b)        S = (g_b - g_B) / (1/b - 1/B)

The noise scale is `S / |G|^2`. Both estimates are noisy, and a ratio of noisy numbers is biased, so each is
averaged over updates first. Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv 1812.06162, appendix A.1.

It is a proxy derived for SGD: it starts small and grows while a network trains. With batch normalization the
gradient of an example depends on its ghost batch, so the estimate holds for ghost batches of the same size.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

BLOCKS = 20  # of updates; the jackknife leaves out one at a time


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """Holds an estimate of the noise scale, in examples.

    Attributes:
        value: the estimate; infinite if the noise hides the gradient, 0 if there is no noise.
        low: lower end of the confidence interval; may be infinite.
        high: upper end of the confidence interval; may be infinite.
        gradient: mean of `|G|^2` over the updates.
        noise: mean of `S` over the updates.
        updates: number of updates in the estimate.
    """

    value: float
    low: float
    high: float
    gradient: float
    noise: float
    updates: int

    def efficiency(self, batch_size: int) -> float:
        """Return how much progress an example contributes in a batch, relative to a very small batch, in [0, 1].

        Source: McCandlish et al. 2018, equation 2.7: `1 / (1 + batch_size / noise scale)`.
        """
        return 1.0 / (1.0 + batch_size / self.value) if self.value else 0.0

    def gain(self, small: int, large: int) -> float:
        """Return AdaScale's gain: how many updates at batch size `small` one update at batch size `large` is worth.

        The gain is 1 if there is no noise, and `large / small` if there is only noise.

        Source: Johnson, Agrawal, Gu and Guestrin 2020, arXiv 2007.05105, equation 4.
        """
        if not math.isfinite(self.value):
            return large / small
        return (self.value / small + 1.0) / (self.value / large + 1.0)

    def describe(self, batch_size: int, epoch: float, since: float | None = None) -> str:
        """Return a sentence on what the estimate means for a run.

        Args:
            batch_size: batch size of the run.
            epoch: epoch of the measurement.
            since: epoch of its first part, if it has several.
        """
        first, last = (f"{epoch if e is None else e:.3g}" for e in (since, epoch))
        when = f"at epoch {last}" if first == last else f"from epoch {first} to {last}"
        if not math.isfinite(self.low):
            return f"The noise scale {when} could not be bounded: no gradient stands out of the noise."
        if not math.isfinite(self.value):
            return (
                f"Noise scale above {_count(self.low)} {when}: no gradient stands out of the noise yet. "
                "Measure more updates."
            )
        high = _count(self.high) if math.isfinite(self.high) else "no bound"
        text = f"Noise scale {_count(self.value)} ({_count(self.low)} to {high}) {when}: "
        if self.value < 1:
            return f"{text}a batch of any size makes less than twice the progress of one example."
        text += (
            f"at batch {batch_size:,} each example contributes {_percent(self.efficiency(batch_size))} as much "
            "progress as in a small batch"
        )
        other = 2 ** round(math.log2(self.value) - 0.5)
        if other < batch_size / 1.5:
            return f"{text}; {other:,} would keep {_percent(self.efficiency(other))}."
        if self.efficiency(4 * batch_size) > 0.5:
            return f"{text}; {4 * batch_size:,} would still keep {_percent(self.efficiency(4 * batch_size))}."
        return f"{text}."


class NoiseScaleEstimator:
    """Estimates the noise scale of a model, per variable and in total, from norms that updates measure.

    Any training loop can feed it. `Trainer(noise_scale=True)` measures the two norms; `NoiseScaleLog` feeds them.

    ```python
    estimator = NoiseScaleEstimator(ghost_batch_size=64, batch_size=1024)
    for each update:
        estimator.add(mean over ghost batches of |g|^2, |mean over ghost batches of g|^2)  # (variables,) each
    print(estimator.total())
    ```

    Args:
        ghost_batch_size: `b`, examples of a ghost batch, whose gradients are averaged first.
        batch_size: `B`, examples of an update.

    Raises:
        ValueError: if an update has only one ghost batch.
    """

    def __init__(self, ghost_batch_size: int, batch_size: int):
        check_ghost_batches(ghost_batch_size, batch_size)
        self._b, self._B = ghost_batch_size, batch_size
        self._ghost: list[np.ndarray] = []
        self._mean: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._ghost)

    def add(self, ghost: Sequence[float] | np.ndarray, mean: Sequence[float] | np.ndarray) -> None:
        """Add an update. Ignore it if a value is not finite.

        Args:
            ghost: `g_b` of each variable, shape `(variables,)`.
            mean: `g_B` of each variable, shape `(variables,)`.
        """
        ghost, mean = np.array(ghost, np.float64), np.array(mean, np.float64)
        if ghost.shape != mean.shape or ghost.ndim != 1:
            raise ValueError(f"`ghost` and `mean` must be vectors of one length. Received: {ghost.shape}, {mean.shape}")
        if np.isfinite(ghost).all() and np.isfinite(mean).all():
            self._ghost.append(ghost)
            self._mean.append(mean)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the means over updates of `g_b` and `g_B`, each of shape `(variables,)`."""
        return np.mean(self._ghost, axis=0), np.mean(self._mean, axis=0)

    def total(self, confidence: float = 0.95) -> NoiseScale:
        """Return the noise scale of all variables together.

        Args:
            confidence: level of the interval, in (0, 1).

        Raises:
            ValueError: before two updates are added.
        """
        ghost, mean = self._added()
        return self._estimate(ghost.sum(1), mean.sum(1), confidence)

    def by_variable(self, confidence: float = 0.95) -> list[NoiseScale]:
        """Return the noise scale of each variable alone, in the order of the vectors that were added.

        Args:
            confidence: level of the interval, in (0, 1).

        Raises:
            ValueError: before two updates are added.
        """
        ghost, mean = self._added()
        return [self._estimate(ghost[:, i], mean[:, i], confidence) for i in range(ghost.shape[1])]

    def _added(self) -> tuple[np.ndarray, np.ndarray]:
        _check_updates(len(self))
        return np.array(self._ghost), np.array(self._mean)

    def _estimate(self, ghost: np.ndarray, mean: np.ndarray, confidence: float) -> NoiseScale:
        gradient, noise = unbiased(ghost, mean, self._b, self._B)
        return ratio_with_interval(gradient, noise, confidence)


def unbiased(ghost: np.ndarray, mean: np.ndarray, b: int, B: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unbiased estimates of `|G|^2` and of `S`; see the docstring of the module.

    Args:
        ghost: `g_b`, any shape.
        mean: `g_B`, of the same shape.
        b: examples of a ghost batch.
        B: examples of an update.
    """
    return (B * mean - b * ghost) / (B - b), (ghost - mean) / (1.0 / b - 1.0 / B)


def ratio_with_interval(gradient: np.ndarray, noise: np.ndarray, confidence: float = 0.95) -> NoiseScale:
    """Return the ratio of two means, with a jackknife interval over blocks of updates.

    The interval is computed for the inverse ratio `|G|^2 / S`, whose denominator is far from 0.

    Args:
        gradient: `|G|^2` of each update, shape `(updates,)`.
        noise: `S` of each update, shape `(updates,)`.
        confidence: in (0, 1).

    Raises:
        ValueError: for fewer than two updates, or a confidence outside of (0, 1).
    """
    _check_updates(len(gradient))
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1). Received: confidence={confidence}")
    blocks = np.array_split(np.arange(len(gradient)), min(BLOCKS, len(gradient)))
    rest = np.array([[np.delete(v, b).mean() for v in (gradient, noise)] for b in blocks])
    g, s = float(gradient.mean()), float(noise.mean())
    if s <= 0 < g:  # the ghost batches have the same gradient, but for rounding
        return NoiseScale(0.0, 0.0, 0.0, g, s, len(gradient))
    if min(s, *rest[:, 1]) <= 0:  # noise in too few updates for an interval
        return NoiseScale(s / g if g > 0 else math.inf, 0.0, math.inf, g, s, len(gradient))
    without, inverse = rest[:, 0] / rest[:, 1], g / s
    m = len(blocks)
    error = math.sqrt((m - 1) / m * float(np.square(without - without.mean()).sum()))
    reach = error * _student_quantile((1 + confidence) / 2, m - 1)
    value, low, high = (1.0 / x if x > 0 else math.inf for x in (inverse, inverse + reach, inverse - reach))
    return NoiseScale(value, low, high, g, s, len(gradient))


def _check_updates(count: int) -> None:
    if count < 2:
        raise ValueError(f"The noise scale needs at least 2 updates. Received: {count}")


def check_ghost_batches(ghost_batch: int, batch_size: int) -> None:
    """Raise ValueError unless an update has several ghost batches."""
    if not 0 < ghost_batch < batch_size:
        raise ValueError(
            "The noise scale compares the ghost batches of an update, so it needs several of them: choose a smaller "
            f"`microbatch_size`. Received: a ghost batch of {ghost_batch} in a batch of {batch_size}"
        )


def _count(value: float) -> str:
    """Return a number of examples, to two digits."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.0f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _student_quantile(p: float, degrees: int) -> float:
    """Return a quantile of Student's t: exact for 1 and 2 degrees, else Abramowitz and Stegun 1964, formula 26.7.5."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = statistics.NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
