"""A run folder as one page: `python -m lars_keras.training.report RUN_DIR` writes `RUN_DIR/report.html`.

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
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lars_keras.training.charts import GRID, TRAIN, VALIDATION, inline_svg, layer_charts, svg_style
from lars_keras.training.progress import read_metrics

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
        _section("Warnings", _warnings(warnings)) if warnings else "",
        _section("Curves", _charts(updates, evals)),
        _section("Evaluations", _evaluations(updates, evals)),
        _section("Layers", layer_charts(measured, layers)) if measured and layers else "",
        _section("Plan", _text(run_dir / "plan.txt")),
        _section("Layer plan", _layer_plan(layers)) if layers else "",
        _section("Configuration", _table(("setting", "value"), _flat(config))),
        _section("Flags", f'<p class="note">{REPEAT}</p>\n{_text(run_dir / "flags.txt")}'),
        _section("Versions", _table(("package", "version"), _flat(versions))) if versions else "",
    ]
    page = PAGE.substitute(
        title=escape(_title(config, run_dir)),
        status=escape(_status(results, updates)),
        sections="\n".join(filter(None, sections)),
    )
    path, new = run_dir / "report.html", run_dir / "report.tmp"
    new.write_text(page, encoding="utf-8")
    os.replace(new, path)
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
    n = _number(score.get("n"), ",.0f")
    tiles = [
        ("Top-1", _number(score.get("top1"), ".2%")),
        ("Top-5", _number(score.get("top5"), ".2%")),
        ("Loss", _number(score.get("loss"), ".4g")),
        ("Updates", _number(work.get("updates"), ",.0f")),
        ("Training time", _duration(work.get("seconds"))),
        ("Images/s", _number(work.get("images_per_second"), ",.0f")),
        ("Waiting for data", _number(work.get("data_wait"), ".1%")),
    ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles)
    if score:
        at = "" if results else f" after update {score['update']}"
        note = f"Top-1, top-5 and loss: validation images{at}, {n} scored, each exactly once."
    else:
        note = "No evaluation is logged yet."
    return f'<dl class="tiles">{cells}</dl>\n<p class="note">{escape(note)}</p>'


def _number(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form).replace("%", " %")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


# Parts of the page.


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"


def _warnings(texts: Iterable[str]) -> str:
    return '<ul class="warnings">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _text(path: Path) -> str:
    if not path.exists():
        return f'<p class="note">The run folder has no {escape(path.name)}.</p>'
    return f"<pre>{escape(path.read_text(encoding='utf-8').rstrip())}</pre>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numeric: bool = False) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    kind = ' class="numeric"' if numeric else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


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
    return _table(("variable", "shape", "parameters", "adapted", "decayed", "rate scale"), rows)


def _evaluations(updates: Rows, evals: Rows) -> str:
    if not evals:
        return '<p class="note">No evaluation is logged yet.</p>'
    training = {e["update"]: e for e in updates}
    columns = (("epoch", ".2f"), ("update", ",.0f"), ("loss", ".4g"), ("top1", ".2%"), ("top5", ".2%"), ("n", ",.0f"))
    rows = []
    for e in evals:
        before = training.get(e["update"], {})
        scores = [_number(e[key], form) for key, form in columns]
        rows.append([*scores, _number(before.get("loss"), ".4g"), _number(before.get("top1"), ".2%")])
    head = ("epoch", "update", "loss", "top-1", "top-5", "images", "training loss", "training top-1")
    table = _table(head, rows, numeric=True)
    if len(rows) > 20:
        table = f"<details><summary>{len(rows)} evaluations</summary>{table}</details>"
    note = "Training figures: mean over the epoch so far, each image scored before its update."
    return f'<p class="note">{note}</p>\n{table}'


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
    last = (f"{c.label} {_number(c.y[np.isfinite(c.y)][-1], '.2%' if percent else '.4g')}" for c in curves)
    return inline_svg(figure, title, f"{title} over optimizer updates. Last values: {'; '.join(last)}.")


PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1c2430; --muted: #5b6675; --line: #d9dee5; --page: #ffffff; --panel: #f5f7f9;
  --train: #2166ac; --validation: #c4500c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --muted: #9aa7b6; --line: #333d49; --page: #12171d; --panel: #1b222a;
    --train: #6fb1f2; --validation: #f5a05a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
.note { margin: .5rem 0; color: var(--muted); font-size: .9rem; }
.warnings { margin: 0; padding: .75rem 1rem .75rem 2rem; border-left: 4px solid var(--validation);
  background: var(--panel); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.tiles div { padding: .75rem 1rem; background: var(--panel); border-radius: 6px; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; }
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.wide, pre { overflow-x: auto; }
pre { margin: 0; padding: 1rem; background: var(--panel); border-radius: 6px; font-size: .82rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  font-weight: normal; white-space: nowrap; }
thead th { color: var(--muted); }
.numeric th, .numeric td { text-align: right; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$status</p>
$sections
</body>
</html>
""")


def main(argv: Sequence[str]) -> int:
    """Writes the report of the run folder that is the only argument; returns the exit code."""
    if len(argv) != 1:
        print("usage: python -m lars_keras.training.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(argv[0]))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
