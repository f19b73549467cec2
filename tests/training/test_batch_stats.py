"""The moments of batch normalization in one pass, against float64."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training.batch_stats import one_pass_moments


def layer_at(moving_mean, **options):
    layer = keras.layers.BatchNormalization(momentum=0.5, **options)
    model = keras.Sequential([keras.Input([4, 4, 3]), layer])
    layer.moving_mean.assign(moving_mean)
    return model, layer


class MomentsTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # Means far from 0, where E[x^2] - E[x]^2 in float32 is wrong by a hundredth of the variance and more.
        self.mean = np.array([0.0, 300.0, -1000.0])
        self.x = (self.mean + np.random.default_rng(0).normal(size=[8, 4, 4, 3])).astype("float32")
        self.near = self.mean + 0.5

    def moments_and_gradient(self, over_replicas=None, mask=None, **options):
        """Mean, variance, and the gradient of `sum([1, 2, 3] * mean + [4, 5, 6] * variance)`."""
        model, layer = layer_at(self.near, **options)
        with one_pass_moments(model, over_replicas), tf.GradientTape() as tape:
            x = tf.constant(self.x)
            tape.watch(x)
            mean, variance = layer._moments(x, mask)
            y = tf.reduce_sum([1.0, 2.0, 3.0] * mean) + tf.reduce_sum([4.0, 5.0, 6.0] * variance)
        return mean, variance, tape.gradient(y, x)

    def check_moments_and_gradient(self, gradient_tolerance):
        """Compare with float64; the tolerance is relative to the largest element of the gradient."""
        mean, variance, gradient = self.moments_and_gradient()
        x = self.x.astype("float64")
        self.assertAllClose(mean, x.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
        self.assertAllClose(variance, x.var((0, 1, 2)), rtol=1e-6)
        n = x.size / 3
        expected = np.array([1.0, 2.0, 3.0]) / n + np.array([4.0, 5.0, 6.0]) * 2 * (x - x.mean((0, 1, 2))) / n
        self.assertAllClose(gradient, expected, rtol=0, atol=gradient_tolerance * np.abs(expected).max())

    def test_moments(self):
        self.check_moments_and_gradient(1e-5)

    def test_no_mean_cancels_the_variance(self):
        """A fresh moving mean of 0, and inputs at any mean, as one program of XLA."""
        for mean, dtype, axis in (
            (0.0, "float32", -1),
            (1e3, "float32", -1),
            (-1e4, "float32", 1),
            (1e4, "float32", -1),
            (1e4, "bfloat16", -1),
            (1e5, "float32", -1),
            (1e9, "float64", -1),
        ):
            with self.subTest(mean=mean, dtype=dtype, axis=axis):
                x = tf.cast(self.x - self.mean.astype("float32") + mean, dtype)
                exact = tf.cast(x, tf.float64).numpy()
                expected = exact.mean(self.others(axis)), exact.var(self.others(axis))
                moments = self.compiled(x, axis)
                # The mean is rounded to 2^-24; the differences of the inputs from it are exact.
                rtol = {"float64": 1e-12}.get(dtype, 1e-6)
                self.assertAllClose(moments[0], expected[0], rtol=rtol / 5, atol=1e-6)
                self.assertAllClose(moments[1], expected[1], rtol=5 * rtol, atol=0)
        mask = np.broadcast_to(np.arange(8)[:, None, None] >= 3, [8, 4, 4])
        x = np.float32(self.x - self.mean.astype("float32") + 1e4)
        x[1] = np.nan
        self.assertAllClose(
            self.compiled(tf.constant(x), -1, tf.constant(mask))[1], x[3:].astype("f8").var((0, 1, 2)), rtol=5e-6
        )

    def test_gradient_far_from_the_moving_mean(self):
        self.near = np.zeros(3)
        self.check_moments_and_gradient(1000 * 2**-23)

    def compiled(self, x, axis, mask=None):
        """Mean and variance that a layer gives, compiled; in training they become its moving statistics."""
        layer = keras.layers.BatchNormalization(
            momentum=0.0, axis=axis, dtype="float64" if x.dtype == tf.float64 else None
        )
        model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), layer])

        @tf.function(jit_compile=True)
        def moments():
            with one_pass_moments(model, None):
                layer(x, mask=mask, training=True)

        moments()
        return layer.moving_mean.numpy(), layer.moving_variance.numpy()

    def others(self, axis):
        return tuple(i for i in range(4) if i != axis % 4)

    def test_masked_examples_do_not_count(self):
        mask = np.arange(8)[:, None, None] < np.array([5])
        self.x[6, 1] = np.nan
        mean, variance, gradient = self.moments_and_gradient(mask=tf.constant(np.broadcast_to(mask, [8, 4, 4])))
        x = self.x[:5].astype("float64")
        self.assertAllClose(mean, x.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
        self.assertAllClose(variance, x.var((0, 1, 2)), rtol=1e-6)
        self.assertAllEqual(gradient[5:], np.zeros([3, 4, 4, 3]))

    def test_over_replicas(self):
        """A layer with `synchronized=True` beside another replica, near the moving mean and far from it."""
        other = (np.random.default_rng(1).normal(size=[24, 4, 4, 3]) + self.mean).astype("float32").astype("float64")
        whole = np.concatenate([self.x.astype("float64"), other])
        for near, calls in ((self.mean + 0.5, 1), (np.zeros(3), 2)):
            self.near = near
            shifts = iter([self.near, whole.mean((0, 1, 2))])

            def over_replicas(sums, shifts=shifts):
                x = other - next(shifts)
                theirs = [np.full(3, x.size / 3), x.sum((0, 1, 2)), (x**2).sum((0, 1, 2))]
                return [own + tf.constant(their, tf.float32) for own, their in zip(sums, theirs, strict=True)]

            mean, variance, _ = self.moments_and_gradient(over_replicas, synchronized=True)
            self.assertAllClose(mean, whole.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
            self.assertAllClose(variance, whole.var((0, 1, 2)), rtol=1e-6)
            self.assertLen(list(shifts), 2 - calls)
            mean, _, _ = self.moments_and_gradient(over_replicas)
            self.assertAllClose(mean, self.x.astype("float64").mean((0, 1, 2)), rtol=1e-6, atol=1e-6)

    @parameterized.parameters(False, True)
    def test_a_layer_in_training(self, compiled):
        """Outputs and moving statistics, against Keras's own."""
        results = []
        for one_pass in (False, True):
            model, layer = layer_at(self.near)

            def call(x, model=model, one_pass=one_pass):
                if not one_pass:
                    return model(x, training=True)
                with one_pass_moments(model, None):
                    return model(x, training=True)

            y = tf.function(call, jit_compile=compiled)(tf.constant(self.x))
            results.append([y, layer.moving_mean.numpy(), layer.moving_variance.numpy()])
        for own, expected in zip(*results, strict=True):
            self.assertAllClose(own, expected, rtol=1e-6, atol=3e-4)

    def test_afterwards_layers_are_as_they_were(self):
        model, layer = layer_at(self.near)
        with self.assertRaisesRegex(RuntimeError, "within"), one_pass_moments(model, None):
            self.assertIn("_moments", vars(layer))
            raise RuntimeError("within")
        self.assertNotIn("_moments", vars(layer))

    def test_without_replicas_synchronized_layers_stay_with_keras(self):
        model, layer = layer_at(self.near, synchronized=True)
        with one_pass_moments(model, None):
            self.assertNotIn("_moments", vars(layer))
