"""What a comparison shows: a table for the terminal, a plot, and a page for a browser."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from lars_keras.files import atomic_write_text
from lars_keras.report.charts import GRID, inline_svg, svg_style
from lars_keras.report.html import PAGE, duration, section, table

Rows = Sequence[dict[str, Any]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
LIGHT = "#d8dde6"  # of the plot that stands alone; within the page it is the page's
MARKERS = "osD^vPX"


def score(row: dict[str, Any] | None, of: str = "top1") -> str:
    """Mean and spread of a cell in one phrase."""
    if not row or not row[of]:
        return "–"
    spread = f" ± {100 * statistics.stdev(row[of]):.2f}" if len(row[of]) > 1 else ""
    diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{100 * statistics.fmean(row[of]):.2f}{spread} %{diverged}"


def _arranged(rows: Rows) -> tuple[list[str], list[int], dict[tuple[str, int], dict[str, Any]]]:
    """The candidates and the batch sizes, each in their order, and the rows by both."""
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    by_cell = {(row["candidate"], row["batch_size"]): row for row in rows}
    return candidates, sorted({row["batch_size"] for row in rows}), by_cell


def text(rows: Rows) -> str:
    """Top-1 of every cell, batch sizes down and candidates across, as text."""
    candidates, batch_sizes, by_cell = _arranged(rows)
    lines = [["batch", *candidates]]
    lines += [[f"{b}", *(score(by_cell.get((c, b))) for c in candidates)] for b in batch_sizes]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def figure(rows: Rows, grid: str) -> Figure:
    """Top-1 against batch size, a line for each candidate, with the standard deviation over the seeds."""
    candidates, batch_sizes, by_cell = _arranged(rows)
    drawn = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    for i, candidate in enumerate(candidates):
        cells = [by_cell.get((candidate, b)) for b in batch_sizes]
        known = [row for row in cells if row and row["mean"] is not None]
        if not known:
            continue
        axes.errorbar(
            # Side by side, so that one does not hide another's spread.
            [row["batch_size"] * 1.03 ** (i - (len(candidates) - 1) / 2) for row in known],
            [row["mean"] for row in known],
            yerr=[row["std"] or 0.0 for row in known],
            label=candidate,
            color=COLOURS[i % len(COLOURS)],
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
    """Writes `compare.svg` and `compare.html` beside `compare.json`, whose contents `comparison` is."""
    rows = comparison["table"]
    candidates, batch_sizes, by_cell = _arranged(rows)
    drawn = figure(rows, LIGHT)
    with svg_style():
        drawn.set_facecolor("white")
        drawn.savefig(out / "compare.svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    top1, top5 = (
        table(
            ("batch", *candidates),
            [(f"{b:,}", *(score(by_cell.get((c, b)), of) for c in candidates)) for b in batch_sizes],
            numeric=True,
        )
        for of in ("top1", "top5")
    )
    with svg_style():
        plot = inline_svg(figure(rows, GRID), "Accuracy over batch size", f"Top-1 over batch size. {text(rows)}")
    tuning = table(
        ("candidate", "batch", "updates", "chosen rate", "at an end", "top-1 on the validation share, by rate"),
        [
            (
                row["candidate"],
                f"{row['batch_size']:,}",
                "–" if row["updates"] is None else f"{row['updates']:,}",
                "–" if row["rate"] is None else f"{row['rate']:g}",
                "yes" if row["at_edge"] else "",
                " · ".join(f"{t['rate']:g}: {100 * t['top1']:.2f} %" for t in row["tuning"]),
            )
            for row in rows
        ],
    )
    reports = " ".join(f'<a href="runs/{name}/report.html">{name}</a>' for name in sorted(comparison["runs"]))
    about = [(name, str(comparison[name])) for name in ("command", "machine", "commit", "left")]
    about += [("time", duration(comparison["wall_seconds"]))]
    about += [(name, str(value)) for name, value in comparison["settings"].items() if name != "candidates"]
    about += list(comparison["versions"].items())
    flags = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(lines)}</pre></details>"
        for name, lines in comparison["settings"]["candidates"].items()
    )
    note = (
        "Mean and standard deviation over the seeds, on the test split. The rates were chosen on a share of the "
        "training images, each by a search of the same budget; at an end: the best was the least or greatest tried. "
        "A run that diverged counts as 0 %."
    )
    state = "Finished." if not comparison["left"] else f"Unfinished: up to {comparison['left']} runs are left."
    page = PAGE.substitute(
        title=escape(comparison["title"]),
        status=state,
        sections="\n".join(
            [
                section("Top-1", f'<p class="note">{note}</p>\n{top1}'),
                section("Plot", f"<figure>{plot}</figure>"),
                section("Top-5", top5),
                section("Rates", tuning),
                section("Runs", f"<details><summary>{len(comparison['runs'])} reports</summary>{reports}</details>"),
                section("Flags", flags),
                section("About", table(("what", "value"), about)),
            ]
        ),
    )
    atomic_write_text(out / "compare.html", page)
