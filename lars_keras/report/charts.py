"""Charts of a page as inline SVG: curves over updates, heat maps over layers and updates."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from lars_keras.report.html import number
from lars_keras.report.layers import as_array

# Colors in the SVG stand for CSS variables of the page, which follow the system's light or dark setting.
INK, GRID, TRAIN, VALIDATION = "#000001", "#000002", "#000003", "#000004"
CSS_VARIABLES = {INK: "muted", GRID: "line", TRAIN: "train", VALIDATION: "validation"}
COLUMNS = 240  # of a heat map

Events = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Attributes:
        title: unique on the page.
        svg: the picture; empty if there is nothing to draw.
        note: what is missing.
    """

    title: str
    svg: Markup = Markup()
    note: str = ""


def svg_style() -> contextlib.AbstractContextManager:
    """Return a context with matplotlib's settings for a page."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lars_keras",  # ids, too, are the same each time
        "font.size": 9.5,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
        **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), INK),
    }
    return matplotlib.rc_context(style)


def inline_svg(figure: Figure, title: str, label: str) -> Markup:
    """Return a figure as an SVG element in the colors of the page.

    Args:
        figure: drawn under `svg_style`.
        title: unique on the page; it makes the element's ids unique.
        label: text for readers who cannot see the picture.
    """
    out = io.StringIO()
    with svg_style():
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    name = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in CSS_VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib writes a viewBox"
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {box[0]}>' + svg[svg.index(">") + 1 :])


def heat_maps(events: Events, layers: Sequence[dict[str, Any]]) -> list[Chart]:
    """Draw the telemetry of the layers.

    Args:
        events: `layers` events of a log, at least one.
        layers: rows of the layer plan.
    """
    updates = np.array([e["update"] for e in events])
    paths = [layer["path"] for layer in layers]
    adapted = [i for i, layer in enumerate(layers) if layer["adapt"]]
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient_over_weight = as_array(events, "gradient_norm") / as_array(events, "weight_norm")
    return [
        _heat_map("Trust ratio", updates, as_array(events, "ratio")[:, adapted], [paths[i] for i in adapted]),
        _heat_map("Effective rate", updates, as_array(events, "rate"), paths),
        _heat_map("Gradient norm over weight norm", updates, gradient_over_weight, paths),
    ]


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A line of a chart. `x` are updates; `y` is NaN where a value is missing."""

    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False

    @classmethod
    def of(cls, label: str, color: str, events: Events, name: str, **kwargs: Any) -> "_Curve":
        x = np.array([e["update"] for e in events], dtype=float)
        y = np.array([e.get(name) for e in events], dtype=float)  # null becomes NaN
        return cls(label, color, x, y, **kwargs)

    @property
    def points(self) -> int:
        return int(np.isfinite(self.y).sum())

    def alone(self) -> list[int]:
        """Return the indices of points without a neighbor."""
        there = np.pad(np.isfinite(self.y), 1)
        return np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()


def curves(updates: Events, evals: Events, scored: str) -> list[Chart]:
    """Draw loss, top-1, top-5 and learning rate over updates.

    Args:
        updates: `update` events of a log: the last update of each call of the training function.
        evals: `eval` events of a log.
        scored: name of the images that they score.
    """
    window = len(updates) // 50
    loss = [_Curve.of("training, each logged update", TRAIN, updates, "step_loss", faint=window > 1)]
    if window > 1:
        x, y = (_running_mean(v, window) for v in (loss[0].x, loss[0].y))
        loss.append(_Curve(f"training, mean of {window} logged updates", TRAIN, x, y))
    charts = [_chart("Loss", [*loss, _Curve.of(scored, VALIDATION, evals, "loss")])]
    for title, name in (("Top-1", "top1"), ("Top-5", "top5")):
        training = _Curve.of("training, since the epoch began", TRAIN, updates, name)
        charts.append(_chart(title, [training, _Curve.of(scored, VALIDATION, evals, name)], percent=True))
    return [*charts, _chart("Learning rate", [_Curve.of("of each logged update", TRAIN, updates, "learning_rate")])]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each `window` values in a row, NaN where one is missing, in linear time."""
    there = np.isfinite(values)
    sums, counts = (np.cumsum(np.concatenate([[0.0], v])) for v in (np.where(there, values, 0.0), there))
    means = (sums[window:] - sums[:-window]) / window
    return np.where(counts[window:] - counts[:-window] == window, means, np.nan)


def noise_scale_chart(events: Events) -> Chart:
    """Draw the noise scale over updates, with its 95 % interval.

    Args:
        events: `noise_scale` events of a log.
    """
    interval = [_Curve.of(label, TRAIN, events, label, faint=True) for label in ("low", "high")]
    chart = _chart("Noise scale", [_Curve.of("noise scale", VALIDATION, events, "noise_scale"), *interval], log=True)
    unbounded = sum(e.get("high") is None for e in events)
    if not unbounded:
        return chart
    note = f"{unbounded} of {len(events)} estimates have no upper bound, because the noise hides the gradient."
    return dataclasses.replace(chart, note=note)


def _chart(title: str, lines: list[_Curve], percent: bool = False, log: bool = False) -> Chart:
    missing = sorted({line.label.split(",")[0] for line in lines if not line.points})
    shown = [line for line in lines if line.points]
    note = f"Nothing to draw yet for: {', '.join(missing)}." if missing else ""
    return Chart(title, _svg(title, shown, percent, log) if shown else Markup(), note)


def _svg(title: str, lines: list[_Curve], percent: bool, log: bool) -> Markup:
    with svg_style():
        figure = Figure(figsize=(4.3, 2.7), layout="constrained")
        axes, drawn = figure.add_subplot(), []
        for line in lines:
            alone = line.alone()  # a line would not show these
            marked = line.color == VALIDATION and len(line.x) <= 40
            drawn += axes.plot(
                line.x,
                np.maximum(line.y, 1.0) if log else line.y,  # a logarithmic axis has no 0
                color=line.color,
                label=line.label,
                marker="o" if marked or alone else None,
                markevery=None if marked else alone,
                markersize=3.5,
                linewidth=0.8 if line.faint else 1.6,
                alpha=0.55 if line.faint else 1.0,
                clip_on=False,  # a line on the axis keeps its width
            )
        axes.set_xlabel("optimizer updates")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=0)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:,.0f}")
        else:
            axes.set_ylim(bottom=0)
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        if len(lines) > 1:
            named = {
                "95 % interval" if log and c.faint else c.label: handle for c, handle in zip(lines, drawn, strict=True)
            }
            figure.legend(named.values(), named, loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    last = (f"{c.label} {number(c.y[np.isfinite(c.y)][-1], '.2%' if percent else '.4g')}" for c in lines)
    return inline_svg(figure, title, f"{title} over optimizer updates. Last values: {'; '.join(last)}.")


def _heat_map(title: str, updates: np.ndarray, values: np.ndarray, rows: Sequence[str]) -> Chart:
    """Draw `values` of shape `(updates, rows)` on a logarithmic scale. Cells without a positive value stay empty."""
    positive = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    if not rows or not np.isfinite(positive).any():
        return Chart(title, note="Nothing to draw yet.")
    # Records may be unevenly spaced: each column, of the same width, shows the record nearest to its center.
    between = (updates[1:] + updates[:-1]) / 2
    first = updates[0] - (between[0] - updates[0] if len(between) else 0.5)
    last = updates[-1] + (updates[-1] - between[-1] if len(between) else 0.5)
    centers = first + (last - first) * (np.arange(COLUMNS) + 0.5) / COLUMNS
    image = np.ma.masked_invalid(positive[np.searchsorted(between, centers)].T)
    low, high = float(image.min()), float(image.max())
    with svg_style():
        figure = Figure(figsize=(9.0, 1.0 + 0.19 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        picture = axes.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            norm=LogNorm(low, high if high > low else low * 1.01),
            extent=(first, last, len(rows) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)  # a name may have a $
        axes.set_xlabel("optimizer updates")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.03)
        bar.outline.set_visible(False)
    label = f"{title} of each layer over optimizer updates, a heat map from {low:.2g} to {high:.2g}."
    return Chart(title, inline_svg(figure, title, label))
