"""Compile the JAX update of two networks for slices of growing size: the figures of docs/pod.md.

    KERAS_BACKEND=jax python -m tools.benchmarks.pod_scaling --out=results/pod_scaling.json --plot=docs/pod_scaling.svg

Takes about an hour on two idle cores. Each point is written as soon as it is compiled, and a file that is there is
completed: remove it when the update has changed. Prints the table of docs/pod.md.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from lars_keras.pod.chips import chip_of
from lars_keras.pod.roofline import roofline
from lars_keras.report.charts import svg_style
from lars_keras.versions import versions
from tools.committed import save_svg, write_json

TOPOLOGIES = {1: "v5e:1x1", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
RECIPES = {"alexnet_bn": ("8k", "16k", "32k"), "resnet50": ("32k", "32k", "32k")}  # of one micro-batch at all sizes
BATCHES = (8192, 16384, 32768)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/pod_scaling.json", help="JSON file to complete")
    parser.add_argument("--plot", help="SVG file to draw it into")
    parser.add_argument("--draw_only", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"points": []}
    if not options.draw_only:
        _complete(found, out)
    print(table(found["points"]))
    if options.plot:
        draw(found["points"], options.plot)
    return 0


def _complete(found: dict[str, Any], out: Path) -> None:
    from lars_keras.pod.worker import PACKAGES

    known: dict[Any, Any] = {}  # program of a model's micro-batch: the same on slices of any size
    done = {(p["model"], p["batch"], p["chips"]) for p in found["points"]}
    for model in RECIPES:
        for chips in (256, 1, 16, 64):
            for batch in reversed(BATCHES):
                if (model, batch, chips) not in done:
                    found["points"].append(_point(model, batch, chips, known))
                    found["versions"] = versions(PACKAGES)
                    found["points"].sort(key=lambda p: (p["model"], p["batch"], p["chips"]))
                    write_json(out, found)


def _point(model: str, batch: int, chips: int, known: dict[Any, Any]) -> dict[str, Any]:
    from lars_keras.pod.batch import parse_batch
    from lars_keras.pod.jax_programs import jax_programs
    from lars_keras.pod.worker import devices_of
    from lars_keras.training.trainer import split_batch
    from tools import pod_recipe

    recipe = f"--flagfile=flags/recipes/{model}_{RECIPES[model][BATCHES.index(batch)]}.flags"
    config = pod_recipe.read_config([recipe, f"--batch_size={batch}", "--shard_optimizer_state"])
    devices = devices_of(TOPOLOGIES[chips])
    size, k = split_batch(batch, len(devices), config.microbatch_size)
    programs = jax_programs(
        pod_recipe.recipe_model(config),
        parse_batch(pod_recipe.batch_spec(config)),
        devices,
        size,
        k,
        shard_optimizer_state=True,
        variable_norms=True,
        known_accumulate=known.get((model, size)),
    )
    if k > 1:
        known[model, size] = programs[1]
    bounds = roofline(programs, chip_of(TOPOLOGIES[chips]), 1, batch)
    hours = bounds.seconds_per_update * pod_recipe.updates_of(config) / 3600
    return {
        "model": model,
        "batch": batch,
        "chips": chips,
        "topology": TOPOLOGIES[chips],
        "microbatch_size": size,
        "accumulation_steps": k,
        "memory": max(p.memory for p in programs),
        "roofline": {**dataclasses.asdict(bounds), "hours": hours},
        "programs": [dataclasses.asdict(p) for p in programs],
    }


def table(points: list[dict[str, Any]]) -> str:
    """Return the points in Markdown. Efficiency is images/s of a chip, relative to one chip at the same batch."""
    alone = {(p["model"], p["batch"]): p["roofline"]["images_per_second"] for p in points if p["chips"] == 1}
    lines = [
        "| network | batch | chips | on a chip | memory, MiB | compute, ms | HBM, ms | links, ms | bound by | images/s "
        "| efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        best = p["roofline"]
        milliseconds = [f"{1e3 * best['seconds'][kind]:,.2f}" for kind in ("compute", "memory", "interconnect")]
        one = alone.get((p["model"], p["batch"]))
        cells = [
            p["model"],
            f"{p['batch']:,}",
            str(p["chips"]),
            f"{p['accumulation_steps']} x {p['microbatch_size']}",
            f"{p['memory'] / 2**20:,.0f}",
            *milliseconds,
            {"memory": "HBM", "interconnect": "links"}.get(best["bound"], best["bound"]),
            f"{best['images_per_second']:,.0f}",
            f"{best['images_per_second'] / p['chips'] / one:.0%}" if one else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(points: list[dict[str, Any]], path: str) -> None:
    """Draw the time of an update, and the speed and memory of a chip, over the number of chips."""
    from matplotlib.figure import Figure

    with svg_style():
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        axes = figure.subplots(3, len(RECIPES), sharex=True, squeeze=False)
        for column, model in enumerate(RECIPES):
            for batch in BATCHES:
                own = sorted(
                    (p for p in points if (p["model"], p["batch"]) == (model, batch)), key=lambda p: p["chips"]
                )
                chips = [p["chips"] for p in own]
                best = [p["roofline"] for p in own]
                rows = (
                    [1e3 * b["seconds_per_update"] for b in best],
                    [b["images_per_second"] / n for b, n in zip(best, chips, strict=True)],
                    [p["memory"] / 2**20 for p in own],
                )
                for row, values in zip(axes[:, column], rows, strict=True):
                    row.plot(chips, values, marker="o", label=f"batch {batch:,}")
            top, *rest = axes[:, column]
            top.set_title(model)
            top.set_yscale("log")
            top.yaxis.set_major_formatter("{x:g}")
            top.legend(frameon=False)
            for row in rest:
                row.set_ylim(bottom=0)
                row.yaxis.set_major_formatter("{x:,.0f}")
            rest[-1].set_xscale("log", base=2)
            rest[-1].set_xticks(list(TOPOLOGIES), [str(chips) for chips in TOPOLOGIES])
            rest[-1].set_xlabel("chips of v5e")
        for row, label in zip(
            axes[:, 0], ("ms per update, at best", "images/s per chip, at best", "MiB per chip"), strict=True
        ):
            row.set_ylabel(label)
    save_svg(figure, Path(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
