"""Candidates, jobs, and the flags of `train.py` that a job stands for."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flags import RunConfig
from lars_keras.schedules import linear_scaling, sqrt_scaling

Outcome = Mapping[str, Any]

# The rate at which a search begins; the scores lead it from there.
FIRST_RATES_BATCH = 256
FIRST_RATES = {"sgd": 0.1, "momentum": 0.02, "adam": 1e-3, "lamb": 5e-3, "lars": 2.5}
SCALINGS = {"sqrt": sqrt_scaling, "linear": linear_scaling, "none": lambda rate, *_: rate}

_CALL_EXAMPLES = 4096  # examples per host call: with fewer, small batches spend their time between updates
_TRIAL_CALLS = 4  # the first one compiles
_TRIAL_EXAMPLES = 1024


def beats_chance(top1: float, n: int, num_classes: int) -> bool:
    """Return True if top-1 on `n` images is above that of guesses, by two of their standard deviations."""
    chance = 1 / num_classes
    return top1 > chance + 2 * math.sqrt(chance * (1 - chance) / n)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer or a recipe that is compared.

    Args:
        name: name in tables.
        config: flags of its runs, except batch size, rate and seed.
        first_rate: rate at which the search begins at a batch of `first_batch_size`.
        first_batch_size: batch size that `first_rate` is meant for.
        scaling: name in `SCALINGS` of the rule that carries `first_rate` to other batch sizes.
        num_classes: classes of the data set.
        num_train: training images of the data set.
        fingerprint: that of the data set; empty if unknown.
    """

    name: str
    config: RunConfig
    first_rate: float
    first_batch_size: int
    scaling: str = "sqrt"
    num_classes: int = 10
    num_train: int = 50_000
    fingerprint: str = ""

    def rate(self, batch_size: int, factor: float) -> float:
        """Return `factor` times the first rate at a batch size, with four digits."""
        first = SCALINGS[self.scaling](self.first_rate, batch_size, self.first_batch_size)
        return float(f"{first * factor:.4g}")

    def updates(self, batch_size: int) -> int:
        """Return the updates of a run of full length on all training images."""
        return self.sized(batch_size).total_updates(self.num_train)

    def beats_chance(self, outcome: Outcome) -> bool:
        """Return True if a run scored more than guesses do, by two of their standard deviations."""
        if outcome["diverged"] or outcome.get("lost"):
            return False
        return beats_chance(outcome["top1"], outcome["n"], self.num_classes)

    def sized(self, batch_size: int) -> RunConfig:
        """Return the flags at a batch size, with a micro-batch that is no larger."""
        microbatch = self.config.microbatch_size
        return dataclasses.replace(
            self.config, batch_size=batch_size, microbatch_size=microbatch and min(microbatch, batch_size)
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Args:
        candidate, batch_size, rate, seed: what is trained.
        stage: `"short"` and `"tuning"` runs are scored on held-out training images, `"seed"` runs on the test split;
            `"xla"` and `"graph"` are trials of speed.
        length: fraction of the updates of a whole run.
    """

    candidate: Candidate
    batch_size: int
    rate: float
    seed: int
    stage: str = "seed"
    length: float = 1.0

    @property
    def name(self) -> str:
        """Return the name of the run folder."""
        return f"{self.candidate.name}-{self.batch_size}-rate{self.rate:.4g}-{self.stage}{self.seed}"

    @property
    def tuning(self) -> bool:
        """Return True for a run that chooses a rate."""
        return self.stage in ("short", "tuning")

    def config(self, run_dir: Path, validation_split: float, jit_compile: str | None = None) -> RunConfig:
        """Return the flags of the run.

        Args:
            run_dir: folder of the run.
            validation_split: fraction of the training images held out while rates are chosen.
            jit_compile: `"on"` or `"off"`; None keeps the recipe's.

        Raises:
            ValueError: if the flags contradict each other.
        """
        config = self.candidate.sized(self.batch_size)
        split = validation_split if self.tuning else 0.0
        calls = max(config.steps_per_execution, _CALL_EXAMPLES // self.batch_size, 1)
        changed: dict[str, Any] = {}
        images = round(self.candidate.num_train * (1 - split))
        warmup = config.warmup_updates(images)  # refuses one that is as long as the run
        if self.length < 1.0:
            steps = max(round(config.total_updates(images) * self.length), 1)
            changed = {"steps": steps, "warmup": f"{min(round(warmup * self.length), steps - 1)} steps"}
        if self.stage in ("xla", "graph"):
            jit_compile = "on" if self.stage == "xla" else "off"
            calls = max(_TRIAL_EXAMPLES // self.batch_size, 1)
            changed = {"steps": _TRIAL_CALLS * calls, "warmup": "0 steps"}
        return dataclasses.replace(
            config,
            learning_rate=self.rate,
            seed=self.seed,
            validation_split=split,
            run_dir=str(run_dir),
            jit_compile=jit_compile or config.jit_compile,
            steps_per_execution=calls,
            eval_every=10**6,  # at the end alone
            test_views=config.test_views if self.stage == "seed" else 1,  # rates are chosen by the plain score
            max_rollbacks=0,  # divergence is an outcome
            keep_checkpoints=1,
            **changed,
        )
