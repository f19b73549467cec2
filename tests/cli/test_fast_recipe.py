"""Flags of the fast CIFAR-10 recipe: test-time views, rates as factors on the peak."""

import json
import pathlib
import tempfile
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import flags
import models
import train
from lars_keras.training import Trainer
from running.feeds import make_feeds
from running.model import compile_model, make_model
from running.optimizers import make_schedule
from running.views import score_views
from tests.pictures import pictures, small_pictures

ROOT = pathlib.Path(__file__).parents[2]


def views_of(images, count):
    """Return the views of a batch and their weights, in NumPy."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    height, width = images.shape[1:3]
    shifted = [(images, 0.5), (padded[:, :height, :width], 0.25), (padded[:, 2:, 2:], 0.25)]
    for view, weight in shifted if count == 6 else [(images, 1.0)]:
        if count == 1:
            yield view, weight
        else:
            yield view, weight / 2
            yield view[:, :, ::-1], weight / 2


def score_in_padded_batches():
    """Return the score of 23 images in batches of 10 by `score_views`, and what NumPy makes of the views."""
    config = flags.RunConfig(model="lenet1989", batch_size=10, test_views=6, seed=2)
    data = small_pictures()
    model = make_model(config, data)
    compile_model(model, config, data)
    trainer = Trainer(model, batch_size=10)
    _, test_feed = make_feeds(data, trainer, 0)
    scores = score_views(config, data, trainer, test_feed)
    images, labels = data._test
    logits = sum(weight * keras.ops.convert_to_numpy(model(view)) for view, weight in views_of(images, 6))
    return scores, np.float32(np.mean(logits.argmax(1) == labels))


class ViewsTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        keras.utils.clear_session()

    @parameterized.parameters(*models.VIEWS)
    def test_averages_the_logits(self, count):
        model = models.get("lenet1989", num_classes=4, input_shape=(12, 12, 3), seed=1)
        images = pictures(5)[0]
        expected = sum(weight * model(view).numpy() for view, weight in views_of(images, count))
        self.assertAllClose(models.with_views(model, count)(images), expected, atol=1e-5)

    def test_bad_count(self):
        model = models.get("lenet1989", num_classes=4)
        with self.assertRaisesRegex(ValueError, r"one of \(1, 2, 6\). Received: count=3"):
            models.with_views(model, 3)
        with self.assertRaisesRegex(ValueError, "--test_views must be one of 1, 2, 6. Received: --test_views=4"):
            flags.RunConfig(test_views=4)

    def test_padded_batches_are_scored_once(self):  # also on JAX, by tests/jax/test_on_jax.py
        scores, expected = score_in_padded_batches()
        self.assertEqual(scores["test_views"], 6)
        self.assertEqual(scores["top1_views"], expected)

    def test_reported_beside_the_plain_score(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "run"
        with self.mock_data():
            code = train.run(
                [
                    "train.py",
                    "--model=fast_cifar_small",
                    "--batch_size=20",
                    "--steps=2",
                    "--augment=alternating_flip",
                    "--test_views=6",
                    "--jit_compile=off",
                    f"--run_dir={folder}",
                ]
            )
        self.assertEqual(code, 0)
        results = json.loads((folder / "results.json").read_text())
        for name in ("top1", "top5", "loss"):
            self.assertIn(name, results)
            self.assertIn(f"{name}_views", results)
        self.assertEqual((results["test_views"], results["n"]), (6, 23))

    def mock_data(self):
        return unittest.mock.patch.object(train.datasets, "load", lambda *_, **__: small_pictures("alternating_flip"))


class RateTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("polynomial", "cosine", "exponential", "step")
    def test_warm_up_starts_above_0(self, name):
        options = {} if name == "step" else {"end": 0.5}
        schedule = make_schedule(name, peak=10.0, warmup_updates=4, total_updates=40, start=2.0, **options)
        self.assertAllClose([float(schedule(t)) for t in range(4)], [4, 6, 8, 10])

    def test_factors_on_the_peak(self):
        config = flags.RunConfig(
            model="fast_cifar_small",
            batch_size=20,
            steps=10,
            warmup="4 steps",
            power=1.0,
            learning_rate=10.0,
            initial_lr_scale=0.2,
            end_lr_scale=0.1,
            excluded_lr_scale=4.0,
        )
        data = small_pictures()
        model = make_model(config, data)
        compile_model(model, config, data)
        rates = [float(model.optimizer._learning_rate(t)) for t in (0, 3, 4, 10)]
        self.assertAllClose(rates, [4, 10, 10, 1])
        scales = {role.lr_scale for role in model.optimizer.layer_plan() if "beta" in role.path}
        self.assertEqual(scales, {4.0})

    def test_lookahead(self):
        data = small_pictures()
        config = flags.RunConfig(model="lenet1989", batch_size=20, steps=5, ema_momentum=0.5, ema_overwrite_every=3)
        model = make_model(config, data)
        compile_model(model, config, data)
        self.assertEqual((model.optimizer.ema_momentum, model.optimizer.ema_overwrite_frequency), (0.5, 3))
        with self.assertRaisesRegex(ValueError, "needs --ema_momentum. Received: --ema_overwrite_every=3"):
            flags.RunConfig(ema_overwrite_every=3)

    def test_two_last_rates(self):
        with self.assertRaisesRegex(ValueError, "give one. Received: --end_lr_scale=0.1 --end_learning_rate=1"):
            flags.RunConfig(end_lr_scale=0.1, end_learning_rate=1.0)
