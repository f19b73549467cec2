"""The results of a run: its last scores, `results.json` and `report.html`."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from lars_keras.files import atomic_write_text
from lars_keras.report.log import MetricsLog
from lars_keras.report.page import write_report
from lars_keras.report.progress import say
from lars_keras.runtime.errors import Diverged, TooManyUnreadableImages
from running.callbacks import RunCallbacks
from running.folder import all_versions


def final_scores(history: keras.callbacks.History) -> dict[str, float]:
    """Return the scores of the last evaluation, which came after the last update."""
    return {name: history.history[f"val_{name}"][-1] for name in ("top1", "top5", "loss", "n")}


def write_results(
    run_dir: Path, scores: dict[str, float], updates: int, callbacks: RunCallbacks, rollbacks: list[dict[str, Any]]
) -> Path:
    """Write the report, then `results.json`: the last scores, the measurements, and the versions of packages.

    A folder with `results.json` is finished, so this is the last file that a run writes. A run that is killed before
    writes all of its last files again.

    Args:
        run_dir: folder of the run.
        scores: scores of the last evaluation.
        updates: number of updates of the whole run.
        callbacks: callbacks of the run, which measured it.
        rollbacks: the rollbacks of the run.

    Returns:
        The path of the report.
    """
    results = {
        **scores,
        "n": round(scores["n"]),
        "updates": updates,
        "seconds": round(callbacks.log.seconds, 3),
        "images_per_second": callbacks.progress.images_per_second,
        "data_wait": callbacks.progress.data_wait,
        "rollbacks": rollbacks,
        "bad_images": callbacks.images.count,
        "versions": all_versions(),
    }
    text = json.dumps(results, indent=2) + "\n"
    report = write_report(run_dir, json.loads(text))
    atomic_write_text(run_dir / "results.json", text)
    return report


def scores_line(values: dict[str, float], num_test: int) -> str:
    """Return an evaluation in one line."""
    missing = num_test - round(values["n"])
    views = (
        f"; {values['test_views']} views: top-1 {100 * values['top1_views']:.2f} %" if "test_views" in values else ""
    )
    return (
        f"top-1 {100 * values['top1']:.2f} %  top-5 {100 * values['top5']:.2f} %  loss {values['loss']:.4f}  "
        f"n={values['n']:.0f}, each image once" + (f"; {missing:,} could not be read" if missing else "") + views
    )


@contextlib.contextmanager
def report_of_failure(run_dir: Path, log: MetricsLog, write: bool) -> Iterator[None]:
    """Log why a run ends because of its numbers or its data, and write the report."""
    try:
        yield
    except (Diverged, TooManyUnreadableImages) as e:
        if write:
            log.note(log.finished, str(e))
            say(f"report: {write_report(run_dir)}")
        raise
