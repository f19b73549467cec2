"""Draw the figures of `tools.benchmarks.optimizer_step`."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lars_keras.report.charts import svg_style
from tools.committed import save_svg

FIRST_TICK = 10.0  # milliseconds, where the bars of the plot begin


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the milliseconds of every candidate as bars, a panel for each measurement."""
    tallest = max(len(r["rows"]) for r in results.values())
    down = math.ceil(len(results) / 2)
    with svg_style():
        figure = Figure(figsize=(11, down * (0.2 * tallest + 1)), layout="constrained")
        panels = figure.subplots(down, min(len(results), 2), squeeze=False, sharex=True).flat
        for axes, (title, result) in zip(panels, results.items(), strict=False):
            rows = sorted(result["rows"], key=lambda r: -r["milliseconds"])
            places = range(len(rows))
            colors = ["#d55e00" if "ours" in r["name"] else "#0072b2" for r in rows]
            times = [r["milliseconds"] for r in rows]
            axes.barh(places, [time - FIRST_TICK for time in times], left=FIRST_TICK, color=colors, height=0.7)
            for place, time in zip(places, times, strict=True):
                axes.annotate(f"{time:,.0f}", (time, place), (3, 0), textcoords="offset points", va="center", size=8)
            axes.plot([r["floor_milliseconds"] for r in rows], places, "k|", markersize=7, label="bandwidth bound")
            axes.set_yticks(places, [f"{r['name']}, {r['mode']}" for r in rows])
            axes.set_xscale("log")
            axes.set_xlim(FIRST_TICK, None)
            axes.set_title(title)
            axes.set_xlabel("milliseconds per update")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.margins(y=0.02)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", frameon=False)
    save_svg(figure, path)
