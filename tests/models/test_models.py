"""Models: sizes, initial values, numerics, precision, storage and errors."""

import functools
import os
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import models
from models.alexnet import GroupedConv2D
from models.lrn import LocalResponseNormalization

SMALL = ("alexnet_small", "alexnet_small_lrn")
TRAINABLE = ("alexnet_small", "alexnet_small_lrn", "resnet18")
PADDED = (*SMALL, "lenet1989", "resnet18", "resnet50")  # build at any size, so the smallest one is a choice
ROOT = Path(__file__).parents[2]


def parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def kernels(model):
    return {v.path.split("/")[0]: v.numpy() for v in model.weights if v.name == "kernel"}


def images(shape, n=8):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype="uint8")


def loss_and_gradients(model, x, y):
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
    return loss, tape.gradient(loss, model.trainable_variables)


class ModelTestCase(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        keras.utils.clear_session()

    def tearDown(self):
        keras.config.set_dtype_policy("float32")
        super().tearDown()


class RegistryTest(ModelTestCase):
    def test_names_and_sizes(self):
        sizes = {name: models.default_image_size(name) for name in models.names()}
        self.assertEqual(
            sizes,
            {
                "alexnet": 227,
                "alexnet_bn": 227,
                "alexnet_small": 32,
                "alexnet_small_lrn": 32,
                "fast_cifar": 32,
                "fast_cifar_gelu": 32,
                "fast_cifar_medium": 32,
                "fast_cifar_small": 32,
                "lenet1989": 16,
                "resnet18": 32,
                "resnet50": 224,
            },
        )

    @parameterized.parameters(
        ({"name": "vgg"}, "alexnet, alexnet_bn, .*resnet50. Received: name='vgg'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 2.5}, "num_classes=2.5"),
        ({"input_shape": (15, 16, 1)}, r"at least 16 x 16 .*\(15, 16, 1\)"),
        ({"input_shape": (None, None, 3)}, "three positive integers"),
        ({"input_shape": (32, 32)}, "three positive integers"),
        ({"mean": (1.0, 2.0)}, "`mean` must be a number or one number for each of the 3"),
        ({"std": 0.0}, "`std` must be > 0. Received: std=0.0"),
    )
    def test_bad_argument(self, arguments, message):
        arguments = {"name": "alexnet_small", "num_classes": 10} | arguments
        with self.assertRaisesRegex(ValueError, message):
            models.get(**arguments)

    def test_channels_first_is_refused(self):
        self.addCleanup(keras.config.set_image_data_format, keras.config.image_data_format())
        keras.config.set_image_data_format("channels_first")
        with self.assertRaisesRegex(ValueError, "channels last.*Received: channels_first"):
            models.get("lenet1989", num_classes=10, input_shape=(16, 16, 3))

    def test_size_of_unknown_model(self):
        with self.assertRaisesRegex(ValueError, "Received: name='vgg'"):
            models.default_image_size("vgg")

    @parameterized.parameters(*models.names())
    def test_min_size(self, name):
        """Build at it; one pixel less is refused, and does not build where convolutions are not padded."""
        spec = models._SPECS[name]
        for shape in ((spec.min_size, spec.min_size - 1, 3), (spec.min_size - 1, spec.min_size, 3)):
            with self.assertRaisesRegex(ValueError, "too small"):
                models.get(name, num_classes=2, input_shape=shape)
        models.get(name, num_classes=2, input_shape=(spec.min_size, spec.min_size, 3))
        unchecked = unittest.mock.patch.dict(models._SPECS, {name: spec._replace(min_size=1)})
        for shape in ((spec.min_size, spec.min_size - 1, 3), (spec.min_size - 1, spec.min_size, 3)):
            if name not in PADDED:
                with unchecked, self.assertRaises(ValueError):
                    models.get(name, num_classes=2, input_shape=shape)


class SizeTest(ModelTestCase):
    def test_alexnet(self):
        model = models.get("alexnet", num_classes=1000, seed=1)
        self.assertEqual(parameters(model), 60_965_224)
        self.assertEqual(model.output_shape, (None, 1000))
        self.assertEqual(model.get_layer("flatten").output.shape, (None, 6 * 6 * 256))
        self.assertEqual(model.get_layer("conv2").kernel.shape, (5, 5, 48, 256))
        # N(0, 0.01), and N(0, 0.005) for fc6 and fc7: the first column of the LARS paper's table 2.
        expected = {
            "conv1": 1.867,
            "conv2": 5.543,
            "conv3": 9.406,
            "conv4": 8.146,
            "conv5": 6.651,
            "fc6": 30.72,
            "fc7": 20.48,
            "fc8": 20.24,
        }
        norms = {name: float(np.linalg.norm(kernel)) for name, kernel in kernels(model).items()}
        self.assertEqual(norms.keys(), expected.keys())
        for name, norm in expected.items():
            self.assertAllClose(norms[name], norm, rtol=0.01, msg=name)
        biases = {v.path: float(v.numpy().mean()) for v in model.weights if v.name == "bias"}
        ones = ("conv2", "conv4", "conv5", "fc6", "fc7")
        for path, bias in biases.items():
            self.assertAllClose(bias, 0.1 if path.split("/")[0] in ones else 0.0, msg=path)
        # Unscaled pixels: only the mean is subtracted.
        self.assertAllEqual(model.get_layer("normalize")(np.full((1, 1, 1, 3), 200)), [[[[72.5] * 3]]])

    def test_alexnet_bn(self):
        model = models.get("alexnet_bn", num_classes=1000)
        channels = 96 + 256 + 384 + 384 + 256
        # The convolutions lose their biases and gain a scale and a shift a channel.
        self.assertEqual(parameters(model), 60_965_224 - channels + 2 * channels)
        self.assertEqual(model.count_params(), parameters(model) + 2 * channels)

    def test_resnet18(self):
        model = models.get("resnet18", num_classes=10)
        self.assertEqual(parameters(model), 11_173_962)
        self.assertEqual(model.get_layer("block4b_out").output.shape, (None, 4, 4, 512))

    def test_resnet50(self):
        model = models.get("resnet50", num_classes=1000)
        self.assertEqual(parameters(model), 25_557_032)
        self.assertEqual(model.get_layer("block4c_out").output.shape, (None, 7, 7, 2048))
        # v1.5: the 3x3 convolution strides.
        self.assertEqual(model.get_layer("block2a_conv1").strides, (1, 1))
        self.assertEqual(model.get_layer("block2a_conv2").strides, (2, 2))
        gammas = {v.path: v.numpy() for v in model.trainable_variables if v.name == "gamma"}
        zero = {path for path, gamma in gammas.items() if not gamma.any()}
        self.assertEqual(zero, {path for path in gammas if "bn3" in path})
        self.assertLen(zero, 16)


class BehaviorTest(ModelTestCase):
    def test_pixels_are_normalized_on_their_scale(self):
        model = models.get("alexnet_small", num_classes=2, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
        x = np.full((1, 1, 1, 3), 40, dtype="uint8")
        self.assertAllClose(model.get_layer("normalize")(x), [[[[30.0, 10.0, 2.5]]]], rtol=1e-6)
        self.assertEqual(model.input.dtype, "uint8")

    @parameterized.parameters(*TRAINABLE)
    def test_seed_decides_everything(self, name):
        def build(seed, global_seed):
            keras.utils.set_random_seed(global_seed)
            return models.get(name, num_classes=4, input_shape=(16, 16, 3), seed=seed)

        x = images((16, 16, 3))
        a, b, other = build(7, 1), build(7, 2), build(8, 1)
        self.assertAllEqual(a(x, training=True), b(x, training=True))
        for u, v in zip(a.weights, b.weights, strict=True):
            self.assertAllEqual(u, v)
        every = list(kernels(a).values()) + list(kernels(other).values())
        self.assertLen({k.ravel()[:9].tobytes() for k in every}, len(every))

    def test_no_seed_follows_the_global_one(self):
        weights = []
        for global_seed in (1, 1, 2):
            keras.utils.set_random_seed(global_seed)
            model = models.get("alexnet_small", num_classes=4, input_shape=(16, 16, 1))
            weights.append(model.get_layer("fc6").kernel.numpy())
        self.assertAllEqual(weights[0], weights[1])
        self.assertNotAllClose(weights[0], weights[2])

    @parameterized.parameters(*TRAINABLE)
    def test_sync_batch_norm(self, name):
        for sync in (False, True):
            model = models.get(name, num_classes=4, input_shape=(16, 16, 1), sync_batch_norm=sync)
            flags = [layer.synchronized for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
            self.assertEqual(bool(flags), name != "alexnet_small_lrn")
            self.assertEqual(set(flags), {sync} if flags else set())

    @staticmethod
    @functools.cache
    def full_precision(name):
        return models.get(name, num_classes=4, input_shape=(16, 16, 1), seed=0)

    @parameterized.product(name=TRAINABLE, policy=("mixed_bfloat16", "mixed_float16"))
    def test_half_precision_gives_float32_logits(self, name, policy):
        full = self.full_precision(name)
        keras.config.set_dtype_policy(policy)
        half = models.get(name, num_classes=4, input_shape=(16, 16, 1), seed=0)
        x = images((16, 16, 1))
        self.assertEqual(half.get_layer("conv1").compute_dtype, policy.removeprefix("mixed_"))
        logits = half(x)
        self.assertEqual(logits.dtype, tf.float32)
        rounding = 2.0 ** (-8 if policy == "mixed_bfloat16" else -11)
        reference = full(x).numpy()
        self.assertAllClose(logits, reference, atol=16 * rounding * np.abs(reference).max(), rtol=0)

    @parameterized.product(name=SMALL, policy=("mixed_bfloat16", "mixed_float16"))
    def test_half_precision_gives_float32_gradients(self, name, policy):
        keras.config.set_dtype_policy(policy)
        model = models.get(name, num_classes=4, input_shape=(16, 16, 1), seed=0)
        _, gradients = tf.function(loss_and_gradients)(model, images((16, 16, 1)), np.arange(8) % 4)
        for gradient in gradients:
            self.assertEqual(gradient.dtype, tf.float32)
            self.assertTrue(np.isfinite(gradient).all())

    @parameterized.parameters(*TRAINABLE)
    def test_saved_model_is_complete(self, name):
        model = models.get(name, num_classes=4, input_shape=(16, 16, 3), mean=100.0, std=50.0)
        x = images((16, 16, 3))
        path = os.path.join(tempfile.mkdtemp(dir=self.get_temp_dir()), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertAllEqual(loaded(x), model(x))

    def test_an_exported_model_gives_the_same_logits(self):
        """Export as docs/running.md does, and load without Keras."""
        for name in ("alexnet_small_lrn", "fast_cifar_small"):
            model = models.get(name, input_shape=(32, 32, 3), num_classes=10, seed=0)
            x = images((32, 32, 3))
            with tempfile.TemporaryDirectory() as folder:
                model.export(folder, verbose=False)
                loaded = tf.saved_model.load(folder)
                self.assertAllClose(loaded.serve(x), model(x, training=False), rtol=1e-5, atol=1e-5)

    @parameterized.parameters(*SMALL)
    def test_graph_and_xla_give_the_same_gradients(self, name):
        x, y = images((16, 16, 1)), np.arange(8) % 4
        results = []
        for jit in (False, True):
            model = models.get(name, num_classes=4, input_shape=(16, 16, 1), seed=0)
            for layer in model.layers:
                if isinstance(layer, keras.layers.Dropout):
                    layer.rate = 0.0  # XLA draws other masks.
            results.append(tf.function(loss_and_gradients, jit_compile=jit)(model, x, y))
        (loss, gradients), (xla_loss, xla_gradients) = results
        self.assertAllClose(xla_loss, loss, rtol=1e-5)
        for v, gradient, xla in zip(model.trainable_variables, gradients, xla_gradients, strict=True):
            norm = np.linalg.norm(gradient)
            self.assertGreater(norm, 0, msg=v.path)
            self.assertLess(np.linalg.norm(xla - gradient), 1e-4 * norm, msg=v.path)

    @pytest.mark.slow
    def test_jax_backend(self):
        script = """
import jax, keras, numpy as np, models
x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype="uint8")
y = np.arange(8) % 4
for name in ("alexnet_small", "alexnet_small_lrn"):
    model = models.get(name, num_classes=4, input_shape=(16, 16, 1), seed=0)
    def loss(trainable, fixed):
        logits, _ = model.stateless_call(trainable, fixed, x, training=True)
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, True))
    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    gradients = jax.jit(jax.grad(loss))(trainable, fixed)
    for v, g in zip(model.trainable_variables, gradients, strict=True):
        assert np.isfinite(g).all() and np.any(g), v.path
    print(name, "ok")
"""
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(result.returncode, 0, msg=result.stderr)
        self.assertEqual(result.stdout.split(), [w for name in SMALL for w in (name, "ok")])


class GroupedConv2DTest(ModelTestCase):
    @parameterized.parameters(False, True)
    def test_equals_a_convolution_with_a_block_diagonal_kernel(self, jit):
        layer = GroupedConv2D(6, 3, groups=2, strides=2, padding="same", activation="relu")
        layer.build((None, 9, 9, 8))
        kernel = layer.kernel.numpy()
        self.assertEqual(kernel.shape, (3, 3, 4, 6))
        dense = np.zeros((3, 3, 8, 6), "float32")
        dense[:, :, :4, :3] = kernel[..., :3]
        dense[:, :, 4:, 3:] = kernel[..., 3:]
        x = tf.random.stateless_normal((2, 9, 9, 8), seed=(1, 2))

        @tf.function(jit_compile=jit)
        def grouped(x):
            with tf.GradientTape() as tape:
                y = layer(x)
                loss = tf.reduce_sum(y**2)
            return y, tape.gradient(loss, layer.kernel)

        with tf.GradientTape() as tape:
            w = tf.Variable(dense)
            expected = tf.nn.relu(tf.nn.conv2d(x, w, 2, "SAME"))
            loss = tf.reduce_sum(expected**2)
        gradient = tape.gradient(loss, w).numpy()
        expected_gradient = np.concatenate([gradient[:, :, :4, :3], gradient[:, :, 4:, 3:]], axis=-1)
        y, actual_gradient = grouped(x)
        self.assertAllClose(y, expected, rtol=1e-5, atol=1e-5)
        self.assertAllClose(actual_gradient, expected_gradient, rtol=1e-5, atol=1e-4)

    @parameterized.product(policy=("mixed_bfloat16", "mixed_float16"), jit=(False, True))
    def test_half_precision_trains(self, policy, jit):
        full = GroupedConv2D(6, 3, groups=2)
        half = GroupedConv2D(6, 3, groups=2, dtype=policy)
        x = tf.random.stateless_normal((2, 7, 7, 8), seed=(1, 2))
        for layer in (full, half):
            layer.build(x.shape)
        half.set_weights(full.get_weights())

        def gradient(layer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.cast(layer(x), "float32") ** 2)
            return tape.gradient(loss, layer.kernel)

        expected = gradient(full)
        error = tf.function(gradient, jit_compile=jit)(half) - expected
        self.assertEqual(error.dtype, tf.float32)
        self.assertLess(np.linalg.norm(error), 0.01 * np.linalg.norm(expected))

    def test_bias_of_channels(self):
        layer = GroupedConv2D(4, 1, groups=2, kernel_initializer="zeros", bias_initializer="ones")
        self.assertAllEqual(layer(np.zeros((1, 2, 2, 2))), np.ones((1, 2, 2, 4)))


class LocalResponseNormalizationTest(ModelTestCase):
    @parameterized.product(
        arguments=(
            {},
            {"bias": 1.0, "alpha": 0.5},
            {"radius": 1, "beta": 0.5, "alpha": 2.0},
            {"radius": 9, "beta": 1.3, "alpha": 0.1},
            {"radius": 0, "alpha": 1.0},
        ),
        jit=(False, True),
    )
    def test_equals_tensorflow(self, arguments, jit):
        layer = LocalResponseNormalization(**arguments)
        x = 30 * tf.random.stateless_normal((2, 3, 4, 7), seed=(1, 2))
        cotangent = tf.random.stateless_normal(x.shape, seed=(3, 4))

        def value_and_gradient(f):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = f(x)
            return y, tape.gradient(y, x, output_gradients=cotangent)

        actual, actual_gradient = tf.function(lambda: value_and_gradient(layer), jit_compile=jit)()
        expected, expected_gradient = value_and_gradient(
            lambda x: tf.nn.local_response_normalization(x, layer.radius, layer.bias, layer.alpha, layer.beta)
        )
        scale = np.abs(expected_gradient).max()
        self.assertAllClose(actual, expected, rtol=2e-6, atol=1e-6)
        self.assertAllClose(actual_gradient, expected_gradient, rtol=1e-5, atol=2e-6 * scale)

    def test_alpha_conventions(self):
        x = np.full((1, 1, 1, 5), 3.0, "float32")
        middle = {
            convention: LocalResponseNormalization(bias=1.0, alpha=0.1, alpha_convention=convention)(x).numpy()[
                0, 0, 0, 2
            ]
            for convention in ("sum", "mean")
        }
        self.assertAllClose(middle["sum"], 3 * (1 + 0.1 * 45) ** -0.75, rtol=1e-6)
        self.assertAllClose(middle["mean"], 3 * (1 + 0.1 * 9) ** -0.75, rtol=1e-6)

    @parameterized.parameters("mixed_float16", "mixed_bfloat16")
    def test_half_precision_reduces_in_float32(self, policy):
        layer = LocalResponseNormalization(alpha=1.0, dtype=policy)
        x = tf.constant(np.linspace(200, 1000, 24).reshape(1, 2, 2, 6), layer.compute_dtype)
        y = layer(x)  # The squares exceed float16's largest number, 65504.
        self.assertEqual(y.dtype, x.dtype)
        exact = LocalResponseNormalization(alpha=1.0)(tf.cast(x, "float32"))
        self.assertAllEqual(y, tf.cast(exact, x.dtype))

    def test_config_round_trip(self):
        layer = LocalResponseNormalization(
            radius=3, bias=1.5, alpha=0.2, beta=0.6, alpha_convention="mean", name="lrn9"
        )
        config = keras.saving.serialize_keras_object(layer)
        self.assertEqual(config["registered_name"], "lars_keras>LocalResponseNormalization")
        copy = keras.saving.deserialize_keras_object(config)
        self.assertEqual(copy.get_config(), layer.get_config())
        x = np.arange(16, dtype="float32").reshape(1, 1, 2, 8)
        self.assertAllEqual(copy(x), layer(x))
        self.assertNotAllClose(copy(x), LocalResponseNormalization()(x))

    @parameterized.parameters(
        ({"radius": -1}, "radius=-1"),
        ({"radius": 1.5}, "radius=1.5"),
        ({"bias": 0.0}, "bias=0.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha_convention": "caffe"}, "'sum' or 'mean'. Received: alpha_convention='caffe'"),
    )
    def test_bad_argument(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            LocalResponseNormalization(**arguments)


if __name__ == "__main__":
    tf.test.main()
