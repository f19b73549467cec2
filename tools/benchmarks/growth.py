"""Time how the cost of an update grows with variables, parameters and micro-batches.

    python -m tools.benchmarks.growth --out=results/growth.json --plot=docs/growth.svg

- "variables": LARS's update of 10 million parameters in more and more variables.
- "parameters": LARS's update of 100 variables with more and more parameters.
- "host": an update by `Trainer` of a chain of small Dense layers, where the host's work is all, over its variables.
- "micro-batches": an update by `Trainer` at a fixed batch, cut into more and more micro-batches.

The sizes of a part take turns within a round, and figures are medians over the rounds. The slope of a part is that of a
straight line through the logarithms of its last three points: 1 means that the cost doubles with the size.
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import logging
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import models
from lars_keras import LARS
from lars_keras.report.charts import svg_style
from lars_keras.training import Trainer
from lars_keras.versions import versions
from tools.benchmarks.host_time import chain
from tools.benchmarks.optimizer_step import BACKEND, Candidate, jax_candidates, take_turns, tensorflow_candidates
from tools.committed import save_svg, write_json

SIZES = {
    "variables": (10, 30, 100, 300, 1000),
    "parameters": (10**6, 10**7, 10**8, 10**9),
    "host": (10, 30, 100, 300, 1000),
    "micro-batches": (1, 2, 4, 8, 16, 32, 64),
}
BATCH = 512
STEPS = {"host": 40, "micro-batches": 10}  # of a call of `fit`
PACKAGES = ("keras", "tensorflow", "tensorflow-cpu", "jax", "numpy")


def update(variables: int, parameters: int) -> Candidate:
    """Return LARS's update of matrices of equal size, compiled."""
    side = max(parameters // variables // 64, 1)
    weights = [np.full((side, 64), 0.02, "float32")] * variables
    make = jax_candidates if BACKEND == "jax" else tensorflow_candidates
    found = make(weights, weights, "float32", ["LARS (ours)"])
    return next(candidate for candidate in found if candidate.mode in ("xla", "jit"))


def host(variables: int) -> Candidate:
    """Return an update of `Trainer` whose arithmetic costs next to nothing."""
    return _trained(chain(variables // 2), 8, 8, STEPS["host"], "mse")


def microbatches(count: int) -> Candidate:
    """Return an update of `Trainer` at a fixed batch, in `count` micro-batches."""
    model = models.get("lenet1989", num_classes=10, input_shape=(16, 16, 1), seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return _trained(model, BATCH, BATCH // count, STEPS["micro-batches"], loss)


def _trained(model: keras.Model, batch: int, microbatch: int, steps: int, loss: Any) -> Candidate:
    x = np.zeros((batch * steps, *model.input_shape[1:]), model.inputs[0].dtype)
    y = np.zeros((batch * steps, *([] if model.output_shape[-1] == 10 else model.output_shape[1:])), "int32")
    model.compile(LARS(0.1), loss)
    trainer = Trainer(model, batch_size=batch, microbatch_size=microbatch)
    return Candidate("", "", "", lambda: trainer.fit(x, y, shuffle=False, verbose=0))


PARTS: dict[str, tuple[Callable[[int], Candidate], int, str]] = {
    "variables": (lambda n: update(n, 10**7), 1, "variables of an update of 10 million parameters"),
    "parameters": (lambda n: update(100, n), 1, "parameters of an update of 100 variables"),
    "host": (host, STEPS["host"], "variables of a network without arithmetic"),
    "micro-batches": (microbatches, STEPS["micro-batches"], f"micro-batches of an update of {BATCH} examples"),
}


def measure(part: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of an update at each size, and the slope at the end."""
    make, updates, axis = PARTS[part]
    times = take_turns([make(size) for size in sizes], rounds)
    rows = [
        {"size": size, "ms": round(1e3 * median(seconds) / updates, 3)}
        for size, seconds in zip(sizes, times, strict=True)
    ]
    return {"axis": axis, "rows": rows, "slope": round(slope(rows[-3:]), 2)}


def slope(rows: Sequence[dict[str, Any]]) -> float:
    """Return the slope of the line through the logarithms of size and milliseconds."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("size", "ms"))
    return float(np.polyfit(x, y, 1)[0])


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw milliseconds over size, a panel for each part."""
    with svg_style():
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, math.ceil(len(results) / 2), squeeze=False).flat
        for axes, result in zip(panels, results.values(), strict=False):
            axes.plot([r["size"] for r in result["rows"]], [r["ms"] for r in result["rows"]], "o-", color="#d55e00")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(1, None)
            axes.set_title(f"slope {result['slope']:.2f}", size=10)
            axes.set_xlabel(result["axis"])
            axes.set_ylabel("milliseconds per update")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)


def main() -> None:
    """Measure, print, draw and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--most", type=int, default=10**9, help="parameters; a billion take 12 GB of memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the results; other parts stay")
    parser.add_argument("--plot", type=Path, help="SVG file of the results")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    results = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
    for part in args.parts.split(","):
        sizes = [size for size in SIZES[part] if part != "parameters" or size <= args.most]
        results[part] = measure(part, sizes, args.rounds)
        print(part, json.dumps(results[part]), flush=True)
        if args.out:
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            about = {"backend": BACKEND, "machine": machine, "rounds": args.rounds, "versions": versions(PACKAGES)}
            write_json(args.out, about | {"results": results})
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
