"""Which runs a comparison is made of, as a pure function of the runs that are finished."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flags import RunConfig
from lars_keras.schedules import linear_scaling, sqrt_scaling

Outcome = Mapping[str, Any]

# Where the search for a rate begins; it goes from there where the scores lead it.
FIRST_RATES_BATCH = 256
SCALINGS = {"sqrt": sqrt_scaling, "linear": linear_scaling, "none": lambda rate, *_: rate}
FIRST_RATES = {"sgd": 0.1, "momentum": 0.02, "adam": 1e-3, "lamb": 5e-3, "lars": 2.5}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is compared with others.

    Args:
        name: for people.
        config: flags of its runs, but for batch size, rate and seed.
        first_rate, first_batch_size: a rate, and the batch size it is meant for.
        scaling: of `SCALINGS`, what becomes of the rate at other batch sizes, where the search begins.
        num_classes: of the data, which says what guesses score.
    """

    name: str
    config: RunConfig
    first_rate: float
    first_batch_size: int
    scaling: str = "sqrt"
    num_classes: int = 10

    def learned(self, outcome: Outcome) -> bool:
        """Whether a run scored more than guesses do, by two of their standard deviations."""
        if outcome["diverged"]:
            return False
        guess = 1 / self.num_classes
        return outcome["top1"] > guess + 2 * math.sqrt(guess * (1 - guess) / outcome["n"])


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. A `tuning` run is scored on a share of the training images, the others on the test split."""

    candidate: Candidate
    batch_size: int
    rate: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        kind = "tuning" if self.tuning else "seed"
        return f"{self.candidate.name}-{self.batch_size}-rate{self.rate:.4g}-{kind}{self.seed}"


@dataclasses.dataclass(frozen=True)
class GridCell:
    """One candidate at one batch size: first runs that choose a rate, then runs with it, one for each seed.

    Args:
        candidate, batch_size: which.
        tuning_runs: at most so many runs choose the rate; 0 keeps the candidate's own.
        factor: between neighbouring rates of the search.
        seeds: of the runs that count. Tuning takes the first.
    """

    candidate: Candidate
    batch_size: int
    tuning_runs: int
    factor: float
    seeds: tuple[int, ...]

    def job(self, step: int, seed: int, tuning: bool) -> Job:
        candidate = self.candidate
        first = SCALINGS[candidate.scaling](candidate.first_rate, self.batch_size, candidate.first_batch_size)
        return Job(self.candidate, self.batch_size, float(f"{first * self.factor**step:.4g}"), seed, tuning)

    def tuning(self, outcomes: Mapping[str, Outcome]) -> dict[int, Outcome]:
        """The finished runs of the search, by the step of their rate, and whether they `learned`."""
        steps = range(-self.tuning_runs, self.tuning_runs + 1)
        names = {step: self.job(step, self.seeds[0], tuning=True).name for step in steps}
        found = {step: outcomes[name] for step, name in names.items() if name in outcomes}
        return {step: {**outcome, "learned": self.candidate.learned(outcome)} for step, outcome in found.items()}

    def best(self, outcomes: Mapping[str, Outcome]) -> int | None:
        """The step of the chosen rate; None while the search goes on."""
        if not self.tuning_runs:
            return 0
        found = self.tuning(outcomes)
        return _best(found) if next_step(found, self.tuning_runs) is None else None

    def scored(self, outcomes: Mapping[str, Outcome]) -> list[Job]:
        """The runs that count; none while the rate is not chosen."""
        best = self.best(outcomes)
        return [] if best is None else [self.job(best, seed, tuning=False) for seed in self.seeds]

    def jobs(self, outcomes: Mapping[str, Outcome]) -> list[Job]:
        """The runs that can be taken now."""
        step = next_step(self.tuning(outcomes), self.tuning_runs)
        if step is not None:
            return [self.job(step, self.seeds[0], tuning=True)]
        return [job for job in self.scored(outcomes) if job.name not in outcomes]

    def left(self, outcomes: Mapping[str, Outcome]) -> int:
        """How many runs there may still be."""
        if self.best(outcomes) is None:
            return self.tuning_runs - len(self.tuning(outcomes)) + len(self.seeds)
        return len(self.jobs(outcomes))

    def row(self, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
        """What is known by now.

        Returns:
            `candidate`, `batch_size`; `tuning`: rate and score of each run of the search; `rate`: the chosen one, None
            while it is not; `at_edge`: it is the least or greatest of those tried; `top1` and `top5` of the finished
            runs by seed, their `mean` and `std` (of the sample; None of a single one), and how many `diverged`.
        """
        found, best = self.tuning(outcomes), self.best(outcomes)
        runs = [outcomes[job.name] for job in self.scored(outcomes) if job.name in outcomes]
        top1 = [run["top1"] for run in runs]
        return {
            "candidate": self.candidate.name,
            "batch_size": self.batch_size,
            "tuning": [
                {"rate": self.job(step, 0, tuning=True).rate, "top1": found[step]["top1"]} for step in sorted(found)
            ],
            "rate": None if best is None else self.job(best, 0, tuning=False).rate,
            "at_edge": bool(found) and best in (min(found), max(found)),
            "updates": next((run["updates"] for run in runs if run["updates"] is not None), None),
            "top1": top1,
            "top5": [run["top5"] for run in runs],
            "mean": statistics.fmean(top1) if top1 else None,
            "std": statistics.stdev(top1) if len(top1) > 1 else None,
            "diverged": sum(run["diverged"] for run in runs),
        }


def next_step(found: Mapping[int, Outcome], budget: int) -> int | None:
    """The next rate to try: uphill from the best so far, until `budget` runs, or until both its neighbours are worse.

    Args:
        found: outcomes, and whether they `learned`, by the step of their rate, whose logarithm is proportional to it.
        budget: how many runs there may be.

    Returns:
        A step that is not in `found`, or None.
    """
    if len(found) >= budget:
        return None
    if not found:
        return 0
    best = _best(found)
    return next((step for step in (best + 1, best - 1) if step not in found), None)


def _best(found: Mapping[int, Outcome]) -> int:
    """Of equal accuracies, and of those of guesses, the one of the lower loss; where all diverged the smallest rate."""

    def score(step: int) -> tuple[float, ...]:
        outcome = found[step]
        learned, loss = outcome["learned"], outcome["loss"]
        return (learned, outcome["top1"] if learned else 0.0, -loss if loss is not None else -math.inf, -step)

    return max(found, key=score)


def grid(
    candidates: Sequence[Candidate], batch_sizes: Sequence[int], tuning_runs: int, factor: float, seeds: Sequence[int]
) -> list[GridCell]:
    """All cells, those of small batches first, because their runs take longest."""
    return [
        GridCell(candidate, batch_size, tuning_runs, factor, tuple(seeds))
        for batch_size in sorted(batch_sizes)
        for candidate in candidates
    ]
