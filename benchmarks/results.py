"""Writes docs/results.md: every committed measurement as a table, from its JSON file in docs/.

python -m benchmarks.results
"""

import json
from pathlib import Path
from typing import Any

from comparison.page import score

DOCS = Path(__file__).parents[1] / "docs"
HEAD = """# Results

Written by `python -m benchmarks.results` from the JSON files beside it; the README quotes from here. Speeds are those
of 2 cores that other machines share: only ratios within one run say much.
"""
NOT_RUN = """## Not run

- Anything on a GPU or TPU.
- ImageNet to its end, at any batch size.
- CIFAR-10: `alexnet_small` at 256 to 16K, LARS against momentum; ResNet-18 with the settings of pytorch-lars (which
  reports 89.39, 85.45, 81.2, 73.41, 64.13 % at 64, 256, 1024, 4096, 16384) and with ours; polynomial against geometric
  decay (`--schedule=exponential` is there for it), accumulation against true batches.
- The speed of the update beside timm's, on JAX, and of a whole training step with LARS against one with SGD.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def comparison_part(found: dict[str, Any]) -> str:
    """A comparison of `compare.py`."""
    rows, settings = found["table"], found["settings"]
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    batch_sizes = sorted({row["batch_size"] for row in rows})
    by_cell = {(row["contender"], row["batch_size"]): row for row in rows}
    scores = [[f"{b:,}", *(score(by_cell[c, b]) for c in contenders)] for b in batch_sizes]
    rates = []
    for b in batch_sizes:
        cells = [by_cell[c, b] for c in contenders]
        chosen = ["–" if r["rate"] is None else f"{r['rate']:g}" + "*" * r["at_edge"] for r in cells]
        rates.append([f"{b:,}", *chosen])
    state = "" if not found["left"] else f" **Unfinished: up to {found['left']} runs are left.**"
    return (
        f"{found['title']}; n = {len(settings['seeds'])} seeds, mean ± standard deviation of top-1 on the test split."
        f"{state} "
        f"`{found['command']}`, {found['machine']}, {found['wall_seconds'] / 60:.0f} min, commit {found['commit']}.\n\n"
        + _table(["batch", *contenders], scores)
        + f"\nRates, each the best of at most {settings['tuning_runs']} on {settings['validation_share']:g} of the "
        "training images (* the least or greatest of those tried):\n\n" + _table(["batch", *contenders], rates)
    )


def optimizer_part(found: dict[str, Any]) -> str:
    """`benchmarks.optimizer_step`."""
    text = f"`python -m benchmarks.optimizer_step`, {found['machine']}, medians of {found['rounds']} rounds.\n"
    for title, result in found["results"].items():
        rows = [
            [
                row["name"],
                row["mode"],
                f"{row['milliseconds']:.1f}",
                f"{row['times_sgd']:.2f}",
                f"{row['milliseconds'] / row['floor_milliseconds']:.2f}",
                f"{row['extra_share_of_weights']:.1%}",
            ]
            for row in sorted(result["rows"], key=lambda row: row["milliseconds"])
        ]
        head = ["optimizer", "mode", "ms", "x SGD (XLA)", "x floor", "extra memory / weights"]
        text += (
            f"\n{title}, {result['parameters'] / 1e6:.1f}M parameters; memory {result['bandwidth'] / 1e9:.1f} GB/s\n\n"
        )
        text += _table(head, rows)
    return text


def other_part(found: dict[str, Any]) -> str:
    """Measurements of one figure each."""
    replicas, resume = found["replicas"]["rows"], found["resume"]
    rows = [
        [
            "reductions per update, all replicas and micro-batches",
            ", ".join(sorted({f"{r['reductions_per_update']:.2f}" for r in replicas if r["replicas"] > 1})),
            "`python -m benchmarks.replicas`",
        ],
        [
            "runs killed 20 times against one that was not, largest relative difference",
            ", ".join(f"{r['relative_difference']:g} ({r['flags'][0]})" for r in resume),
            "`make prove-resume`",
        ],
        [
            "feeding 3 epochs at batch 32,768, peak resident memory",
            f"{found['input_memory']['results']['gib_peak']:.2f} GiB",
            "`python -m benchmarks.input_pipeline --memory`",
        ],
        [
            "guard, norms, log and checkpoints against the bare loop, time",
            f"{found['overhead']['ratio']:.2f}",
            "`python -m benchmarks.overhead`",
        ],
    ]
    return _table(["what", "figure", "command"], rows)


def page() -> str:
    """The whole page."""

    def read(name: str) -> Any:
        return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))

    parts = [
        HEAD,
        "## Optimizers on handwritten digits\n\n![top-1 over batch size](compare_digits.svg)\n",
        comparison_part(read("compare_digits")),
        "## One update\n",
        optimizer_part(read("optimizer_step")),
        "## Exactness and memory\n",
        other_part({name: read(name) for name in ("replicas", "resume", "input_memory", "overhead")}),
        NOT_RUN,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(page(), encoding="utf-8")
