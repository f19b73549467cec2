"""Measure the gradient noise scale over a training, beside the batch size from which a comparison loses.

    python -m tools.benchmarks.noise_scale digits cifar10 --data_dir=DIR --out=results/noise_scale.json

Each comparison in results/ is run once more: LARS at its smallest batch size, with the rate that the comparison chose,
split into 8 ghost batches. The noise scale of each eighth of the run goes to `--out`; docs/results.md shows it beside
the comparison's scores. Needs the data sets of the comparisons.

`--run_dir=RUN --recipe=NAME` adds a run of flags/recipes/NAME.flags that was trained with `--noise_scale_every`.
`--plot=docs/noise_scale.svg` draws every run of the file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lars_keras.report.charts import svg_style
from lars_keras.report.log import read_metrics
from running.renamed import flag_lines
from tools.committed import save_svg, write_json

ROOT = Path(__file__).parents[2]
GHOST_BATCHES, LINES = 8, 8
TITLES = {
    "digits": "Digits",
    "cifar10": "CIFAR-10, small AlexNet",
    "cifar10_fast": "CIFAR-10, narrow fast network",
    "cifar10_fast_4k": "CIFAR-10, fast network",
}


def measured_run(name: str, data_dir: str | None, folder: Path) -> dict[str, Any]:
    """Train once and return its settings and the noise scale of each part of the run.

    Args:
        name: name of the comparison in results/.
        data_dir: folder of its data set.
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
    return {"comparison": name, **read_run(folder / name)}


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return the settings and noise scales of a finished run.

    Args:
        run_dir: folder of a run with `--noise_scale_every`.
    """
    config, result = (json.loads((run_dir / f"{n}.json").read_text(encoding="utf-8")) for n in ("config", "results"))
    lines = [e for e in read_metrics(run_dir / "metrics.jsonl") if e["event"] == "noise_scale"]
    return {
        **{key: config[key] for key in ("batch_size", "microbatch_size", "learning_rate")},
        "top1": round(result["top1"], 4),
        "parts": [
            {"epoch": round(e["epoch"], 3), **{key: _rounded(e[key]) for key in ("noise_scale", "low", "high")}}
            for e in lines
        ],
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the noise scale over training, with its interval; an interval without an upper end leaves the picture.

    Args:
        runs: runs of the results file.
        path: SVG file.
    """
    with svg_style():
        figure = Figure(figsize=(3.2 * len(runs), 3), layout="constrained")
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False).flat, runs, strict=True):
            parts = [p for p in run["parts"] if p["noise_scale"] is not None]
            epochs = [p["epoch"] for p in parts]
            highest = 10 * max(p["noise_scale"] for p in parts)
            low = [p["low"] for p in parts]
            high = [highest if p["high"] is None else p["high"] for p in parts]
            axes.fill_between(epochs, low, high, alpha=0.25, linewidth=0)
            axes.plot(epochs, [p["noise_scale"] for p in parts], marker=".")
            axes.axhline(run["batch_size"], color="gray", linestyle=":")
            axes.set_title(
                f"{TITLES.get(run['comparison'], run['comparison'])}\n(dotted: its batch, {run['batch_size']:,})",
                fontsize=9,
            )
            axes.set_yscale("log")
            axes.set_ylim(min(low) / 2, highest / 3)
            axes.set_xlabel("epoch")
            axes.set_ylabel("noise scale, examples")
    save_svg(figure, path)


def _rounded(value: float | None) -> float | None:
    """Return three digits of a noise scale; None is infinite."""
    return None if value is None else float(f"{value:.3g}")


def main() -> None:
    """Run the measurements that are asked for, and replace those of the same comparisons in the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparisons", nargs="*", metavar="NAME", help="of results/compare_NAME.json")
    parser.add_argument("--data_dir")
    parser.add_argument("--run_dir", type=Path, help="a finished run to add")
    parser.add_argument("--recipe", help="of --run_dir, for its place in the file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="SVG file of the results")
    args = parser.parse_args()
    if (args.run_dir is None) != (args.recipe is None):
        parser.error(f"--run_dir and --recipe go together. Received: {args.run_dir} and {args.recipe}")
    held = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.exists() else []
    runs = {run["comparison"]: run for run in held}
    if args.run_dir:
        runs[args.recipe] = {"comparison": args.recipe, **read_run(args.run_dir)}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.comparisons:
            runs[name] = measured_run(name, args.data_dir, Path(folder))
            for part in runs[name]["parts"]:
                interval = f"{part['low']} to {part['high']}"
                print(f"{name}  epoch {part['epoch']:g}  noise scale {part['noise_scale']} ({interval})")
    again = [name for name in runs if (ROOT / "results" / f"compare_{name}.json").exists()]
    command = f"python -m {__spec__.name} {' '.join(again)} --data_dir=DIR"
    write_json(args.out, {"command": command, "runs": [*runs.values()]})
    if args.plot:
        plot([*runs.values()], args.plot)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
