"""Figures in README and docs equal the cells of the committed measurements."""

import contextlib
import functools
import json
import pathlib
import re
import tempfile
import unittest.mock

from absl.testing import absltest

from running.resume import config_of_flags
from tests.tools import quoted
from tools import notebook
from tools.benchmarks import results
from tools.committed import write_json
from tools.comparison import command

ROOT = pathlib.Path(__file__).parents[2]
ARXIV = re.compile(r"(arXiv |abs/)\d{4}\.\d{5}")
FIGURE = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+(?!\.?\w|-)| %|\.\d+ %)")


@functools.cache
def committed_phrases() -> dict:
    """Return the phrases with the figures of the committed measurements, which are many files to read."""
    return quoted.phrases()


def figures_amiss(document: str, text: str, phrases: dict | None = None) -> list[str]:
    """Return what is wrong with the figures of a document: phrases that do not stand there once, unbound figures.

    `tests/tools/quoted.py` says how to bind a figure to its cell. The phrases are the committed ones unless given.
    """
    bound = committed_phrases() if phrases is None else phrases
    text = " ".join(re.sub(r"^```.*?^```", " ", text, flags=re.DOTALL | re.MULTILINE).split())
    covered, amiss = set(), []
    for phrase in (*bound.get(document, ()), *quoted.UNBOUND[document]):
        places = [match.start() for match in re.finditer(rf"(?<![\w.]){re.escape(phrase)}(?![\w]|\.\d)", text)]
        if len(places) != 1:
            amiss.append(f"stands there {len(places)} times: {phrase}")
        for place in places:
            covered.update(range(place, place + len(phrase)))
    code = {
        place for kind in (r"`[^`]*`", ARXIV) for match in re.finditer(kind, text) for place in range(*match.span())
    }
    for match in FIGURE.finditer(text):
        if match.start() not in covered | code:
            amiss.append(f"is bound to no cell: {text[max(match.start() - 40, 0) : match.end() + 20]}")
    return amiss


class ResultsTest(absltest.TestCase):
    def test_the_page_is_generated_from_the_measurements(self):
        self.assertEqual((ROOT / "docs" / "results.md").read_text(), results.page())

    def test_files_are_written_in_one_form(self):
        """Committed JSON is as `write_json` writes it, so the diff of a new run is a line."""
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for path in sorted((ROOT / "results").glob("*.json")):
            again = folder / path.name
            write_json(again, json.loads(path.read_text()))
            self.assertEqual(again.read_text(), path.read_text(), path)

    def test_pictures_are_small(self):
        for path in sorted((ROOT / "docs").glob("*.svg")):
            self.assertLess(len(path.read_text().splitlines()), 400, path)

    def test_pictures_are_shown(self):
        pages = "".join(path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"))
        for path in (ROOT / "docs").glob("*.svg"):
            self.assertIn(f"{path.name})", pages)

    def test_recorded_commands_are_understood(self):
        """Commands in committed comparisons use flags and files that exist, their recipes flags that agree."""
        for path in sorted((ROOT / "results").glob("compare_*.json")):
            found = json.loads(path.read_text())
            program, script, *arguments = found["command"].split()
            self.assertEqual((program, script), ("python", "compare.py"))
            with contextlib.chdir(ROOT):
                own = command.define()
                self.assertEqual(own([script, *arguments]), [script], path)
            for recipe in own.recipes:
                self.assertTrue((ROOT / recipe).is_file(), recipe)
            for name, lines in found["settings"]["candidates"].items():
                now = config_of_flags(lines.splitlines()).as_flags()
                for flag in ("model", "dataset", "batch_size", "epochs", "optimizer", "learning_rate", "schedule"):
                    self.assertEqual(*(re.findall(f"--{flag}=.*", text) for text in (now, lines)), f"{path}: {name}")


class FiguresTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.texts = {name: (ROOT / name).read_text() for name in quoted.UNBOUND}
        self.texts |= {name: notebook.page_of(text) for name, text in self.texts.items() if name.endswith(".py")}

    def test_figures_are_those_of_their_cells(self):
        for name, text in self.texts.items():
            self.assertEqual(figures_amiss(name, text), [], name)

    def test_every_page_is_held(self):
        """Notebooks, and pages of docs/ but the generated one, and the one whose tables `tests/pod` holds."""
        paths = [*(ROOT / "docs").glob("*.md"), *notebook.SOURCES]
        pages = {f"docs/{path.name}" for path in paths} - {"docs/results.md", "docs/pod.md"}
        self.assertEqual(set(quoted.UNBOUND), {"README.md", *pages})

    def test_any_changed_figure_is_found(self):
        """Replace the last digit of each figure of each phrase in turn."""
        for name, phrases in committed_phrases().items():
            text = " ".join(self.texts[name].split())
            for phrase in phrases:
                self.assertRegex(phrase, r"\d")
                for match in FIGURE.finditer(phrase):
                    digits = match[0].rstrip(" %")
                    changed = digits[:-1] + str((int(digits[-1]) + 1) % 10) + match[0][len(digits) :]
                    wrong = phrase[: match.start()] + changed + phrase[match.end() :]
                    found = figures_amiss(name, text.replace(phrase, wrong))
                    self.assertIn(f"stands there 0 times: {phrase}", found)

    def test_any_changed_measurement_is_found(self):
        """A hundredth more in one cell of each file that is quoted."""
        before = results.read
        for document, name, keys in (
            ("README.md", "compare_cifar10_fast", ("table", 0, "top1", 0)),
            ("docs/choosing.md", "compare_digits", ("table", 0, "top1", 0)),
            ("docs/choosing.md", "compare_systemds_cifar10", ("table", 0, "top1", 0)),
            ("docs/choosing.md", "compare_questions", ("table", 1, "top1", 2)),
            ("docs/optimizers.md", "optimizer_step", ("results", "resnet50, float32", "rows", 3, "times_sgd")),
            (
                "docs/optimizers.md",
                "optimizer_training_step",
                ("results", "training step of alexnet_bn", "lars_over_sgd"),
            ),
        ):

            def read(asked, name=name, keys=keys):
                found = before(asked)
                if asked == name:
                    inner = found
                    for key in keys[:-1]:
                        inner = inner[key]
                    inner[keys[-1]] += 0.01
                return found

            with unittest.mock.patch.object(results, "read", read):
                found = figures_amiss(document, self.texts[document], quoted.phrases())
            self.assertTrue(any("stands there 0 times" in line for line in found), name)

    def test_a_new_figure_is_found(self):
        found = figures_amiss(
            "README.md", self.texts["README.md"] + "\nLARS reaches 99.9 %, or 1.5 times `0.1 %`.\n\n```\n9.9\n```\n"
        )
        self.assertLen(found, 2)


if __name__ == "__main__":
    absltest.main()
