"""`train.py --telemetry_every --noise_scale_every`: log, TensorBoard, report, and proposals for other batches."""

import contextlib
import io
import json
import pathlib
import tempfile
import unittest
from contextlib import redirect_stdout

import tensorflow as tf

from lars_keras.report import batch_size
from tests.cli.runs import SMALL, run


class MeasuringTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        with contextlib.chdir(folder):
            code, _, err = run(*SMALL, "--telemetry_every=3", "--noise_scale_every=2", draw=True)
        assert code == 0, err
        (cls.run_dir,) = pathlib.Path(folder, "runs").iterdir()  # without --run_dir, each run has its own
        cls.events = [json.loads(line) for line in (cls.run_dir / "metrics.jsonl").read_text().splitlines()]

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def test_log(self):
        rates = {event["update"]: event["learning_rate"] for event in self.of("update")}
        self.assertEqual(sorted(rates), list(range(1, 31)))
        self.assertEqual([event["update"] for event in self.of("layers")], list(range(3, 31, 3)))
        plan = json.loads((self.run_dir / "config.json").read_text())["layer_plan"]
        for event in self.of("layers"):
            rows = zip(*(event[name] for name in ("weight_norm", "gradient_norm", "ratio", "rate")), strict=True)
            for row, (weight, gradient, ratio, rate) in zip(plan, rows, strict=True):
                kernel = row["path"].endswith("kernel")
                expected = 1e-3 * weight / (gradient + 5e-4 * weight) if kernel else 1.0
                factor = 1.0 if kernel else 0.05
                self.assertLess(abs(ratio / expected - 1), 1e-3, row)
                self.assertLess(abs(rate / (rates[event["update"]] * factor * ratio) - 1), 1e-3, row)
        self.assertEqual([event["update"] for event in self.of("noise_scale")], list(range(2, 31, 2)))
        for event in self.of("noise_scale"):
            self.assertEqual((event["updates"], event["ghost_batch"], event["batch_size"]), (2, 16, 64))

    def test_tensorboard(self):
        found = {}
        for record in tf.data.TFRecordDataset(list(map(str, (self.run_dir / "tensorboard/train").iterdir()))):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
        noise = {e["update"]: e["noise_scale"] for e in self.of("noise_scale") if e["noise_scale"] is not None}
        self.assertGreater(len(noise), 5)
        for update, value in noise.items():
            self.assertLess(abs(found["noise_scale"][update] / value - 1), 1e-5)

    def test_report(self):
        page = (self.run_dir / "report.html").read_text()
        for title in ("Noise scale", "Trust ratio", "Effective rate", "Gradient norm over weight norm"):
            figure = page.partition(f"<figcaption>{title}")[2].partition("</figure>")[0]
            self.assertIn("<path", figure, title)

    def test_proposals(self):
        out = io.StringIO()
        with redirect_stdout(out):
            code = batch_size.main([str(self.run_dir), "128"])
        self.assertEqual(code, 0)
        *_, row = out.getvalue().strip().splitlines()
        batch, progress, _, low, _, high, _, rate, epochs, updates, *warmup = row.split()
        self.assertEqual((batch, warmup), ("128", ["0", "steps"]))
        self.assertTrue(int(low) <= int(progress) <= int(high), row)
        self.assertAlmostEqual(int(updates), float(epochs) * 160 / 128, delta=1)
        gain = 30 / int(updates)  # LARS: the rate grows with its root
        self.assertLess(abs(float(rate) / (15 * gain**0.5) - 1), 0.1)


if __name__ == "__main__":
    unittest.main()
