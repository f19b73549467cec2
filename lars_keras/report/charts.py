"""SVG pictures of the report, and its heat maps of the layers."""

import contextlib
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lars_keras.report.layers import as_array, health

# Colours in the SVG are stand-ins for the page's own, which follow the reader's light or dark setting.
INK, GRID, TRAIN, VALIDATION = "#000001", "#000002", "#000003", "#000004"
CSS_COLOURS = {INK: "--muted", GRID: "--line", TRAIN: "--train", VALIDATION: "--validation"}
COLUMNS = 240  # of a heat map; more updates are put together


def svg_style() -> contextlib.AbstractContextManager:
    """matplotlib's settings for a figure that goes into the page."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lars_keras",  # ids, too, are the same each time
        "font.size": 9.5,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
        **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), INK),
    }
    return matplotlib.rc_context(style)


def inline_svg(figure: Figure, title: str, label: str) -> str:
    """A figure as an element of the page: named, without fixed size, ids its own, colours the page's.

    Args:
        figure: drawn under `svg_style`.
        title: of the picture, which no other on the page has.
        label: what it shows, for those who cannot see it.
    """
    out = io.StringIO()
    with svg_style():
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    name = title.lower().replace(" ", "-")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in CSS_COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib writes a viewBox"
    return f'<svg role="img" aria-label="{escape(label)}" {box[0]}>' + svg[svg.index(">") + 1 :]


def layer_charts(events: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> str:
    """The health of the layers in words, and heat maps over layers and updates.

    Args:
        events: `layers` events of a log, at least one.
        layers: rows of the layer plan.
    """
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in health(events, layers))
    updates = np.array([e["update"] for e in events])
    paths = [layer["path"] for layer in layers]
    adapted = [i for i, layer in enumerate(layers) if layer["adapt"]]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = as_array(events, "gradient_norm") / as_array(events, "weight_norm")
    maps = [
        ("Trust ratio", as_array(events, "ratio")[:, adapted], [paths[i] for i in adapted]),
        ("Effective rate", as_array(events, "rate"), paths),
        ("Gradient norm over weight norm", share, paths),
    ]
    figures = [_heat_map(title, updates, values, rows) for title, values, rows in maps]
    return f"<ul>{words}</ul>\n" + "\n".join(figures)


def _heat_map(title: str, updates: np.ndarray, values: np.ndarray, rows: Sequence[str]) -> str:
    """`values` of shape `(updates, rows)` as colours on a logarithmic scale; what is not above 0 stays empty."""
    positive = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    if not rows or not np.isfinite(positive).any():
        return f'<figure>\n<figcaption>{title}</figcaption>\n<p class="note">Nothing to draw yet.</p>\n</figure>'
    # The last of the updates that share a column: a mean would hide an outlier no less, and need more words.
    kept = np.unique(np.linspace(0, len(updates) - 1, COLUMNS).round().astype(int))
    updates, image = updates[kept], np.ma.masked_invalid(positive[kept].T)
    low, high = float(image.min()), float(image.max())
    with svg_style():
        figure = Figure(figsize=(9.0, 1.0 + 0.19 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        step = (updates[-1] - updates[0]) / max(len(updates) - 1, 1) or 1
        picture = axes.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            norm=LogNorm(low, high if high > low else low * 1.01),
            extent=(updates[0] - step / 2, updates[-1] + step / 2, len(rows) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel("optimizer updates")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.03)
        bar.outline.set_visible(False)
    label = f"{title} of each layer over optimizer updates, a heat map from {low:.2g} to {high:.2g}."
    return f"<figure>\n<figcaption>{title}</figcaption>\n{inline_svg(figure, title, label)}\n</figure>"
