"""Writes docs/results.md: every committed measurement as a table, from its JSON file in results/.

python -m tools.benchmarks.results
"""

import json
from pathlib import Path
from typing import Any

from tools.comparison.page import score

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[2] / "results"
HEAD = """# Results

Written by `python -m tools.benchmarks.results` from the JSON files in results/; the README quotes from here. Speeds
are those of 2 cores that other machines share: only ratios within one run say much.
"""
# Name of the JSON file and of the flagfile, and heading.
COMPARISONS = {
    "compare_digits": "Optimizers on handwritten digits",
    "compare_cifar10": "LARS and momentum on CIFAR-10",
    "compare_questions": "Decay of the rate, and accumulation",
    "compare_systemds_digits": "The comparison of SystemDS on handwritten digits",
    "compare_systemds_cifar10": "The comparison of SystemDS on CIFAR-10",
    "compare_systemds_imagenet": "The comparison of SystemDS on ImageNet",
}
NOT_RUN = """## Not run

- Anything on a GPU or TPU.
- ImageNet to its end, at any batch size.
- The speed of the update beside timm's, and on JAX.
"""
# Test accuracy of ResNet-18 on CIFAR-10 after 200 epochs, in percent, that github.com/noahgolmant/pytorch-lars reports.
PYTORCH_LARS = {64: 89.39, 256: 85.45, 1024: 81.2, 4096: 73.41, 16384: 64.13}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def comparison_part(name: str, heading: str) -> str:
    """A comparison of `compare.py`, or that it was not run."""
    if not (RESULTS / f"{name}.json").exists():
        return f"## {heading}\n\nNot run: `python compare.py --flagfile=flags/recipes/{name}.flags`.\n"
    found = _read(name)
    rows, settings = found["table"], found["settings"]
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    batch_sizes = sorted({row["batch_size"] for row in rows})
    by_cell = {(row["candidate"], row["batch_size"]): row for row in rows}
    top1, top5 = (
        [[f"{b:,}", *(score(by_cell[c, b], of) for c in candidates)] for b in batch_sizes] for of in ("top1", "top5")
    )
    rates = []
    for b in batch_sizes:
        rates.append([f"{b:,}", *(_chosen(by_cell[c, b]) for c in candidates)])
    seeds = len(settings["seeds"])
    spread = f"n = {seeds} seeds, mean ± standard deviation of" if seeds > 1 else "n = 1 seed,"
    state = "" if not found["left"] else f" **Unfinished: up to {found['left']} runs are left.**"
    return (
        f"## {heading}\n\n![top-1 over batch size]({name}.svg)\n\n"
        f"{found['title']}; {spread} top-1 on the test split."
        f"{state} "
        f"`{found['command']}`, {found['machine']}, {found['wall_seconds'] / 60:.0f} min, commit {found['commit']}.\n\n"
        + _table(["batch", *candidates], top1)
        + "\nTop-5:\n\n"
        + _table(["batch", *candidates], top5)
        + f"\nRates, each the best of at most {settings['tuning_runs']} (* the least or greatest of those tried), and "
        f"the top-1 of that choice on {settings['validation_split']:g} of the training images:\n\n"
        + _table(["batch", *candidates], rates)
    )


def _chosen(row: dict[str, Any]) -> str:
    """The rate of a cell, and its score on the validation share where it was chosen by one."""
    if row["rate"] is None:
        return "–"
    scores = [f": {tried['top1']:.2%}".replace("%", " %") for tried in row["tuning"] if tried["rate"] == row["rate"]]
    return f"{row['rate']:g}" + "*" * row["at_edge"] + "".join(scores)


def pytorch_lars_part() -> str:
    """ResNet-18 on CIFAR-10: what pytorch-lars reports, what its settings give here, and what ours give."""
    columns = {"its settings here": "compare_pytorch_lars", "LARS, our settings": "compare_resnet18"}
    scores = {}
    for name in columns.values():
        rows = _read(name)["table"] if (RESULTS / f"{name}.json").exists() else []
        scores[name] = {row["batch_size"]: score(row) for row in rows if row["candidate"] == "lars"}
    lines = [
        [
            f"{batch_size:,}",
            f"{reported:.2f} %",
            *(scores[name].get(batch_size, "not run") for name in columns.values()),
        ]
        for batch_size, reported in PYTORCH_LARS.items()
    ]
    commands = ", ".join(f"`python compare.py --flagfile=flags/recipes/{name}.flags`" for name in columns.values())
    short = _read("compare_pytorch_lars_short")
    updates = [
        [f"{row['batch_size']:,}", f"{row['updates']:,}", score(row), score(row, "top5")] for row in short["table"]
    ]
    return (
        "## The experiment of pytorch-lars\n\nResNet-18 on CIFAR-10, 200 epochs, top-1 on the test split. "
        f"{commands}.\n\n"
        + _table(["batch", "reported by pytorch-lars", *columns], lines)
        + "\nIts settings for a sixth of an epoch, which says only that the recipe runs at each batch size: "
        f"`{short['command']}`, {short['machine']}, {short['wall_seconds'] / 60:.0f} min, commit {short['commit']}.\n\n"
        + _table(["batch", "updates", "top-1", "top-5"], updates)
    )


def optimizer_part(found: dict[str, Any]) -> str:
    """`tools.benchmarks.optimizer_step`."""
    text = f"`python -m tools.benchmarks.optimizer_step`, {found['machine']}, medians of {found['rounds']} rounds.\n"
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


def input_part(found: dict[str, Any]) -> str:
    """`tools.benchmarks.input_pipeline`."""
    settings, versions = found["settings"], found["versions"]
    text = (
        f"Real ImageNet JPEGs to {settings['size']} pixels, {versions['machine']}, {versions['cores']} cores, "
        f"medians of {settings['rounds']} rounds. `ms` is processor time for an image, and what the shares are of. "
        "`python -m tools.benchmarks.input_pipeline`.\n"
    )
    for kind, candidates in found["results"].items():
        rows = [
            [
                name,
                f"{row['images_per_second']:,.0f}",
                f"{row['ms']:.2f}",
                f"{row['of_decoder_by_ms']:.2f}",
                f"{row['of_decoder_and_resize_by_ms']:.2f}",
            ]
            for name, row in candidates.items()
        ]
        head = [kind, "images/s", "ms", "of the decoder alone", "of decoder and resize"]
        text += "\n" + _table(head, rows)
    return text


def other_part(found: dict[str, Any]) -> str:
    """Measurements of one figure each."""
    replicas, resume = found["replicas"]["rows"], found["resume"]
    (step,) = found["optimizer_training_step"]["results"].values()
    rows = [
        [
            "a training step of `alexnet_bn` with LARS against one with Keras SGD+momentum, time",
            f"{step['lars_over_sgd']:.3f}",
            f"`python -m tools.benchmarks.optimizer_step --step_batch={step['batch_size']}`",
        ],
        [
            "the same with telemetry of every update against one without",
            f"{step['telemetry_over_none']:.3f}",
            f"`python -m tools.benchmarks.optimizer_step --step_batch={step['batch_size']}`",
        ],
        [
            "reductions per update, all replicas and micro-batches",
            ", ".join(sorted({f"{r['reductions_per_update']:.2f}" for r in replicas if r["replicas"] > 1})),
            "`python -m tools.benchmarks.replicas`",
        ],
        [
            "runs killed 20 times against one that was not, largest relative difference",
            ", ".join(f"{r['relative_difference']:g} ({r['flags'][0]})" for r in resume),
            "`make prove-resume`",
        ],
        [
            "on JAX, runs killed 8 times against one that was not, largest relative difference",
            ", ".join(f"{r['relative_difference']:g} ({' '.join(r['flags'][:-1])})" for r in found["resume_jax"]),
            "`KERAS_BACKEND=jax python -m tools.kill_and_resume --kills=8 --steps=60`",
        ],
        [
            "feeding 3 epochs at batch 32,768, peak resident memory",
            f"{found['input_memory']['results']['gib_peak']:.2f} GiB",
            "`python -m tools.benchmarks.input_pipeline --memory`",
        ],
        [
            "guard, norms, log and checkpoints against the bare loop, time",
            f"{found['overhead']['ratio']:.2f}",
            "`python -m tools.benchmarks.overhead`",
        ],
    ]
    return _table(["what", "figure", "command"], rows)


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *(comparison_part(name, heading) for name, heading in COMPARISONS.items()),
        pytorch_lars_part(),
        "## One update\n",
        optimizer_part(_read("optimizer_step")),
        "## Input\n",
        input_part(_read("input_pipeline")),
        "## Steps, exactness and memory\n",
        other_part(
            {
                name: _read(name)
                for name in ("optimizer_training_step", "replicas", "resume", "resume_jax", "input_memory", "overhead")
            }
        ),
        NOT_RUN,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(page(), encoding="utf-8")
