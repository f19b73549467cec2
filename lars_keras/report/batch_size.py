"""Propose settings for larger batches from a run that measured its noise scale.

    python -m lars_keras.report.batch_size RUN_DIR 1024 4096 16384

Reads the `noise_scale` lines of `RUN_DIR/metrics.jsonl`; a few hundred updates at a small batch are enough. For each
batch size it proposes a learning rate, and the epochs and updates in which the same loss can be expected. Its column
`progress` is how much an example contributes, relative to a very small batch, and `from` and `to` are the ends of its
95 % interval. A run whose noise hides the gradient has no proposal.

With noise scale `N`, and `gain = (1 + N / b) / (1 + N / B)` from batch `b` to batch `B`:

- Updates shrink by the gain, so epochs grow by `B / (b gain)`. Source: McCandlish et al. 2018, arXiv 1812.06162,
  equation 2.11; the gain is AdaScale's, Johnson et al. 2020, arXiv 2007.05105.
- The rate of SGD, with or without momentum, grows by the gain (equation 2.10).
- The rate of LARS grows by the square root of the gain. LARS divides by the norm of the gradient, which shrinks by the
  square root of the gain while the batch grows, so the rest comes by itself. LAMB and Adam divide by the root mean
  square of each element, which shrinks alike.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lars_keras.noise_scale import NoiseScale
from lars_keras.report.log import read_metrics
from lars_keras.report.noise import combine

CAVEATS = """\
The noise scale is a proxy derived for SGD. It starts small and grows while a network trains: measure it late in a run,
and expect a batch that is wasteful early. With batch normalization it holds for ghost batches of the same size."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Settings for one batch size.

    Attributes:
        batch_size: global batch size.
        efficiency: how much progress an example contributes, relative to a very small batch.
        interval: the ends of its 95 % interval.
        learning_rate: peak.
        epochs: length at which the same loss can be expected.
        updates: the same length.
        warmup_updates: the same fraction of the run as before.
    """

    batch_size: int
    efficiency: float
    interval: tuple[float, float]
    learning_rate: float
    epochs: float
    updates: int
    warmup_updates: int


def propose(
    found: NoiseScale,
    batch_sizes: Sequence[int],
    *,
    batch_size: int,
    learning_rate: float,
    updates: int,
    warmup_updates: int,
    num_train: int,
    normalized: bool,
) -> list[Proposal]:
    """Return settings for each of `batch_sizes`.

    Args:
        found: the noise scale of a run.
        batch_sizes: global batch sizes.
        batch_size: global batch size of the run.
        learning_rate: peak learning rate of the run.
        updates: number of updates of the run.
        warmup_updates: updates of its warm-up.
        num_train: examples of an epoch.
        normalized: True for the rate of LARS, LAMB or Adam, False for the rate of SGD.
    """
    low, high = (dataclasses.replace(found, value=end) for end in (found.low, found.high))
    proposals = []
    for batch in batch_sizes:
        gain = found.gain(batch_size, batch)
        needed = max(1, math.ceil(updates / gain))
        rate = learning_rate * (math.sqrt(gain) if normalized else gain)
        proposals.append(
            Proposal(
                batch,
                found.efficiency(batch),
                (low.efficiency(batch), high.efficiency(batch)),
                rate,
                needed * batch / num_train,
                needed,
                round(warmup_updates * needed / updates),
            )
        )
    return proposals


def propose_from_run(run_dir: Path, batch_sizes: Sequence[int]) -> tuple[list[str], list[Proposal]]:
    """Return the measurements of a run, as lines of text, and settings for `batch_sizes`.

    A run that was stopped counts with its planned length.

    Args:
        run_dir: folder of a run that logged its noise scale.
        batch_sizes: global batch sizes; if empty, powers of 2 around the noise scale.

    Raises:
        ValueError: if the folder has no such run, its lines are too few, it had several batch sizes, it was stopped
            in its warm-up, or no gradient stands out of the noise.
    """
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"`run_dir` must be a run folder, with a config.json. Received: run_dir={run_dir}")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    log = read_metrics(run_dir / "metrics.jsonl")
    events = [e for e in log if e["event"] == "noise_scale"]
    if len(events) < 2:
        raise ValueError(
            "The run needs at least 2 `noise_scale` lines in its metrics.jsonl: train with `noise_scale_every`. "
            f"Received: {len(events)} in {run_dir}"
        )
    sizes = sorted({config["batch_size"], *(e["batch_size"] for e in events)})
    if len(sizes) > 1:  # lengths and rates of both are mixed
        raise ValueError(f"The run needs one batch size from its start to its end. Received: {sizes} in {run_dir}")
    rates = {e["update"]: e["learning_rate"] for e in log if e["event"] == "update" and e["learning_rate"] is not None}
    if not rates:
        raise ValueError(f"The run needs the learning rates of its updates in its metrics.jsonl. Received: {run_dir}")
    late = events[-max(2, len(events) // 3) :]  # the noise scale grows, so the last third of the run speaks
    found, last, size = combine(late).total(), late[-1], config["batch_size"]
    peak, warmup = config.get("peak_learning_rate"), config.get("warmup_updates")
    if peak is None or warmup is None:  # of an earlier version: what the logged updates show
        peak = max(rates.values())
        reached = next(update for update, rate in rates.items() if rate >= (1 - 1e-6) * peak)  # but for rounding
        warmup = 0 if reached == next(iter(rates)) < log_length(log) else reached
    per_epoch = last["update"] / last["epoch"]
    updates = config.get("steps") or math.ceil(config.get("epochs", 0) * per_epoch - 1e-9) or log_length(log)
    if log_length(log) <= warmup and log_length(log) < updates:
        raise ValueError(f"The run needs an update after its warm-up. Received: {log_length(log)} updates in {run_dir}")
    if not math.isfinite(found.value):
        raise ValueError(f"{found.describe(size, last['epoch'], since=late[0]['epoch'])} Received: {run_dir}")
    lines = [f"  epoch {e['epoch']:6.2f}  noise scale {_text(e['noise_scale'])}" for e in events]
    lines += ["", found.describe(size, last["epoch"], since=late[0]["epoch"]), "", CAVEATS]
    if not batch_sizes:
        middle = round(math.log2(max(found.value, 4.0)))
        batch_sizes = [2**n for n in range(middle - 2, middle + 3)]
    return lines, propose(
        found,
        batch_sizes,
        batch_size=size,
        learning_rate=peak,
        updates=updates,
        warmup_updates=warmup,
        num_train=round(per_epoch * size),
        normalized=config["optimizer"] in ("lars", "lamb", "adam"),
    )


def log_length(log: Sequence[dict[str, Any]]) -> int:
    """Return the number of updates in a log."""
    return max(e["update"] for e in log if e["event"] == "update")


def table(proposals: Sequence[Proposal]) -> str:
    """Return proposals as a table of text."""
    head = f"{'batch':>8} {'progress':>8} {'from':>6} {'to':>6} {'rate':>8} {'epochs':>8} {'updates':>8}  warm-up"
    rows = [
        f"{p.batch_size:>8,} {100 * p.efficiency:>6.0f} % {100 * p.interval[0]:>4.0f} % {100 * p.interval[1]:>4.0f} % "
        f"{p.learning_rate:>8.4g} {p.epochs:>8.4g} {p.updates:>8,}  {p.warmup_updates} steps"
        for p in proposals
    ]
    return "\n".join([head, *rows])


def main(arguments: Sequence[str]) -> int:
    """Print proposals for the run folder and batch sizes in `arguments`, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lars_keras.report.batch_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that measured its noise scale")
    parser.add_argument(
        "batch_sizes", metavar="BATCH", type=_batch_size, nargs="*", help="default: powers of 2 around the noise scale"
    )
    options = parser.parse_args(arguments)
    try:
        lines, proposals = propose_from_run(options.run_dir, options.batch_sizes)
    except (ValueError, OSError) as e:
        print(f"batch_size: error: {e}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"\n{table(proposals)}")
    return 0


def _batch_size(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"Batch sizes must be whole numbers of at least 1. Received: {text}")
    return int(text)


def _text(value: float | None) -> str:
    return "no gradient stands out of the noise" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
