"""Measure the gradient noise scale over a training, beside the batch size from which a comparison loses.

    python -m tools.benchmarks.noise_scale digits cifar10 --data_dir=DIR --out=results/noise_scale.json

Each comparison in results/ is run once more: LARS at its smallest batch size, with the rate that the comparison chose,
split into 8 ghost batches. The noise scale of each eighth of the run goes to `--out`; docs/results.md shows it beside
the comparison's scores. Needs the data sets of the comparisons.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lars_keras.report.log import read_metrics
from running.renamed import flag_lines
from tools.committed import write_json

ROOT = Path(__file__).parents[2]
GHOST_BATCHES, LINES = 8, 8


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


def main() -> None:
    """Measure what is asked for, and put it in the place of what the file held of the same comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparisons", nargs="+", metavar="NAME", help="of results/compare_NAME.json")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", type=Path, required=True)
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


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
