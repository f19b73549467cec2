"""What a run logs and says of its layers."""

import json
import pathlib
import tempfile
import types
import unittest.mock

import keras
import matplotlib.axes
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LAMB, LARS
from lars_keras.layerwise import MEASURES
from lars_keras.report import charts
from lars_keras.report.layers import LayerTelemetry, health
from lars_keras.report.log import MetricsLog, read_metrics
from lars_keras.report.page import write_report
from lars_keras.training import Trainer

norm = np.linalg.norm
LAYERS = [{"path": path, "shape": [4], "adapt": path != "bias"} for path in ("conv", "bias", "dense")]


def event(update, weight=(1.0, 1.0, 1.0), gradient=(1.0, 1.0, 1.0), ratio=(0.1, 1.0, 0.01)):
    return {"update": update, "weight_norm": weight, "gradient_norm": gradient, "ratio": ratio, "rate": ratio}


def adam_step(gradients):
    """Return the step of Adam after these gradients, with the betas and the epsilon of LAMB's defaults."""
    m, v, t = 0.0, 0.0, len(gradients)
    for g in gradients:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)


class TelemetryTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    @parameterized.parameters((LARS, 1), (LAMB, 1), (LARS, 2))
    def test_trainer_logs_what_the_rule_saw(self, optimizer_class, replicas):
        """The norms of a linear model's weights and gradients, worked out in float64 at each logged update."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(32, 6)), rng.normal(size=(32, 3))
        strategy = tf.distribute.MirroredStrategy(
            [f"/cpu:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
        with strategy.scope():
            model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
            model.compile(optimizer_class(0.5, excluded_lr_scale=0.1), "mse")
        trainer = Trainer(model, batch_size=32, microbatch_size=8, trust_ratios=True)
        log, expected, gradients = MetricsLog(self.dir), [], []

        def note_truth(batch, logs=None):
            w, b = (v.numpy().astype("float64") for v in model.trainable_variables)
            residual = 2 * (x @ w + b - y) / y.size
            gradients.append(x.T @ residual)
            expected.append(([norm(w), norm(b)], [norm(gradients[-1]), norm(residual.sum(0))], w))

        trainer.fit(
            tf.data.Dataset.from_tensors((np.float32(x), np.float32(y))).repeat(),
            epochs=1,
            steps_per_epoch=6,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(on_train_batch_begin=note_truth),
                LayerTelemetry(trainer, log, update_freq=2),
                log,
            ],
        )
        logged = [e for e in read_metrics(self.dir / "metrics.jsonl") if e["event"] == "layers"]
        self.assertEqual([e["update"] for e in logged], [2, 4, 6])
        for e in logged:
            weight, gradient, w = expected[e["update"] - 1]
            self.assertAllClose(e["weight_norm"], weight, rtol=2e-5)
            self.assertAllClose(e["gradient_norm"], gradient, rtol=2e-5)
            self.assertEqual(e["ratio"][1], 1.0)
            self.assertAllClose(e["rate"], [0.5 * e["ratio"][0], 0.05], rtol=1e-5)
            if optimizer_class is LARS:
                ratio = 1e-3 * weight[0] / (gradient[0] + 5e-4 * weight[0])
            else:
                ratio = weight[0] / norm(adam_step(gradients[: e["update"]]) + 0.01 * w)
            self.assertAllClose(e["ratio"][0], ratio, rtol=2e-5)

    def test_log_keeps_what_is_not_finite_as_null(self):
        log = MetricsLog(self.dir)
        log.layers(3, ["a", "b"], {name: np.array([np.nan, 1.23456789]) for name in MEASURES})
        line = json.loads((self.dir / "metrics.jsonl").read_text())
        self.assertEqual(line, {"event": "layers", "update": 3} | {name: [None, 1.23457] for name in MEASURES})

    def test_a_skipped_update_is_no_collapse(self):
        log, model = MetricsLog(self.dir), keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        trainer = types.SimpleNamespace(model=model)
        telemetry = LayerTelemetry(trainer, log, update_freq=1)
        for update, scale in ((0, 1.0), (1, 0.0), (2, 2.0)):
            trainer.measures = {name: np.full((1, 2), scale, "f4") for name in MEASURES}
            telemetry.on_train_batch_end(update)
        self.assertEqual([e["update"] for e in read_metrics(self.dir / "metrics.jsonl")], [1, 3])

    def test_health(self):
        def said(*events):
            return " ".join(health(events, LAYERS))

        self.assertEqual(health([], LAYERS), [])
        fine = said(event(1), event(2, weight=(2.0, 1.0, 0.5)))
        self.assertIn("dense has the smallest trust ratio, 0.01, against 0.055 for the median layer", fine)
        self.assertIn("No layer has collapsed or exploded: adapted norms are 0.5 to 2 times", fine)
        self.assertIn("conv has exploded: its norm was 1 at", said(event(1), event(2, weight=(200.0, 1.0, 1.0))))
        self.assertIn("dense has collapsed", said(event(1), event(2, weight=(1.0, 1.0, 0.001))))
        for start in (0.0, 1e-4):  # a bias that starts at zero, first seen before and after its first updates
            grown = [event(1, weight=(1.0, start, 1.0)), event(2, weight=(1.0, 1.0, 1.0))]
            self.assertIn("No layer has collapsed or exploded", said(*grown))
            self.assertIn("bias has exploded", said(*grown, event(3, weight=(1.0, 30.0, 1.0))))
        self.assertIn("bias has exploded", said(event(1), event(2, gradient=(1.0, None, 1.0))))
        self.assertIn("conv gets no gradient", said(event(1, gradient=(0.0, 1.0, 1.0))))

    def test_a_heat_map_of_records_that_are_unevenly_spaced(self):
        """A value that changes between updates 100 and 200 changes there on the axis, at 1.5 % of its width."""
        updates = np.concatenate([np.arange(1, 101), np.arange(200, 10_001, 100)])
        values = np.where(updates[:, None] <= 100, 1.0, 10.0)
        with unittest.mock.patch.object(matplotlib.axes.Axes, "imshow", autospec=True) as drawn:
            drawn.side_effect = RuntimeError("drawn")
            with self.assertRaisesRegex(RuntimeError, "drawn"):
                charts._heat_map("Rate", updates, values, ["dense"])
        (row,), (left, right, *_) = drawn.call_args.args[1], drawn.call_args.kwargs["extent"]
        self.assertEqual((left, right, len(row)), (0.5, 10_050, charts.COLUMNS))
        self.assertAllEqual(row[:3], [1, 1, 1])
        self.assertAllEqual(row[4:], [10] * (charts.COLUMNS - 4))

    def test_the_running_mean_of_a_curve(self):
        values = np.random.default_rng(0).normal(size=200)
        values[[50, 120]] = np.nan
        expected = np.convolve(values, np.full(9, 1 / 9), "valid")
        self.assertAllClose(charts._running_mean(values, 9), expected, rtol=1e-12, atol=1e-14)
        self.assertEqual(np.isnan(expected).sum(), 18)

    def test_report_has_words_and_heat_maps(self):
        layers = [*LAYERS[:-1], LAYERS[-1] | {"path": "dense$x_{b$"}]  # no formula
        plan = [{**layer, "shape": [2, 2], "decay": True, "lr_scale": 1.0} for layer in layers]
        (self.dir / "config.json").write_text(json.dumps({"layer_plan": plan}))
        log = MetricsLog(self.dir)
        for update in range(1, 4):
            values = event(update)
            log.layers(update, [layer["path"] for layer in layers], {name: np.array(values[name]) for name in MEASURES})
        page = write_report(self.dir).read_text()
        self.assertIn("dense$x_{b$ has the smallest trust ratio", page)
        for title in ("Trust ratio", "Effective rate", "Gradient norm over weight norm"):
            self.assertIn(f"<figcaption>{title}</figcaption>", page)
        self.assertIn("a heat map from 0.01 to 0.1", page)
        self.assertEqual(write_report(self.dir).read_text(), page)


if __name__ == "__main__":
    tf.test.main()
