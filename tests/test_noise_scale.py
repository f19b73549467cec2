"""The estimator of the gradient noise scale, against closed forms."""

import math
import warnings

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import noise_scale
from lars_keras.noise_scale import NoiseScale, NoiseScaleEstimator


def measured(rng, gradient, deviation, ghost_batch, ghosts, updates):
    """Feed updates of normal example gradients, with mean `gradient` and standard deviation `deviation`."""
    estimator = NoiseScaleEstimator(ghost_batch, ghost_batch * ghosts)
    for _ in range(updates):
        means = gradient + rng.normal(size=(ghosts, gradient.size)) * deviation / math.sqrt(ghost_batch)
        estimator.add([np.square(means).sum(1).mean()], [np.square(means.mean(0)).sum()])
    return estimator


class EstimatorTest(tf.test.TestCase, parameterized.TestCase):
    gradient = np.linspace(-0.3, 0.5, 40)
    deviation = np.linspace(0.5, 3.0, 40)

    @property
    def truth(self):
        return np.square(self.deviation).sum() / np.square(self.gradient).sum()

    @parameterized.parameters((8, 4), (64, 2), (1, 16))
    def test_unbiased(self, ghost_batch, ghosts):
        found = measured(np.random.default_rng(0), self.gradient, self.deviation, ghost_batch, ghosts, 4000).total()
        self.assertAllClose(found.gradient, np.square(self.gradient).sum(), rtol=0.1)
        self.assertAllClose(found.noise, np.square(self.deviation).sum(), rtol=0.03)
        self.assertBetween(self.truth, found.low, found.high)

    def test_interval_covers_as_often_as_it_says(self):
        rng = np.random.default_rng(1)
        inside = 0
        for _ in range(400):
            found = measured(rng, self.gradient, self.deviation, 16, 8, 60).total()
            inside += found.low <= self.truth <= found.high
        self.assertBetween(inside / 400, 0.92, 0.98)

    def test_linear_regression(self):
        """At weights `w` the gradient of an example is `x (x.w - y)`; for normal x and y = noise, covariance is known.

        With x ~ N(0, I) and residual r = x.w - e, e ~ N(0, s^2): E[x r] = w, and
        E[r^2 x x^T] = (|w|^2 + s^2) I + 2 w w^T, so S = d (|w|^2 + s^2) + 2 |w|^2 - |w|^2.
        """
        rng = np.random.default_rng(2)
        w, s, b, ghosts = np.linspace(0.2, 1.0, 10), 2.0, 32, 8
        estimator = NoiseScaleEstimator(b, b * ghosts)
        for _ in range(500):
            x = rng.normal(size=(ghosts, b, w.size))
            residual = x @ w - s * rng.normal(size=(ghosts, b))
            g = (x * residual[..., None]).mean(1)
            estimator.add(np.square(g).mean(0), np.square(g.mean(0)))
        square = np.square(w).sum()
        truth = (w.size * (square + s**2) + square) / square
        found = estimator.total()
        self.assertBetween(truth, found.low, found.high)
        self.assertLess((found.high - found.low) / truth, 0.15)
        each = estimator.by_variable()
        self.assertAllClose(sum(v.gradient for v in each), found.gradient)
        self.assertAllClose(sum(v.noise for v in each), found.noise)

    def test_the_estimators_of_the_paper(self):
        ghost, mean = np.array([10.0]), np.array([3.0])
        right = noise_scale.unbiased(ghost, mean, 8, 64)
        self.assertAllClose(right, ([(64 * 3 - 80) / 56], [7 / (1 / 8 - 1 / 64)]))

    def test_few_updates(self):
        """Tables of Student's t, also where the series would be a quarter off."""
        for degrees, expected in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (19, 2.0930)):
            self.assertAllClose(noise_scale._student_quantile(0.975, degrees), expected, rtol=1e-2)
        for confidence in (0.0, 1.0, 95):
            with self.assertRaisesRegex(ValueError, "must be in .0, 1.. Received: confidence="):
                noise_scale.ratio_with_interval(np.ones(3), np.ones(3), confidence)

    def test_less_confidence_is_a_narrower_interval(self):
        rng = np.random.default_rng(0)
        estimator = NoiseScaleEstimator(8, 64)
        for _ in range(40):
            estimator.add([10.0 + rng.normal()], [3.0 + 0.1 * rng.normal()])
        wide, narrow = estimator.total(), estimator.total(0.5)
        self.assertEqual(narrow.value, wide.value)
        self.assertTrue(wide.low < narrow.low < narrow.value < narrow.high < wide.high)

    def test_not_finite_updates_are_left_out(self):
        estimator = NoiseScaleEstimator(8, 64)
        estimator.add([1.0, 2.0], [0.5, math.nan])
        self.assertEmpty(estimator)
        for of_none in (estimator.total, estimator.by_variable):
            with self.assertRaisesRegex(ValueError, "at least 2 updates. Received: 0"):
                of_none()
        with self.assertRaisesRegex(ValueError, "at least 2 updates"):
            estimator.add([1.0, 2.0], [0.5, 0.5])
            estimator.total()

    def test_one_ghost_batch_is_refused(self):
        with self.assertRaisesRegex(ValueError, "choose a smaller `microbatch_size`"):
            NoiseScaleEstimator(64, 64)

    def test_no_gradient(self):
        found = measured(np.random.default_rng(3), 0.0 * self.gradient, self.deviation, 8, 4, 50).total()
        self.assertEqual(found.high, math.inf)
        self.assertGreater(found.low, 0)

    @parameterized.parameters(
        ([1.0, 1.0], [1.0, 1.0], 0.0, 0.0, 0.0),
        ([1.0, 1.0], [1.0, 1.0 - 1e-9], 5e-10 * 64 / 7, 0.0, math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf, 0.0, math.inf),
        ([1.0, 1.1], [0.01, 0.01], math.inf, math.inf, math.inf),
    )
    def test_no_noise_or_no_gradient(self, ghost, mean, value, low, high):
        """Identical ghost batches; the same but for rounding; zeros; a mean smaller than by chance."""
        estimator = NoiseScaleEstimator(8, 64)
        for g, m in zip(ghost, mean, strict=True):
            estimator.add([g], [m])
        with warnings.catch_warnings(action="error"):
            found = estimator.total()
            self.assertNotIn("nan", found.describe(64, 1.0))
        self.assertAllClose((found.value, found.low, found.high), (value, low, high))


class MeaningTest(tf.test.TestCase, parameterized.TestCase):
    found = NoiseScale(2900.0, 2400.0, 3500.0, 1.0, 2900.0, 100)

    def test_sentence(self):
        self.assertEqual(
            self.found.describe(8192, 3),
            "Noise scale 2,900 (2,400 to 3,500) at epoch 3: at batch 8,192 each example contributes 26 % as much "
            "progress as in a small batch; 2,048 would keep 59 %.",
        )
        self.assertIn("1,024 would still keep 74 %", self.found.describe(256, 3))
        self.assertIn("2,900 (2,400 to 3,500) from epoch 2 to 3: at", self.found.describe(256, 3, since=2))
        self.assertIn("2,900 (2,400 to 3,500) at epoch 3: at", self.found.describe(256, 3, since=3))
        nothing = NoiseScale(math.inf, 500.0, math.inf, -1.0, 1.0, 10)
        self.assertIn("above 500", nothing.describe(256, 3))
        nothing = NoiseScale(math.inf, math.inf, math.inf, -1.0, 1.0, 10)
        self.assertEqual(
            nothing.describe(256, 3),
            "The noise scale at epoch 3 could not be bounded: no gradient stands out of the noise.",
        )
        self.assertEqual(
            NoiseScale(0.0, 0.0, 0.0, 1.0, 0.0, 10).describe(256, 3),
            "Noise scale 0 (0 to 0) at epoch 3: a batch of any size makes less than twice the progress of one example.",
        )

    def test_gain_is_adascale_s(self):
        """Gain = (sigma^2 + mu^2) / (sigma^2 / k + mu^2), of gradients at the small batch; k = large / small."""
        small, large, mu2, trace = 256, 8192, 2.0, 5000.0
        sigma2, k = trace / small, large / small
        expected = (sigma2 + mu2) / (sigma2 / k + mu2)
        found = NoiseScale(trace / mu2, 0.0, 0.0, mu2, trace, 2)
        self.assertAllClose(found.gain(small, large), expected, rtol=1e-12)
        self.assertEqual(NoiseScale(math.inf, 0, math.inf, 0, 1, 2).gain(small, large), k)

    def test_student_quantiles(self):
        for p, degrees, expected in ((0.975, 19, 2.0930), (0.975, 9, 2.2622), (0.95, 5, 2.0150)):
            self.assertAllClose(noise_scale._student_quantile(p, degrees), expected, rtol=1e-2)


if __name__ == "__main__":
    tf.test.main()
