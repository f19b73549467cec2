"""Results of a comparison as a table for the terminal, a plot, and a page for a browser."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from lars_keras.files import atomic_write_text
from lars_keras.report.charts import GRID, inline_svg, svg_style
from lars_keras.report.html import duration, number, render
from tools.committed import save_svg

Rows = Sequence[dict[str, Any]]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
LIGHT = "#d8dde6"  # of the plot in a file of its own; the page has its own color
MARKERS = "osD^vPX"


def score(row: dict[str, Any] | None, of: str = "top1") -> str:
    """Return mean and standard deviation of a cell, as in `88.07 ± 3.76 %`."""
    if not row or not row.get(of):
        return "–"
    spread = f" ± {100 * statistics.stdev(row[of]):.2f}" if len(row[of]) > 1 else ""
    diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{100 * statistics.fmean(row[of]):.2f}{spread} %{diverged}"


def _arranged(rows: Rows) -> tuple[list[str], list[int], dict[tuple[str, int], dict[str, Any]]]:
    """Return the candidates and the batch sizes in order, and the rows by both."""
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    by_cell = {(row["candidate"], row["batch_size"]): row for row in rows}
    return candidates, sorted({row["batch_size"] for row in rows}), by_cell


def measures(rows: Rows) -> dict[str, str]:
    """Return the scores that a comparison has, by their names in a row: top-1, perhaps of several views, and top-5."""
    several = {f"top{k}_views": f"Top-{k} on several views of each image" for k in (1, 5)}
    found = {"top1": "Top-1", "top5": "Top-5"}
    return found | several if any(row.get("top1_views") for row in rows) else found


def text(rows: Rows) -> str:
    """Return top-1 of every cell as text, batch sizes down and candidates across."""
    candidates, batch_sizes, by_cell = _arranged(rows)
    lines = [["batch", *candidates]]
    lines += [[f"{b}", *(score(by_cell.get((c, b))) for c in candidates)] for b in batch_sizes]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def search_rule(settings: Mapping[str, Any]) -> str:
    """Return in words how the rates of a comparison were chosen."""
    runs, split = settings.get("tuning_runs", 0), f"{100 * settings.get('validation_split', 0):g} %"
    if not runs:
        return "those of the recipe"
    if not settings.get("search"):  # made by the earlier rule
        return f"the best of at most {runs} at full length, scored on {split} of the training images, held out"
    return f"chosen by {settings['search']}, {runs} rates per cell, scored on {split} of the training images, held out"


def overhead(runs: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the fraction of the time of whole runs that was not training; None if it is not known.

    Training is the time of the updates after the first host call, which compiles.
    """
    known = [run for run in runs.values() if run.get("wall_seconds") and run.get("training_seconds")]
    if not known:
        return None
    return 1 - sum(run["training_seconds"] for run in known) / sum(run["wall_seconds"] for run in known)


def _tried(tried: Mapping[str, Any]) -> str:
    """Return rate and score of a run of the search, as in `0.3: 61.20 %` or `0.3 at 0.25: lost`."""
    length = "" if tried.get("length", 1.0) == 1.0 else f" at {tried['length']:.2g}"
    state = tried.get("state", "finished")
    return f"{tried['rate']:g}{length}: " + (f"{100 * tried['top1']:.2f} %" if state == "finished" else state)


def figure(rows: Rows, grid: str) -> Figure:
    """Draw top-1 against batch size, a line for each candidate, with the standard deviation over the seeds."""
    candidates, batch_sizes, by_cell = _arranged(rows)
    drawn = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    for i, candidate in enumerate(candidates):
        cells = [by_cell.get((candidate, b)) for b in batch_sizes]
        known = [row for row in cells if row and row["mean"] is not None]
        if not known:
            continue
        axes.errorbar(
            # Side by side, so one does not hide the spread of another.
            [row["batch_size"] * 1.03 ** (i - (len(candidates) - 1) / 2) for row in known],
            [row["mean"] for row in known],
            yerr=[row["std"] or 0.0 for row in known],
            label=candidate,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.6,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch_sizes, [f"{b:,}" for b in batch_sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")
    axes.set_ylabel("top-1")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.grid(axis="y", color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(grid)
    if axes.has_data():
        drawn.legend(loc="outside upper left", ncols=5, frameon=False)
    return drawn


def write(out: Path, comparison: dict[str, Any]) -> None:
    """Write `compare.svg` and `compare.html` beside `compare.json`, whose contents `comparison` is."""
    rows, settings = comparison["table"], comparison["settings"]
    candidates, batch_sizes, by_cell = _arranged(rows)
    with svg_style():
        save_svg(figure(rows, LIGHT), out / "compare.svg")
        plot = inline_svg(figure(rows, GRID), "Accuracy over batch size", f"Top-1 over batch size. {text(rows)}")
    scores = {
        heading: [(f"{b:,}", *(score(by_cell.get((c, b)), of) for c in candidates)) for b in batch_sizes]
        for of, heading in measures(rows).items()
    }
    about = [(name, str(comparison[name])) for name in ("command", "machine", "commit", "left")]
    about.append(("time", duration(comparison["wall_seconds"])))
    if (fraction := overhead(comparison["runs"])) is not None:
        about.append(("start-up, compilation, evaluation", f"{100 * fraction:.1f} % of the time"))
    about += [(name, str(value)) for name, value in settings.items() if name not in ("candidates", "data")]
    if data := " and ".join(dict.fromkeys(settings.get("data", {}).values())):
        about.append(("data", data))
    page = render(
        Path(__file__).with_name("page.html"),
        title=comparison["title"],
        status="Finished." if not comparison["left"] else f"Unfinished: {comparison['left']} runs are left.",
        head=("batch", *candidates),
        scores=scores,
        plot=plot,
        rule=f"The rates are {search_rule(settings)}",
        rates=[_rates(row) for row in rows],
        # A run that was stopped as lost has no report.
        reports=[name for name in sorted(comparison["runs"]) if (out / "runs" / name / "report.html").exists()],
        candidates=settings["candidates"],
        about=[*about, *comparison["versions"].items()],
    )
    atomic_write_text(out / "compare.html", page)


def _rates(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table of rates."""
    return (
        row["candidate"],
        f"{row['batch_size']:,}",
        "–" if row["updates"] is None else f"{row['updates']:,}",
        number(row.get("minutes"), ".1f"),
        "–" if row["rate"] is None else f"{row['rate']:g}",
        "yes" if row["at_edge"] else "",
        " · ".join(map(_tried, row["tuning"])),
    )
