"""Jobs of a comparison as a pure function of the outcomes so far.

A cell of the grid chooses its rate by successive halving, with the same budget for every optimizer:

1. `tuning_runs` short runs, each a quarter of the length with a schedule of its own. Three rates, a factor apart, come
   first. While the best is at an end of the range, the range is extended by a factor. Then the gaps beside the best are
   halved, until the budget is spent. A rate at the end of the range is chosen only if the budget ends there.
2. The best quarter of them runs at full length. A finalist that diverges or is lost is replaced by the next.
3. The best finalist is trained on all training images, once per seed.

All jobs of a round are decided together, and a stopped comparison replays the rounds from its outcomes. So the table
depends neither on the order in which runs end nor on where the comparison was stopped.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.comparison.candidates import Candidate, Job, Outcome

HALVING = 4  # a short run is a quarter of the length; the best quarter of the rates goes on
MIN_UPDATES = 16  # of a short run, if no images were held out: fewer say nothing about a rate
RULE = f"successive halving, 1/{HALVING} of the length (at least {MIN_UPDATES} updates of all training images) first"
TUNING_SEED = 0

Outcomes = Mapping[str, Outcome]
Scores = dict[float, Outcome]  # by step: the logarithm of the rate over the first rate, in units of `factor`


@dataclasses.dataclass(frozen=True)
class Search:
    """State of the search of one cell.

    Args:
        short: outcomes of the short runs by step.
        full: outcomes of the finalists by step.
        steps: steps of the jobs to run now.
        stage: stage of those jobs.
        best: step of the chosen rate; None while the search goes on.
    """

    short: Scores
    full: Scores
    steps: Sequence[float] = ()
    stage: str = "short"
    best: float | None = None


@dataclasses.dataclass(frozen=True)
class GridCell:
    """One candidate at one batch size: runs that choose a rate, then a run for each seed with the chosen rate.

    Args:
        candidate, batch_size: place in the grid.
        tuning_runs: number of short runs that choose the rate; 0 keeps the candidate's own rate.
        factor: ratio of neighboring rates at first.
        seeds: seeds of the runs that count.
    """

    candidate: Candidate
    batch_size: int
    tuning_runs: int
    factor: float
    seeds: tuple[int, ...]

    @property
    def short_length(self) -> float:
        """Return the length of a short run: a quarter, or what `MIN_UPDATES` need."""
        return min(1.0, max(1 / HALVING, MIN_UPDATES / self.candidate.updates(self.batch_size)))

    @property
    def finalists(self) -> int:
        """Return how many rates are tried at full length; 0 if the short runs decide."""
        count = self.tuning_runs // HALVING
        return count if count > 1 and self.short_length < 1.0 else 0

    def job(self, step: float, stage: str, seed: int = TUNING_SEED) -> Job:
        """Return the job at a step of the search."""
        rate = self.candidate.rate(self.batch_size, self.factor**step)
        length = self.short_length if stage == "short" else 1.0
        return Job(self.candidate, self.batch_size, rate, seed, stage, length)

    def search(self, outcomes: Outcomes) -> Search:
        """Return the state of the search."""

        def outcome_of(stage: str) -> Callable[[float], Outcome | None]:
            def find(step: float) -> Outcome | None:
                outcome = outcomes.get(self.job(step, stage).name)
                return outcome and {**outcome, "beats_chance": self.candidate.beats_chance(outcome)}

            return find

        if not self.tuning_runs:
            return Search({}, {}, best=0.0)
        short, steps = try_rates(outcome_of("short"), self.tuning_runs)
        if steps:
            return Search(short, {}, steps)
        ranked = rank(short)
        if not self.finalists:
            return Search(short, {}, best=ranked[0])
        full, steps = try_finalists(outcome_of("tuning"), ranked, short, self.finalists)
        return Search(short, full, steps, "tuning", None if steps else best_step(full))

    def jobs(self, outcomes: Outcomes) -> list[Job]:
        """Return the jobs that can run now."""
        search = self.search(outcomes)
        if search.best is None:
            return [self.job(step, search.stage) for step in search.steps]
        scored = [self.job(search.best, "seed", seed) for seed in self.seeds]
        return [job for job in scored if job.name not in outcomes]

    def lengths_left(self, outcomes: Outcomes) -> list[float]:
        """Return the lengths of the runs that are left, replaced finalists not counted."""
        search = self.search(outcomes)
        if search.best is not None:
            return [job.length for job in self.jobs(outcomes)]
        short = self.tuning_runs - len(search.short)
        full = len(search.steps) if search.stage == "tuning" else self.finalists
        return [self.short_length] * short + [1.0] * (full + len(self.seeds))

    def row(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the results so far.

        Returns:
            `candidate`, `batch_size`; `tuning`: rate, length and score of each run of the search; `rate`: the chosen
            one, or None; `at_edge`: the chosen rate is the lowest or highest tried; `updates` and mean `minutes` of a
            run; `top1` and `top5` of the finished runs by seed, `mean` and `std` (of the sample; None for one) of
            top-1, and the number that `diverged`; `top1_views` and `top5_views` if runs are scored on several views.
        """
        search = self.search(outcomes)
        rate = None if search.best is None else self.job(search.best, "seed").rate
        jobs = [] if search.best is None else [self.job(search.best, "seed", seed) for seed in self.seeds]
        runs = [outcomes[job.name] for job in jobs if job.name in outcomes]
        top1 = [run["top1"] for run in runs]
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        views = {
            f"{of}_views": [run.get(f"{of}_views", run[of]) for run in runs]  # a run that diverged has none
            for of in ("top1", "top5")
            if any(f"{of}_views" in run for run in runs)
        }
        tuning = []
        for stage, scores in (("short", search.short), ("tuning", search.full)):
            for step in sorted(scores):
                job, outcome = self.job(step, stage), scores[step]
                state = "diverged" if outcome["diverged"] else "lost" if outcome.get("lost") else "finished"
                tuning.append({"rate": job.rate, "length": job.length, "top1": outcome["top1"], "state": state})
        return {
            "candidate": self.candidate.name,
            "batch_size": self.batch_size,
            "tuning": tuning,
            "rate": rate,
            "at_edge": bool(search.short) and search.best in (min(search.short), max(search.short)),
            "updates": next((run["updates"] for run in runs if run["updates"] is not None), None),
            "minutes": round(statistics.fmean(seconds) / 60, 2) if seconds else None,
            "top1": top1,
            "top5": [run["top5"] for run in runs],
            "mean": statistics.fmean(top1) if top1 else None,
            "std": statistics.stdev(top1) if len(top1) > 1 else None,
            "diverged": sum(run["diverged"] for run in runs),
            **views,
        }


@dataclasses.dataclass(frozen=True)
class ModeTrial:
    """Measure whether graph mode or XLA trains a network faster on this machine.

    Args:
        candidate, batch_size: network and batch that are timed.
    """

    candidate: Candidate
    batch_size: int

    @property
    def model(self) -> str:
        """Return the name of the network."""
        return self.candidate.config.model

    def _job(self, stage: str) -> Job:
        rate = self.candidate.rate(self.batch_size, 0.01)  # low, so it cannot diverge
        return Job(self.candidate, self.batch_size, rate, TUNING_SEED, stage)

    def jobs(self, outcomes: Outcomes) -> list[Job]:
        """Return the trials that are not finished."""
        return [job for job in map(self._job, ("xla", "graph")) if job.name not in outcomes]

    def faster(self, outcomes: Outcomes) -> str:
        """Return `"on"` if XLA was faster, else `"off"`, also if XLA failed; both trials must be finished."""
        xla, graph = (outcomes[self._job(stage).name]["images_per_second"] or 0.0 for stage in ("xla", "graph"))
        return "on" if xla > graph else "off"


def try_rates(outcome_of: Callable[[float], Outcome | None], budget: int) -> tuple[Scores, list[float]]:
    """Replay the short runs round by round.

    Args:
        outcome_of: returns the outcome at a step, with `beats_chance`; None if it is not known.
        budget: number of runs.

    Returns:
        The outcomes of all rounds so far, and the steps of the current round that are not finished.
    """
    found: Scores = {}
    while steps := next_round(found, budget):
        known = {step: outcome for step in steps if (outcome := outcome_of(step))}
        if len(known) < len(steps):
            return found | known, [step for step in steps if step not in known]
        found |= known
    return found, []


def next_round(found: Scores, budget: int) -> list[float]:
    """Return the next steps: three at first, then beyond the end at which the best is, then halves beside the best."""
    left = budget - len(found)
    if not found:
        return [0.0, 1.0, -1.0][:left]
    if left <= 0:
        return []
    best = best_step(found)
    lower = max((step for step in found if step < best), default=None)
    upper = min((step for step in found if step > best), default=None)
    if upper is None:
        return [best + 1.0]
    if lower is None:
        return [best - 1.0]
    better, worse = sorted((lower, upper), key=lambda step: _score(step, found[step]), reverse=True)
    return [(best + better) / 2, (best + worse) / 2][:left]


def rank(found: Scores) -> list[float]:
    """Return the steps that may be chosen, best first: all that beat chance, without ends of the range but the best."""
    ranked = sorted(found, key=lambda step: _score(step, found[step]), reverse=True)
    ends = (min(found), max(found))
    return ranked[:1] + [step for step in ranked[1:] if step not in ends and found[step]["beats_chance"]]


def try_finalists(
    outcome_of: Callable[[float], Outcome | None], ranked: Sequence[float], short: Scores, count: int
) -> tuple[Scores, list[float]]:
    """Replay the runs of full length.

    Args:
        outcome_of: returns the outcome at a step, with `beats_chance`; None if it is not known.
        ranked: steps by the scores of their short runs, best first.
        short: outcomes of the short runs.
        count: number of finalists.

    Returns:
        The outcomes so far, and the steps that are not finished. Each finalist that does not beat chance is replaced by
        the next of `ranked`, `count` times at most.
    """
    asked = list(ranked[:count])
    while True:
        full = {step: outcome for step in asked if (outcome := outcome_of(step))}
        if len(full) < len(asked):
            return full, [step for step in asked if step not in full]
        failed = sum(not outcome["beats_chance"] for outcome in full.values())
        more = list(ranked[: min(count + failed, 2 * count)])
        if len(more) == len(asked):
            return full, []
        asked = more


def best_step(found: Scores) -> float:
    """Return the step of the best score."""
    return max(found, key=lambda step: _score(step, found[step]))


def _score(step: float, outcome: Outcome) -> tuple[float, ...]:
    """Return the order of outcomes: top-1 above chance, else or if equal the lower loss, else the lower rate."""
    loss = outcome["loss"]
    known = loss is not None and math.isfinite(loss)
    return (
        outcome["beats_chance"],
        outcome["top1"] if outcome["beats_chance"] else 0.0,
        -loss if known else -math.inf,
        -step,
    )


def grid(
    candidates: Sequence[Candidate], batch_sizes: Sequence[int], tuning_runs: int, factor: float, seeds: Sequence[int]
) -> list[GridCell]:
    """Return all cells, small batches first, because their runs take longest."""
    return [
        GridCell(candidate, batch_size, tuning_runs, factor, tuple(seeds))
        for batch_size in sorted(batch_sizes)
        for candidate in candidates
    ]
