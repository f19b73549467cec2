"""Schedules against their formulas in NumPy, durations and the scaling rules."""

import math

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LARS, schedules

# A warm-up of 4 updates from 0.5 to 8, then 16 updates of decay to 1.
WARM = {"peak": 8.0, "warmup_updates": 4, "start": 0.5}
DECAYING = {
    "polynomial": (schedules.WarmupPolynomial, {"total_updates": 20, "power": 3.0, "end": 1.0}),
    "cosine": (schedules.WarmupCosine, {"total_updates": 20, "end": 1.0}),
    "exponential": (schedules.WarmupExponential, {"total_updates": 20, "end": 1.0}),
    "step": (schedules.WarmupStep, {"boundaries": [4, 9, 15], "factor": 0.5}),
}


def expected_rate(name, t):
    if t < 4:
        return 0.5 + 7.5 * (t + 1) / 4
    x = min((t - 4) / 16, 1.0)
    return {
        "polynomial": 1 + 7 * (1 - x) ** 3,
        "cosine": 1 + 7 * (1 + math.cos(math.pi * x)) / 2,
        "exponential": 8 * (1 / 8) ** x,
        "step": 8 * 0.5 ** sum(t >= b for b in (4, 9, 15)),
    }[name]


class SchedulesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*DECAYING)
    def test_every_update(self, name):
        make, arguments = DECAYING[name]
        schedule = make(**WARM, **arguments)
        compiled = tf.function(schedule)
        for t in range(30):
            rate = schedule(t)
            self.assertEqual(keras.backend.standardize_dtype(rate.dtype), "float32")
            self.assertAllClose(rate, expected_rate(name, t), rtol=1e-6, atol=0)
            # As the optimizer calls it: with its int64 counter, inside a graph.
            self.assertAllClose(compiled(tf.constant(t, "int64")), rate, rtol=1e-6, atol=0)

    def test_defaults_are_those_of_the_paper(self):
        """Power 2 from 0 through the peak, exactly reached by the last update of the warm-up, to 0."""
        schedule = schedules.WarmupPolynomial(10.0, 5, 25)
        rates = [float(schedule(t)) for t in range(30)]
        self.assertAllClose(rates[:5], [2, 4, 6, 8, 10], rtol=1e-6)
        self.assertEqual((rates[4], rates[5]), (10.0, 10.0))
        self.assertAllClose(rates[15], 2.5, rtol=1e-6)
        self.assertEqual(rates[25:], [0.0] * 5)

    @parameterized.parameters(*DECAYING)
    def test_without_warmup(self, name):
        make, arguments = DECAYING[name]
        schedule = make(8.0, 0, **(arguments | {"boundaries": [3]} if name == "step" else arguments))
        self.assertEqual(float(schedule(0)), 8.0)
        self.assertLess(float(schedule(3)), 8.0)

    @parameterized.parameters(*DECAYING)
    def test_saved_and_loaded(self, name):
        make, arguments = DECAYING[name]
        schedule = make(**WARM, **arguments)
        self.assertEqual(schedule.get_config(), WARM | arguments)
        config = keras.optimizers.schedules.serialize(schedule)
        optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(LARS(schedule)))
        for again in (keras.optimizers.schedules.deserialize(config), optimizer._learning_rate):
            self.assertIsInstance(again, make)
            self.assertEqual([float(again(t)) for t in range(30)], [float(schedule(t)) for t in range(30)])

    def test_optimizer_reports_the_rate_of_its_next_update(self):
        optimizer = LARS(schedules.WarmupPolynomial(10.0, 5, 25))
        w = keras.Variable(np.ones((2, 2)), dtype="float32")
        rates = []
        for _ in range(6):
            rates.append(float(optimizer.learning_rate))
            optimizer.apply([tf.ones((2, 2))], [w])
        self.assertAllClose(rates, [2, 4, 6, 8, 10, 10], rtol=1e-6)

    @parameterized.parameters(
        ("polynomial", {"peak": -1.0}),
        ("polynomial", {"peak": "8"}),
        ("polynomial", {"peak": float("nan")}),
        ("polynomial", {"warmup_updates": -1}),
        ("polynomial", {"warmup_updates": 2.5}),
        ("polynomial", {"warmup_updates": 20}),
        ("polynomial", {"total_updates": 0}),
        ("polynomial", {"power": 0}),
        ("polynomial", {"start": -0.1}),
        ("polynomial", {"end": -0.1}),
        ("cosine", {"total_updates": 3}),
        ("cosine", {"end": float("inf")}),
        ("exponential", {"peak": 0.0}),
        ("exponential", {"end": 0.0}),
        ("step", {"boundaries": [9, 4]}),
        ("step", {"boundaries": [9, 9]}),
        ("step", {"boundaries": [3]}),
        ("step", {"boundaries": [5.5]}),
        ("step", {"factor": 0.0}),
        ("step", {"factor": 1.5}),
    )
    def test_bad_arguments(self, name, bad):
        make, arguments = DECAYING[name]
        with self.assertRaisesRegex(ValueError, "Received") as raised:
            make(**(WARM | arguments | bad))
        self.assertIn(next(iter(bad)), str(raised.exception))

    @parameterized.parameters(
        ("5 epochs", 2500),
        ("1 epoch", 500),
        ("0.5 epochs", 250),
        ("100 steps", 100),
        ("100 updates", 100),
        ("1 update", 1),
        ("1 step", 1),
        ("100", 100),
        ("1e6 examples", 10_000),
        ("100 examples", 1),
        (100, 100),
        (0, 0),
        ("0 epochs", 0),
        (" 5  epochs ", 2500),
        # A started batch is an update.
        ("101 examples", 2),
        ("0.001 epochs", 1),
    )
    def test_duration_in_updates(self, duration, expected):
        updates = schedules.duration_in_updates(duration, batch_size=100, num_examples=50_000)
        self.assertEqual(updates, expected)
        self.assertIsInstance(updates, int)

    def test_duration_of_epochs_that_a_batch_does_not_divide(self):
        """90 epochs of ImageNet at 32K are 3518.8 batches; 0.1 epochs of 30 examples are 3 examples."""
        convert = schedules.duration_in_updates
        self.assertEqual(convert("90 epochs", batch_size=32_768, num_examples=1_281_167), 3519)
        self.assertEqual(convert("0.1 epochs", batch_size=3, num_examples=30), 1)

    @parameterized.parameters(
        "epochs", "5 days", "-1 epochs", "nan steps", "inf epochs", "1.5 steps", "1e epochs", -3, 2.5, None, ""
    )
    def test_bad_durations(self, duration):
        with self.assertRaisesRegex(ValueError, "Received"):
            schedules.duration_in_updates(duration, batch_size=100, num_examples=1000)

    def test_scaling_rules(self):
        self.assertAllClose(schedules.linear_scaling(0.1, 8192), 3.2, rtol=1e-12)
        self.assertAllClose(schedules.sqrt_scaling(0.1, 4096), 0.4, rtol=1e-12)
        self.assertAllClose(schedules.linear_scaling(0.1, 128, base_batch_size=512), 0.025, rtol=1e-12)
        self.assertAllClose(schedules.sqrt_scaling(0.1, 128, base_batch_size=512), 0.05, rtol=1e-12)
        for scaling in (schedules.linear_scaling, schedules.sqrt_scaling):
            for rate in (float("nan"), -0.1, "0.1", None, True):
                with self.assertRaisesRegex(ValueError, "`base_rate` must be a number"):
                    scaling(rate, 512)
