"""A run folder as one page: `python -m lars_keras.report.page RUN_DIR` writes `RUN_DIR/report.html`.

The page needs nothing but itself, and the same folder always gives the same bytes.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lars_keras.files import atomic_write_text
from lars_keras.report.charts import GRID, TRAIN, VALIDATION, inline_svg, layer_charts, svg_style
from lars_keras.report.html import PAGE, duration, number, section, table
from lars_keras.report.log import read_metrics

Rows = list[dict[str, Any]]

REPEAT = "train.py --flagfile=RUN_DIR/flags.txt repeats the run."


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `run_dir/report.html` from what the run has left there.

    Args:
        run_dir: folder with `config.json`, and as far as the run got `plan.txt`, `flags.txt`, `metrics.jsonl` and
            `results.json`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if `run_dir` holds no `config.json`.
        ValueError: if `config.json` or `results.json` is no JSON.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"`run_dir` must be a run folder, with a config.json. Received: run_dir={run_dir}")
    config = _json(run_dir / "config.json")
    results = _json(run_dir / "results.json")
    events = read_metrics(run_dir / "metrics.jsonl")
    updates = [e for e in events if e["event"] == "update"]
    evals = [e for e in events if e["event"] == "eval"]
    measured = [e for e in events if e["event"] == "layers"]
    layers, warnings = config.pop("layer_plan", []), list(config.pop("warnings", []))
    warnings += [f"Update {e['update']}: {e['text']}" for e in events if e["event"] == "note"]
    versions = results.get("versions") or config.get("versions") or {}
    config.pop("versions", None)

    lost = next((e["update"] for e in updates if e["step_loss"] is None), None)
    if lost is not None:
        warnings.insert(0, f"The loss was not finite at update {lost}.")
    sections = [
        _tiles(results, updates, evals),
        section("Warnings", _warnings(warnings)) if warnings else "",
        section("Curves", _charts(updates, evals)),
        section("Evaluations", _evaluations(updates, evals)),
        section("Layers", layer_charts(measured, layers)) if measured and layers else "",
        section("Plan", _text(run_dir / "plan.txt")),
        section("Layer plan", _layer_plan(layers)) if layers else "",
        section("Configuration", table(("setting", "value"), _flat(config))),
        section("Flags", f'<p class="note">{REPEAT}</p>\n{_text(run_dir / "flags.txt")}'),
        section("Versions", table(("package", "version"), _flat(versions))) if versions else "",
    ]
    page = PAGE.substitute(
        title=escape(_title(config, run_dir)),
        status=escape(_status(results, updates)),
        sections="\n".join(filter(None, sections)),
    )
    path = run_dir / "report.html"
    atomic_write_text(path, page)
    return path


# Words and numbers.


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _title(config: dict[str, Any], run_dir: Path) -> str:
    keys = ("model", "dataset", "optimizer", "batch_size")
    if not all(config.get(key) for key in keys):
        return run_dir.resolve().name
    model, dataset, optimizer, batch_size = (config[key] for key in keys)
    return f"{model} on {dataset}: {optimizer}, batch {batch_size}"


def _status(results: dict[str, Any], updates: Rows) -> str:
    if results:
        return "Finished."
    done = f"the last logged update is {updates[-1]['update']}" if updates else "no update is logged"
    return f"Unfinished: there is no results.json, and {done}. The figures are those so far."


def _tiles(results: dict[str, Any], updates: Rows, evals: Rows) -> str:
    """The headline numbers; of an unfinished run, its last evaluation and update."""
    score = results or (evals[-1] if evals else {})
    work = results or ({**updates[-1], "updates": updates[-1]["update"]} if updates else {})
    n = number(score.get("n"), ",.0f")
    tiles = [
        ("Top-1", number(score.get("top1"), ".2%")),
        ("Top-5", number(score.get("top5"), ".2%")),
        ("Loss", number(score.get("loss"), ".4g")),
        ("Updates", number(work.get("updates"), ",.0f")),
        ("Training time", duration(work.get("seconds"))),
        ("Images/s", number(work.get("images_per_second"), ",.0f")),
        ("Waiting for data", number(work.get("data_wait"), ".1%")),
    ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles)
    if score:
        at = "" if results else f" after update {score['update']}"
        note = f"Top-1, top-5 and loss: held-out images{at}, {n} scored, each exactly once."
    else:
        note = "No evaluation is logged yet."
    return f'<dl class="tiles">{cells}</dl>\n<p class="note">{escape(note)}</p>'


# Parts of the page.


def _warnings(texts: Iterable[str]) -> str:
    return '<ul class="warnings">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _text(path: Path) -> str:
    if not path.exists():
        return f'<p class="note">The run folder has no {escape(path.name)}.</p>'
    return f"<pre>{escape(path.read_text(encoding='utf-8').rstrip())}</pre>"


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) rows."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _layer_plan(layers: Rows) -> str:
    rows = [
        (
            layer["path"],
            "×".join(map(str, layer["shape"])) or "scalar",
            f"{math.prod(layer['shape']):,}",
            *("yes" if layer[role] else "no" for role in ("adapt", "decay")),
            f"{layer['lr_scale']:g}",
        )
        for layer in layers
    ]
    return table(("variable", "shape", "parameters", "adapted", "decayed", "rate scale"), rows)


def _evaluations(updates: Rows, evals: Rows) -> str:
    if not evals:
        return '<p class="note">No evaluation is logged yet.</p>'
    training = {e["update"]: e for e in updates}
    columns = (("epoch", ".2f"), ("update", ",.0f"), ("loss", ".4g"), ("top1", ".2%"), ("top5", ".2%"), ("n", ",.0f"))
    rows = []
    for e in evals:
        before = training.get(e["update"], {})
        scores = [number(e[key], form) for key, form in columns]
        rows.append([*scores, number(before.get("loss"), ".4g"), number(before.get("top1"), ".2%")])
    head = ("epoch", "update", "loss", "top-1", "top-5", "images", "training loss", "training top-1")
    shown = table(head, rows, numeric=True)
    if len(rows) > 20:
        shown = f"<details><summary>{len(rows)} evaluations</summary>{shown}</details>"
    note = "Training figures: mean over the epoch so far, each image scored before its update."
    return f'<p class="note">{note}</p>\n{shown}'


# Charts.


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One line of a chart: x are updates, y values with NaN where there is none."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False

    @classmethod
    def of(cls, label: str, colour: str, events: Rows, name: str, **kwargs: Any) -> "_Curve":
        x = np.array([e["update"] for e in events], dtype=float)
        y = np.array([e.get(name) for e in events], dtype=float)  # null becomes NaN
        return cls(label, colour, x, y, **kwargs)

    @property
    def points(self) -> int:
        return int(np.isfinite(self.y).sum())


def _charts(updates: Rows, evals: Rows) -> str:
    window = len(updates) // 50
    loss = [_Curve.of("training, each update", TRAIN, updates, "step_loss", faint=window > 1)]
    if window > 1:
        x, y = (np.convolve(v, np.full(window, 1 / window), "valid") for v in (loss[0].x, loss[0].y))
        loss.append(_Curve(f"training, mean of {window} updates", TRAIN, x, y))
    charts = [_chart("Loss", [*loss, _Curve.of("validation", VALIDATION, evals, "loss")])]
    for title, name in (("Top-1", "top1"), ("Top-5", "top5")):
        training = _Curve.of("training, since the epoch began", TRAIN, updates, name)
        validation = _Curve.of("validation", VALIDATION, evals, name)
        charts.append(_chart(title, [training, validation], percent=True))
    charts.append(_chart("Learning rate", [_Curve.of("of each update", TRAIN, updates, "learning_rate")]))
    return '<div class="charts">\n' + "\n".join(charts) + "\n</div>"


def _chart(title: str, curves: list[_Curve], percent: bool = False) -> str:
    missing = sorted({c.label.split(",")[0] for c in curves if not c.points})
    shown = [c for c in curves if c.points]
    svg = _svg(title, shown, percent) if shown else ""
    note = f'<p class="note">Nothing to draw yet for: {", ".join(missing)}.</p>' if missing else ""
    return f"<figure>\n<figcaption>{title}</figcaption>\n{svg}{note}\n</figure>"


def _svg(title: str, curves: list[_Curve], percent: bool) -> str:
    with svg_style():
        figure = Figure(figsize=(4.3, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            marked = curve.colour == VALIDATION or curve.points == 1
            axes.plot(
                curve.x,
                curve.y,
                color=curve.colour,
                label=curve.label,
                marker="o" if marked else None,
                markersize=3.5 if len(curve.x) <= 40 else 0,
                linewidth=0.8 if curve.faint else 1.6,
                alpha=0.55 if curve.faint else 1.0,
                clip_on=False,  # a line on the axis keeps its width
            )
        axes.set_xlabel("optimizer updates")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    last = (f"{c.label} {number(c.y[np.isfinite(c.y)][-1], '.2%' if percent else '.4g')}" for c in curves)
    return inline_svg(figure, title, f"{title} over optimizer updates. Last values: {'; '.join(last)}.")


def main(argv: Sequence[str]) -> int:
    """Writes the report of the run folder that is the only argument; returns the exit code."""
    if len(argv) != 1:
        print("usage: python -m lars_keras.report.page RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(argv[0]))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
