"""The noise scale in a run's log and report, and the settings that are proposed from it."""

import contextlib
import io
import json
import math
import pathlib
import re
import tempfile
import types
import warnings

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.noise_scale import NoiseScale
from lars_keras.report import batch_size, charts, noise
from lars_keras.report.log import MetricsLog, read_metrics
from lars_keras.report.page import write_report

LAYERS = [
    {"path": name, "shape": [3, 3], "adapt": adapt, "decay": adapt, "lr_scale": 1.0}
    for name, adapt in (("conv/kernel", True), ("conv/bias", False), ("head/kernel", True))
]


class NoiseScaleLogTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.run_dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.write_config(layer_plan=LAYERS)

    def write_config(self, **more):
        (self.run_dir / "config.json").write_text(json.dumps({"batch_size": 256, "optimizer": "lars"} | more))

    def log(self, updates, update_freq, per_call=1, first=0):
        """Log `updates` updates of three variables, whose noise scales are 32, 64 and 128 times 100."""
        rng = np.random.default_rng(first)
        trainer = types.SimpleNamespace(microbatch_size=32, batch_size=256)
        log = MetricsLog(self.run_dir)
        callback = noise.NoiseScaleLog(trainer, log, update_freq)
        for each in (callback, log):
            each.set_params({"batch_size": 256, "first_update": first, "steps_per_epoch": 10.0})
            each.on_train_begin()
        for batch in range(first + per_call - 1, first + updates, per_call):
            truth, trace = np.array([1.0, 1.0, 1.0]), np.array([3200.0, 6400.0, 12800.0])
            wobble = rng.normal(scale=0.05, size=(2, per_call, 3)) + 1
            trainer.measures = {
                "ghost_gradient": np.sqrt((truth + trace / 32) * wobble[0]),
                "gradient": np.sqrt((truth + trace / 256) * wobble[1]),
            }
            callback.on_train_batch_end(batch)
            log.on_train_batch_end(batch, {"loss": 1.0, "learning_rate": 5.0 if batch < 20 else 2.0})
        return [e for e in read_metrics(self.run_dir / "metrics.jsonl") if e["event"] == "noise_scale"]

    def test_report_without_layers(self):
        """Write the page of a Keras optimizer, which has no plan of layers."""
        self.write_config(optimizer="momentum")
        self.log(60, 20)
        self.assertIn("Noise scale ", write_report(self.run_dir).read_text())

    def test_a_chart_of_estimates_without_a_bound(self):
        events = [
            {"update": u, "noise_scale": 100.0 if u % 2 else None, "low": 50.0, "high": None} for u in range(1, 61)
        ]
        chart = charts.noise_scale_chart(events)
        self.assertEqual(chart.note.split(",")[0], "60 of 60 estimates have no upper bound")
        self.assertEqual(chart.svg.count("<use "), 30 + 1)  # the legend has one
        fine = charts.noise_scale_chart([e | {"noise_scale": 100.0, "high": 200.0} for e in events])
        self.assertEqual((fine.note, fine.svg.count("<use ")), ("", 0))

    def test_lines(self):
        events = self.log(60, 20)
        self.assertEqual([e["update"] for e in events], [20, 40, 60])
        for e in events:
            self.assertEqual((e["updates"], e["ghost_batch"], e["batch_size"]), (20, 32, 256))
            self.assertAllClose(e["ghost_square"], [101.0, 201.0, 401.0], rtol=0.1)
            self.assertAllClose(e["mean_square"], [13.5, 26.0, 51.0], rtol=0.1)
            self.assertEqual(e["epoch"], e["update"] / 10)

    def test_lines_stand_at_the_same_updates_after_a_restart(self):
        self.log(30, 20)
        events = self.log(30, 20, first=30)
        self.assertEqual([(e["update"], e["updates"]) for e in events], [(20, 20), (40, 10), (60, 20)])

    def test_several_updates_a_call(self):
        self.assertEqual(
            [(e["update"], e["updates"]) for e in self.log(60, 20, per_call=6)], [(24, 24), (42, 18), (60, 18)]
        )

    def test_a_skipped_update_is_left_out(self):
        trainer = types.SimpleNamespace(microbatch_size=32, batch_size=256)
        callback = noise.NoiseScaleLog(trainer, None, 4)
        callback.on_train_begin()
        trainer.measures = {"ghost_gradient": np.zeros([1, 3]), "gradient": np.zeros([1, 3])}
        callback.on_train_batch_end(0)
        self.assertEmpty(callback._estimator)

    def test_printed_without_a_log(self):
        """Print on the first of several hosts only."""
        for chief in (True, False):
            cluster = types.SimpleNamespace(is_chief=chief)
            trainer = types.SimpleNamespace(microbatch_size=32, batch_size=256, cluster=cluster)
            callback = noise.NoiseScaleLog(trainer, update_freq=4)
            callback.set_params({"steps_per_epoch": 10.0})
            callback.on_train_begin()
            with contextlib.redirect_stdout(io.StringIO()) as out:
                for batch in range(10):
                    trainer.measures = {"ghost_gradient": np.full([1, 3], 9.0), "gradient": np.full([1, 3], 4.0)}
                    callback.on_train_batch_end(batch)
                callback.on_train_end()  # what is left
            lines = out.getvalue().splitlines()
            self.assertLen(lines, 3 * chief)
            for line, epoch in zip(lines, ("0.4", "0.8", "1"), strict=False):
                self.assertRegex(
                    line, f"^Noise scale [0-9,]+ .* at epoch {epoch}: at batch 256 each example contributes"
                )

    def test_summary(self):
        self.assertEmpty(noise.summary([], LAYERS))
        lines = noise.summary(self.log(400, 100), LAYERS)
        self.assertRegex(lines[0], "^Noise scale [0-9,]+ .* at epoch 40: at batch 256 each example contributes")
        self.assertRegex(lines[1], "conv/kernel has the smallest noise scale, .* and head/kernel the largest")

    def test_report(self):
        self.log(60, 20)
        self.write_config(model="m", dataset="d", layer_plan=LAYERS)
        page = write_report(self.run_dir).read_text()
        self.assertIn("<h2>Noise scale</h2>", page)
        self.assertIn("at batch 256 each example contributes", page)
        self.assertIn('aria-label="Noise scale over optimizer updates.', page)

    @parameterized.parameters(
        (None, None, None, "The noise scale at epoch 3 could not be bounded"),
        (0.0, 0.0, 0.0, "Noise scale 0 (0 to 0)"),
        (0.0, 0.0, None, "Noise scale 0 (0 to no bound)"),
    )
    def test_report_of_a_converged_run(self, value, low, high, sentence):
        """Null is infinite, and 0 is 0, in the text, in the chart and where another ghost batch came before."""
        events = self.log(60, 20)
        events[1]["ghost_batch"] = 64
        events[2] |= {"noise_scale": value, "low": low, "high": high, "epoch": 3.0}
        (self.run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events[1:]))
        with warnings.catch_warnings(action="error"):
            page = write_report(self.run_dir).read_text()
        self.assertIn(sentence, page)

    @parameterized.parameters((101.0, 101.0, 0, "batch of any size"), (1.0, 0.01, 2, "could not be bounded"))
    def test_proposals_from_a_converged_run(self, ghost, mean, code, sentence):
        self.log(40, 20)
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        for e in lines:
            if e["event"] == "noise_scale":
                e |= {"noise_scale": None, "low": None, "ghost_square": [ghost] * 3, "mean_square": [mean] * 3}
        (self.run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            self.assertEqual(batch_size.main([str(self.run_dir)]), code)
        self.assertIn(sentence, out.getvalue())
        self.assertEqual("progress" in out.getvalue(), not code)  # no table where nothing was measured

    def test_proposals_from_a_run(self):
        self.log(200, 50)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.assertEqual(batch_size.main([str(self.run_dir), "256", "1024"]), 0)
        rows = [line.split() for line in out.getvalue().splitlines()[-2:]]
        self.assertEqual([rows[0][i] for i in (0, 7, 9, 10, 11)], ["256", "5", "200", "0", "steps"])  # the run itself
        lines, proposals = batch_size.propose_from_run(self.run_dir, [256, 1024])
        found = re.search(r"Noise scale \S+ \(([\d,]+) to ([\d,]+)\)", " ".join(lines))
        low, high = (float(end.replace(",", "")) for end in found.groups())
        for row, proposal in zip(rows, proposals, strict=True):
            ends = [100 / (1 + proposal.batch_size / end) for end in (low, high)]
            self.assertAllClose([float(row[i]) for i in (3, 5)], ends, atol=1.0)
            self.assertBetween(float(row[1]), *ends)
        self.assertEqual(rows[1][0], "1,024")

    def test_the_end_of_a_run_and_its_optimizer_decide(self):
        self.log(240, 20)
        path = self.run_dir / "metrics.jsonl"
        lines = read_metrics(path)
        for event in [e for e in lines if e["event"] == "noise_scale"][:8]:  # of 12, so that a third is left
            event["ghost_square"], event["mean_square"] = [2.0] * 3, [1.9] * 3
        path.write_text("".join(json.dumps(e) + "\n" for e in lines))
        _, (lars,) = batch_size.propose_from_run(self.run_dir, [4096])
        self.assertAllClose(lars.efficiency, 1 / (1 + 4096 / 7467), rtol=0.1)
        self.write_config(optimizer="adam")
        _, (adam,) = batch_size.propose_from_run(self.run_dir, [4096])
        self.assertEqual(adam.learning_rate, lars.learning_rate)
        self.write_config(optimizer="momentum")
        _, (sgd,) = batch_size.propose_from_run(self.run_dir, [4096])
        self.assertAllClose((lars.learning_rate / 5) ** 2, sgd.learning_rate / 5, rtol=1e-6)

    @parameterized.parameters(1, 4)
    def test_the_warm_up_of_a_run(self, per_call):
        """It is counted in updates, not lines; schedules reach the peak in its last update."""
        self.log(400, 50, per_call)
        log = read_metrics(self.run_dir / "metrics.jsonl")
        for e in log:
            if e["event"] == "update":
                e["learning_rate"] = min(e["update"] / 80, (480 - e["update"]) / 400) if e["update"] != 40 else None
        (self.run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        _, (itself,) = batch_size.propose_from_run(self.run_dir, [256])
        self.assertEqual((itself.learning_rate, itself.updates, itself.warmup_updates), (1.0, 400, 80))

    def test_the_rates_of_a_run_that_logs_few_of_them(self):
        """Take them from the plan: with 100 updates per call, the log has none near the peak."""
        self.log(400, 100, 100)
        path = self.run_dir / "metrics.jsonl"
        log = read_metrics(path)
        falling = [e | {"learning_rate": (480 - e["update"]) / 400} if e["event"] == "update" else e for e in log]
        path.write_text("".join(json.dumps(e) + "\n" for e in falling))
        self.write_config(peak_learning_rate=1.0, warmup_updates=80)
        _, (itself,) = batch_size.propose_from_run(self.run_dir, [256])
        self.assertEqual((itself.learning_rate, itself.updates, itself.warmup_updates), (1.0, 400, 80))
        self.write_config(peak_learning_rate=1.0, warmup_updates=450, steps=500)
        with self.assertRaisesRegex(ValueError, "an update after its warm-up. Received: 400 updates in"):
            batch_size.propose_from_run(self.run_dir, [256])

    def test_a_run_that_was_stopped(self):
        """It counts with the length that it was to have, by its epochs or its steps."""
        self.log(60, 20)
        for length, updates in (({"epochs": 20.0, "steps": None}, 200), ({"epochs": 8.0, "steps": 90}, 90)):
            self.write_config(**length)
            _, (itself,) = batch_size.propose_from_run(self.run_dir, [256])
            self.assertEqual((itself.updates, itself.epochs), (updates, updates / 10))
        path = self.run_dir / "metrics.jsonl"
        log = read_metrics(path)
        rising = [e | {"learning_rate": e["update"] / 80} if e["event"] == "update" else e for e in log]
        path.write_text("".join(json.dumps(e) + "\n" for e in rising))
        with self.assertRaisesRegex(ValueError, "an update after its warm-up. Received: 60 updates in"):
            batch_size.propose_from_run(self.run_dir, [256])

    def test_a_run_with_another_batch_size_before(self):
        self.log(60, 20)
        self.write_config(batch_size=512)
        with self.assertRaisesRegex(ValueError, r"one batch size .* Received: \[256, 512\] in"):
            batch_size.propose_from_run(self.run_dir, [256])

    def test_refusals(self):
        for run in (self.run_dir, self.run_dir / "absent"):  # no line of the noise scale; no run
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(batch_size.main([str(run)]), 2)
            self.assertRegex(err.getvalue(), r"\Abatch_size: error: [^\n]+\n\Z")
        for arguments, code, text in (
            ([], 2, "required: RUN_DIR"),
            ([str(self.run_dir), "word"], 2, "at least 1. Received: word"),
            ([str(self.run_dir), "0"], 2, "at least 1. Received: 0"),
            (["--help"], 0, "usage: python -m lars_keras.report.batch_size"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
                with self.assertRaises(SystemExit) as end:
                    batch_size.main(arguments)
            self.assertEqual(end.exception.code, code)
            self.assertIn(text, said.getvalue())
        with self.assertRaisesRegex(ValueError, "`update_freq` must be at least 2"):
            noise.NoiseScaleLog(None, None, 1)


class ProposalTest(tf.test.TestCase):
    def propose(self, scale, normalized):
        found = NoiseScale(scale, scale, scale, 1.0, scale, 10)
        (proposal,) = batch_size.propose(
            found,
            [4096],
            batch_size=256,
            learning_rate=1.0,
            updates=1600,
            warmup_updates=160,
            num_train=25600,
            normalized=normalized,
        )
        return proposal

    def test_nothing_but_noise_scales_as_the_batch(self):
        """Far below the noise scale 16 times the batch needs a 16th of the updates, at 16 times the rate of SGD."""
        found = self.propose(1e9, False)
        self.assertAllClose((found.learning_rate, found.updates, found.epochs), (16.0, 100, 16.0), rtol=0.011)
        self.assertAllClose(self.propose(1e9, True).learning_rate, 4.0, rtol=1e-4)
        self.assertEqual(found.warmup_updates, 10)

    def test_no_noise_gains_nothing(self):
        found = self.propose(1e-3, False)
        self.assertAllClose((found.learning_rate, found.updates, found.epochs), (1.0, 1600, 256.0), rtol=1e-3)

    def test_between(self):
        """At noise scale 4096: gain = (1 + 16) / (1 + 1)."""
        found = self.propose(4096.0, False)
        self.assertAllClose((found.learning_rate, found.efficiency), (8.5, 0.5))
        self.assertEqual(found.updates, math.ceil(1600 / 8.5))

    def test_a_layerwise_step_moves_as_far_as_sgd_s(self):
        """The step of SGD is rate x gradient; that of LARS is rate x gradient / norm, and the norm falls."""
        scale, b, B = 3000.0, 256, 4096
        norm = [math.sqrt(1 + scale / size) for size in (b, B)]
        sgd, lars = self.propose(scale, False).learning_rate, self.propose(scale, True).learning_rate
        self.assertAllClose(lars / norm[1] / (1.0 / norm[0]), sgd, rtol=1e-12)


if __name__ == "__main__":
    tf.test.main()
