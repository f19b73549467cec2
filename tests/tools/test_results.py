"""What is claimed in words is what the committed measurements say."""

import pathlib
import re

import tensorflow as tf

from tools.benchmarks import results

ROOT = pathlib.Path(__file__).parents[2]


def quoted(text):
    """Returns the figures, such as 1.58 or 99.3 %, of the paragraphs and list items that link to a result, with the
    tables before them and what introduces those."""
    parts = re.split(r"\n\s*\n(?!\|)|\n(?=- )", re.sub(r"\|\n\s*\n", "|\n", text))
    parts = [part for part in parts if re.search(r"\]\(docs/results\.md", part)]
    return [figure for part in parts for figure in re.findall(r"(?<![\w.])\d+\.\d+(?!\.?\w|-)", part)]


class ResultsTest(tf.test.TestCase):
    def test_the_page_is_written_from_the_measurements(self):
        self.assertEqual((ROOT / "docs" / "results.md").read_text(), results.page())

    def test_quoted_figures_are_on_the_page(self):
        figures = quoted((ROOT / "README.md").read_text())
        self.assertNotEmpty(figures)
        on_page = set(re.findall(r"\d+\.\d+", results.page()))
        self.assertEqual([figure for figure in figures if figure not in on_page], [])

    def test_quoted_tables_are_on_the_page(self):
        rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\|.* ± ", line)]
        self.assertNotEmpty(rows)
        self.assertContainsSubset(rows, results.page().splitlines())

    def test_a_figure_that_was_not_measured_is_found(self):
        self.assertEqual(
            quoted("LARS 0.1.0 takes 1.58 times [SGD](docs/results.md), not\n2.0.\n\nother 3.5"), ["1.58", "2.0"]
        )
        self.assertEqual(
            quoted("of 9.9\n\nbefore\n\n| a |\n| --- |\n| 88.07 % |\n\nThis is [so](docs/results.md#a).\n\n4.5"),
            ["88.07"],
        )


if __name__ == "__main__":
    tf.test.main()
