"""The page of a run folder. The page is one file, and the same folder always gives the same bytes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lars_keras.files import atomic_write_text, local_path
from lars_keras.report.charts import curves, heat_maps, noise_scale_chart
from lars_keras.report.html import TEMPLATES, duration, number, render
from lars_keras.report.layers import health
from lars_keras.report.log import read_metrics
from lars_keras.report.noise import summary

Rows = list[dict[str, Any]]


def write_report(run_dir: str | os.PathLike[str], results: dict[str, Any] | None = None) -> Path:
    """Write `run_dir/report.html` from the files in a run folder.

    Args:
        run_dir: folder with `config.json`. `plan.txt`, `flags.txt`, `metrics.jsonl` and `results.json` may be missing.
        results: used in place of `results.json`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if `run_dir` has no `config.json`.
        ValueError: if `config.json` or `results.json` is not JSON, or `run_dir` is not local.
    """
    run_dir = local_path(run_dir, "run_dir")
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"`run_dir` must be a run folder, with a config.json. Received: run_dir={run_dir}")
    config = _json(run_dir / "config.json")
    results = _json(run_dir / "results.json") if results is None else results
    events = read_metrics(run_dir / "metrics.jsonl")
    updates, evals, telemetry, noise, notes = (
        [e for e in events if e["event"] == k] for k in ("update", "eval", "layers", "noise_scale", "note")
    )
    layers = config.get("layer_plan", [])
    score = results or (evals[-1] if evals else {})
    scored = "validation" if config.get("validation_split") else "test"
    page = render(
        TEMPLATES / "report.html",
        title=_title(config, run_dir),
        status=_status(results, updates),
        finished=bool(results),
        score=score,
        tiles=_tiles(results, score, updates),
        warnings=[
            *_not_finite(updates),
            *config.get("warnings", []),
            *(f"Update {e['update']}: {e['text']}" for e in notes),
        ],
        scored=scored,
        curves=curves(updates, evals, scored),
        evaluations=_evaluations(updates, evals),
        noise=summary(noise, layers),
        noise_chart=noise_scale_chart(noise) if noise else None,
        health=health(telemetry, layers),
        heat_maps=heat_maps(telemetry, layers) if telemetry and layers else [],
        plan=_plan(_text(run_dir / "plan.txt")),
        layers=[_layer(layer) for layer in layers],
        adapted=_adapted(layers),
        flags=_text(run_dir / "flags.txt"),
        versions=results.get("versions") or config.get("versions", {}),
    )
    path = run_dir / "report.html"
    atomic_write_text(path, page)
    return path


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip() if path.exists() else f"The run folder has no {path.name}."


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


def _not_finite(updates: Rows) -> list[str]:
    return [f"The loss was not finite at update {e['update']}." for e in updates if e["step_loss"] is None][:1]


def _tiles(results: dict[str, Any], score: dict[str, Any], updates: Rows) -> list[tuple[str, str]]:
    """Return the headline numbers: the results, or the last evaluation and update of an unfinished run."""
    work = results or ({**updates[-1], "updates": updates[-1]["update"]} if updates else {})
    return [
        ("Top-1", number(score.get("top1"), ".2%")),
        ("Top-5", number(score.get("top5"), ".2%")),
        ("Loss", number(score.get("loss"), ".4g")),
        ("Updates", number(work.get("updates"), ",.0f")),
        ("Training time", duration(work.get("seconds"))),
        ("Images/s", number(work.get("images_per_second"), ",.0f")),
        ("Data wait", number(work.get("data_wait"), ".1%")),
    ]


def _evaluations(updates: Rows, evals: Rows) -> list[list[str]]:
    training = {e["update"]: e for e in updates}
    columns = (("epoch", ".2f"), ("update", ",.0f"), ("loss", ".4g"), ("top1", ".2%"), ("top5", ".2%"), ("n", ",.0f"))
    rows = []
    for e in evals:
        before = training.get(e["update"], {})
        scores = [number(e.get(key), form) for key, form in columns]
        rows.append([*scores, number(before.get("loss"), ".4g"), number(before.get("top1"), ".2%")])
    return rows


def _plan(text: str) -> list[list[str]]:
    """Return the names and values of a plan. The page has its layers as a table and its warnings as a list."""
    lines = [line for line in text.partition("\n\n")[0].splitlines() if not line.startswith("WARNING: ")]
    return [[*line.split(maxsplit=1), ""][:2] for line in lines]


def _layer(layer: dict[str, Any]) -> tuple[str, ...]:
    return (
        layer["path"],
        "×".join(map(str, layer["shape"])) or "scalar",
        f"{math.prod(layer['shape']):,}",
        *("yes" if layer[role] else "no" for role in ("adapt", "decay")),
        f"{layer['lr_scale']:g}",
    )


def _adapted(layers: Rows) -> str:
    adapted = [layer for layer in layers if layer["adapt"]]
    weights, total = (sum(math.prod(layer["shape"]) for layer in some) for some in (adapted, layers))
    fraction = number(weights / total if total else None, ".2%")
    return f"Adapted: {len(adapted)} of {len(layers)} variables, {fraction} of the weights."
