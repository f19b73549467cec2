"""The report of a run."""

import html.parser
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import jinja2
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.report import log as log_module
from lars_keras.report.__main__ import main
from lars_keras.report.html import TEMPLATES, render
from lars_keras.report.page import write_report
from tests.report.test_log import FakeClock, drive

ROOT = pathlib.Path(__file__).parents[2]


class PageParser(html.parser.HTMLParser):
    """Collects the page's elements and text; fails where a tag is not closed in order."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.starts: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        if self.open:
            raise AssertionError(f"not closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing, line {self.getpos()[0]}")

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


class ReportTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.run_dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        config = {
            "model": "alexnet_small",
            "dataset": "digits",
            "optimizer": "lars",
            "batch_size": 8192,
            "warnings": ["The rate is 100 times off & so on."],
            "layer_plan": [
                {"path": "<b>conv1</b>/kernel", "shape": [3, 3, 1, 32], "adapt": True, "decay": False, "lr_scale": 0.5}
            ],
        }
        self.write("config.json", json.dumps(config))

    def write(self, name: str, text: str) -> None:
        (self.run_dir / name).write_text(text)

    def write_run(self) -> None:
        """Make a finished run, with metrics as `MetricsLog` leaves them."""
        clock = FakeClock()
        drive([log_module.MetricsLog(self.run_dir, clock)], clock)
        self.write("flags.txt", "--run_dir=<script>alert(1)</script>\n--seed=7\n")
        self.write("plan.txt", "  batch      8192 = 16 x <i>512</i>\n\n  variable\n  conv1/kernel  3 x 3\nWARNING: w\n")
        results = {
            "top1": 0.9876,
            "top5": 0.9991,
            "loss": 0.0432,
            "n": 450,
            "updates": 1234,
            "seconds": 3725.0,
            "images_per_second": 5203.4,
            "versions": {"keras": "3.15.1"},
        }
        self.write("results.json", json.dumps(results))

    def page(self) -> PageParser:
        path = write_report(self.run_dir)
        self.assertEqual(path, self.run_dir / "report.html")
        return PageParser(path.read_text())

    def test_a_model_with_metrics_of_its_own(self):
        event = {"event": "eval", "update": 3, "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "n": 450}
        self.write("metrics.jsonl", json.dumps(event) + "\n")
        self.assertIn("450", "".join(self.page().texts))

    def test_finished_run(self):
        self.write_run()
        page = self.page()
        start = page.texts.index("Top-1")
        tiles = dict(zip(page.texts[start : start + 14 : 2], page.texts[start + 1 : start + 14 : 2], strict=True))
        self.assertEqual(tiles["Top-1"], "98.76 %")
        self.assertEqual(tiles["Top-5"], "99.91 %")
        self.assertEqual(tiles["Loss"], "0.0432")
        self.assertEqual(tiles["Updates"], "1,234")
        self.assertEqual(tiles["Training time"], "1 h 02 min")
        self.assertEqual(tiles["Images/s"], "5,203")
        self.assertEqual(tiles["Data wait"], "–")
        for text in (
            "alexnet_small on digits: lars, batch 8192",
            "Finished.",
            "Top-1, top-5 and loss: test images,\n450 scored, each exactly once.",
            "The rate is 100 times off & so on.",
            "8192 = 16 x <i>512</i>",
            "<b>conv1</b>/kernel",
            "Adapted: 1 of 1 variables, 100.00 % of the weights.",
            "3×3×1×32",
            "288",
            "3.15.1",
            "97.25 %",
        ):
            self.assertIn(text, page.texts)

    def test_charts(self):
        self.write_run()
        page = self.page()
        charts = [attrs for tag, attrs in page.starts if tag == "svg"]
        self.assertLen(charts, 4)
        self.assertEqual(
            charts[1]["aria-label"],
            "Top-1 over optimizer updates. Last values: training, since the epoch began 50.00 %; test 97.25 %.",
        )
        ids = [attrs["id"] for _, attrs in page.starts if "id" in attrs]
        self.assertLen(set(ids), len(ids))
        used = [attrs["xlink:href"][1:] for tag, attrs in page.starts if tag == "use"]
        self.assertNotEmpty(used)
        self.assertContainsSubset(used, ids)

    def test_escapes_and_stands_alone(self):
        self.write_run()
        page = self.page()
        text = (self.run_dir / "report.html").read_text()
        self.assertNotIn("<script", text)
        self.assertNotIn("<b>", text)
        self.assertNotIn("<i>", text)
        self.assertIn("--run_dir=<script>alert(1)</script>\n--seed=7", page.texts)
        for tag, attrs in page.starts:
            self.assertNotIn(tag, ("script", "link", "img", "iframe"))
            for name in ("src", "href", "xlink:href"):
                self.assertStartsWith(attrs.get(name, "#"), "#")

    def test_same_bytes_each_time(self):
        self.write_run()
        first = write_report(self.run_dir).read_bytes()
        self.assertEqual(write_report(self.run_dir).read_bytes(), first)

    def test_unfinished_run(self):
        self.write_run()
        (self.run_dir / "results.json").unlink()
        page = self.page()
        self.assertIn(
            "Unfinished: there is no results.json, and the last logged update is 6. The figures are those so far.",
            page.texts,
        )
        self.assertIn(
            "Top-1, top-5 and loss: test images after update 6,\n450 scored, each exactly once.",
            page.texts,
        )

    @parameterized.parameters(0, 1)
    def test_says_what_is_missing(self, updates):
        clock = FakeClock()
        drive([log_module.MetricsLog(self.run_dir, clock)], clock, stop=updates)
        page = self.page()
        self.assertIn("No evaluation is logged yet.", page.texts)
        self.assertIn("The run folder has no flags.txt.", page.texts)
        missing = "Nothing to draw yet for: test."
        self.assertEqual(page.texts.count(missing), 3 if updates else 0)
        self.assertLen([tag for tag, _ in page.starts if tag == "svg"], 4 if updates else 0)

    def test_diverged_run(self):
        lines = [
            {
                "event": "update",
                "update": u,
                "epoch": u / 3,
                "loss": loss,
                "step_loss": loss,
                "top1": 0.1,
                "top5": 0.5,
                "learning_rate": 1.0,
                "images_per_second": None,
                "seconds": u,
            }
            for u, loss in enumerate((2.3, 90.0, None, None), start=1)
        ]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self.assertIn("The loss was not finite at update 3.", self.page().texts)

    def test_long_run_keeps_the_page_small(self):
        line = {"event": "update", "top1": 0.1, "top5": 0.5, "images_per_second": None, "epoch": 1.0}
        with (self.run_dir / "metrics.jsonl").open("w") as file:
            for u in range(8, 40_001, 8):  # a call takes 8
                loss = 2.0 + (u * 7919 % 101) / 101  # noise
                more = {"update": u, "loss": loss, "step_loss": loss, "learning_rate": u, "seconds": u}
                file.write(json.dumps({**line, **more}) + "\n")
        texts = self.page().texts
        self.assertIn("training, each logged update", texts)
        self.assertIn("training, mean of 100 logged updates", texts)
        self.assertNotIn("95 % interval", texts)  # of the noise scale
        self.assertLess((self.run_dir / "report.html").stat().st_size, 300_000)

    def test_the_layer_plan_is_shown_once(self):
        self.write_run()
        texts = " ".join(self.page().texts)
        self.assertEqual(texts.count("conv1"), 1)
        self.assertNotIn("WARNING", texts)

    def test_a_long_table_is_folded(self):
        self.write_run()
        self.assertNotIn("details", [tag for tag, _ in self.page().starts])
        line = {"event": "eval", "epoch": 1.0, "loss": 1.0, "top1": 0.1, "top5": 0.5, "n": 450}
        lines = (json.dumps({**line, "update": u}) for u in range(41))
        self.write("metrics.jsonl", "\n".join(lines) + "\n")
        self.assertIn("41 rows", self.page().texts)

    def test_a_template_escapes_and_knows_its_names(self):
        template = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "own.html")
        template.write_text('{% extends "base.html" %}{% block content %}{{ rate | number(".1%") }}{% endblock %}')
        page = render(template, title="<a> & b", status="", rate=0.5)
        self.assertIn("<h1>&lt;a&gt; &amp; b</h1>", page)
        self.assertIn("50.0 %", page)
        with self.assertRaisesRegex(jinja2.UndefinedError, "status"):
            render(template, title="", rate=None)

    def test_the_wheel_has_the_templates(self):
        tree = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "lars_keras", tree / "lars_keras", ignore=shutil.ignore_patterns("__pycache__"))
        build = "from setuptools import build_meta; build_meta.build_wheel('.')"
        subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, check=True)
        with zipfile.ZipFile(next(tree.glob("*.whl"))) as wheel:
            names = {name for name in wheel.namelist() if name.endswith(".html")}
        self.assertEqual(names, {f"lars_keras/report/templates/{path.name}" for path in TEMPLATES.iterdir()})

    def test_command(self):
        self.assertEqual(main([str(self.run_dir)]), 0)
        for arguments, code in (([], 2), (["--help"], 0)):
            with self.assertRaises(SystemExit) as end:
                main(arguments)
            self.assertEqual(end.exception.code, code)
        self.assertEqual(main([str(self.run_dir / "absent")]), 2)
        self.write("config.json", "{")
        self.assertEqual(main([str(self.run_dir)]), 2)

    def test_no_run_folder(self):
        empty = self.enterContext(tempfile.TemporaryDirectory())
        with self.assertRaisesRegex(FileNotFoundError, "`run_dir` must be a run folder.*Received"):
            write_report(empty)


if __name__ == "__main__":
    tf.test.main()
