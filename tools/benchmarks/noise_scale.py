"""Measure the gradient noise scale over a training, beside the batch size from which a comparison loses.

    python -m tools.benchmarks.noise_scale digits cifar10 --data_dir=DIR --out=results/noise_scale.json
    python -m tools.benchmarks.noise_scale --out=results/noise_scale.json --plot=docs/noise_scale.svg

Each comparison in results/ is run once more: LARS at its smallest batch size, with the rate that the comparison chose,
split into 8 ghost batches. The noise scale of each eighth of the run goes to `--out`; docs/results.md shows it beside
the comparison's scores. Needs the data sets of the comparisons. The second command draws what the file holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lars_keras.report.charts import svg_style
from lars_keras.report.log import read_metrics
from running.renamed import flag_lines
from tools.committed import save_svg, write_json

ROOT = Path(__file__).parents[2]
GHOST_BATCHES, LINES = 8, 8
NAMES = {"digits": "handwritten digits", "cifar10": "CIFAR-10, small AlexNet"}


def measured_run(name: str, data_dir: str | None, folder: Path) -> dict[str, Any]:
    """Train once and return its settings and the noise scale of each part of the run.

    Args:
        name: of the comparison in results/.
        data_dir: of its data set.
        folder: for the run.
    """
    found = json.loads((ROOT / "results" / f"compare_{name}.json").read_text(encoding="utf-8"))
    row = min((r for r in found["table"] if r["candidate"] == "lars"), key=lambda r: r["batch_size"])
    own = {
        "batch_size": row["batch_size"],
        "microbatch_size": row["batch_size"] // GHOST_BATCHES,
        "learning_rate": row["rate"],
        "noise_scale_every": row["updates"] // LINES,
        "jit_compile": "off",
        "run_dir": folder / name,
    }
    recipe = flag_lines(found["settings"]["candidates"]["lars"].splitlines())
    kept = [line for line in recipe if line.removeprefix("--").partition("=")[0] not in own]
    command = [*kept, *(f"--{flag}={value}" for flag, value in own.items())]
    if data_dir:
        command.append(f"--data_dir={data_dir}")
    subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, check=True)
    lines = [e for e in read_metrics(folder / name / "metrics.jsonl") if e["event"] == "noise_scale"]
    result = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
    return {
        "comparison": name,
        **{key: own[key] for key in ("batch_size", "microbatch_size", "learning_rate")},
        "top1": round(result["top1"], 4),
        "parts": [
            {"epoch": round(e["epoch"], 3), **{key: _rounded(e[key]) for key in ("noise_scale", "low", "high")}}
            for e in lines
        ],
    }


def _rounded(value: float | None) -> float | None:
    """Return three digits of a noise scale; None is infinite."""
    return None if value is None else float(f"{value:.3g}")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the noise scale of each run over its epochs, with the interval, and lines at three batch sizes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with svg_style():
        figure = Figure(figsize=(7.5, 3.6), layout="constrained", facecolor="white")
        axes = figure.add_subplot(facecolor="white")
        for batch in (64, 1024, 8192):
            axes.axhline(batch, color="#8a94a3", linewidth=0.9, linestyle="--")
            axes.annotate(f"batch {batch:,}", (4.06, batch), color="#5b6675", va="center", annotation_clip=False)
        for run, colour in zip(runs, ("#2166ac", "#c4500c"), strict=True):
            epochs, values, low, high = (
                [part[key] or 1e9 for part in run["parts"]] for key in ("epoch", "noise_scale", "low", "high")
            )
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, values, color=colour, marker="o", markersize=4, label=NAMES[run["comparison"]])
        axes.set_yscale("log")
        axes.set_ylim(40, 16000)
        axes.set_xlim(0.3, 4.05)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("epoch of 4", color="black")
        axes.set_ylabel("noise scale, in examples", color="black")
        axes.tick_params(labelcolor="black")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside upper left", ncols=2, labelcolor="black")
    save_svg(figure, path)


def main() -> None:
    """Measure what is asked for, and put it in the place of what the file held of the same comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparisons", nargs="*", metavar="NAME", help="of results/compare_NAME.json")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="SVG file to draw all runs into")
    args = parser.parse_args()
    held = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.exists() else []
    runs = {run["comparison"]: run for run in held}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.comparisons:
            runs[name] = measured_run(name, args.data_dir, Path(folder))
            for part in runs[name]["parts"]:
                interval = f"{part['low']} to {part['high']}"
                print(f"{name}  epoch {part['epoch']:g}  noise scale {part['noise_scale']} ({interval})")
            write_json(
                args.out,
                {"command": f"python -m {__spec__.name} {' '.join(runs)} --data_dir=DIR", "runs": [*runs.values()]},
            )
    if args.plot:
        draw([*runs.values()], args.plot)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
