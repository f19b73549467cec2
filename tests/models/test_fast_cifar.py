"""The fast CIFAR-10 network: sizes, initial values, whitening."""

import itertools

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import flags
import models
from lars_keras.training import Trainer
from models.fast_cifar import Dirac, whitening_kernel
from running.feeds import make_feeds
from running.model import compile_model, make_model
from tests.pictures import pictures, small_pictures


class NetworkTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        keras.utils.clear_session()

    @parameterized.parameters(
        ("fast_cifar", (64, 256, 256)),
        ("fast_cifar_gelu", (64, 256, 256)),
        ("fast_cifar_medium", (64, 128, 128)),
        ("fast_cifar_small", (32, 64, 128)),
    )
    def test_size(self, name, widths):
        model = models.get(name, num_classes=10)
        inputs = (24, *widths[:-1])
        kernels = sum(9 * w * (i + w) for i, w in zip(inputs, widths, strict=True))
        trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        self.assertEqual(trained, kernels + 2 * sum(widths) + 10 * widths[-1])
        self.assertEqual(model.get_layer("pool").input.shape[1:3], (3, 3))
        self.assertEqual(model.output_shape, (None, 10))
        self.assertEqual([v.path for v in model.trainable_variables if v.name in ("gamma", "bias")], [])

    @parameterized.parameters(("fast_cifar", "relu"), ("fast_cifar_gelu", "gelu"))
    def test_every_nonlinearity(self, name, expected):
        model = models.get(name, num_classes=4, input_shape=(12, 12, 3))
        used = [layer.activation for layer in model.layers if isinstance(layer, keras.layers.Activation)]
        self.assertEqual(used, 7 * [keras.activations.get(expected)])

    def test_convolutions_start_as_the_identity(self):
        layer = keras.layers.Conv2D(7, 3, padding="same", use_bias=False, kernel_initializer=Dirac(3))
        x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype("float32")
        y = layer(x).numpy()
        self.assertAllEqual(y[..., :4], x)
        rest = layer.kernel.numpy()[..., 4:]
        limit = 1 / np.sqrt(9 * 4)
        self.assertLess(np.abs(rest).max(), limit)
        self.assertGreater(np.abs(rest).max(), 0.9 * limit)
        again = Dirac.from_config(Dirac(3).get_config())(layer.kernel.shape)
        self.assertAllEqual(layer.kernel, again)
        narrow = Dirac()((3, 3, 6, 2))
        self.assertAllEqual(narrow[1, 1], np.eye(6, 2))

    def test_logits_are_a_ninth_of_the_head(self):
        model = models.get("fast_cifar_small", num_classes=4, input_shape=(12, 12, 3))
        head = keras.Model(model.input, model.get_layer("fc").output)
        x = pictures(3)[0]
        self.assertAllClose(model(x), head(x) / 9)

    def test_moving_averages_are_fast_and_shifts_have_no_scale(self):
        model = models.get("fast_cifar_small", num_classes=4, input_shape=(12, 12, 3))
        layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        self.assertLen(layers, 6)
        for layer in layers:
            self.assertEqual((layer.momentum, layer.epsilon, layer.scale, layer.center), (0.6, 1e-12, False, True))


class WhiteningTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        keras.utils.clear_session()

    def test_patches_become_uncorrelated_with_unit_variance(self):
        images = pictures(60)[0].astype("float32") / 64 - 2
        kernel = whitening_kernel(images, epsilon=0.0)
        self.assertEqual(kernel.shape, (2, 2, 3, 24))
        y = tf.nn.conv2d(images, kernel, 1, "VALID").numpy().reshape(-1, 24)
        self.assertAllClose(y[:, 12:], -y[:, :12])
        moments = y[:, :12].T.astype("float64") @ y[:, :12] / len(y)
        self.assertAllClose(moments, np.eye(12), atol=1e-3)
        # The oracle: every patch by itself.
        patches = [
            images[:, r : r + 2, c : c + 2].reshape(len(images), -1) for r, c in itertools.product(range(11), repeat=2)
        ]
        patches = np.concatenate(patches).astype("float64")
        values, _ = np.linalg.eigh(patches.T @ patches / len(patches))
        norms = np.linalg.norm(kernel.reshape(12, 24)[:, :12], axis=0)
        self.assertAllClose(norms, 1 / np.sqrt(values[::-1]), rtol=1e-4)

    def test_epsilon_bounds_the_filters(self):
        flat = np.ones((2, 4, 4, 3), "float32")  # one direction only
        norms = np.linalg.norm(whitening_kernel(flat).reshape(12, 24), axis=0)
        self.assertAllClose(norms[1:12], np.full(11, 1 / np.sqrt(5e-4)), rtol=1e-4)

    def test_adapt_takes_unaugmented_training_images(self):
        model = models.get("fast_cifar_small", num_classes=4, input_shape=(12, 12, 3), mean=100.0, std=50.0)
        images = pictures(30)[0]
        asked = []
        models.adapt(model, lambda count: asked.append(count) or images)
        self.assertEqual(asked, [5000])
        expected = whitening_kernel((images.astype("float32") - 100) / 50)
        self.assertAllClose(model.get_layer("whiten").kernel, expected, rtol=1e-3, atol=1e-3)
        self.assertNotIn("whiten/kernel", [v.path for v in model.trainable_variables])

    def test_other_models_ask_for_nothing(self):
        model = models.get("lenet1989", num_classes=4)
        models.adapt(model, lambda count: self.fail("asked for images"))

    def test_training_leaves_the_kernel_alone(self):
        config = flags.RunConfig(model="fast_cifar_small", batch_size=20, microbatch_size=10, steps=2)
        data = small_pictures("alternating_flip")
        model = make_model(config, data)
        before = model.get_layer("whiten").kernel.numpy()
        moved = model.get_layer("conv1a").kernel.numpy()
        compile_model(model, config, data)
        trainer = Trainer(model, batch_size=20, microbatch_size=10, jit_compile=False)
        feed, _ = make_feeds(data, trainer, 0)
        trainer.fit(feed, epochs=1, steps_per_epoch=2, verbose=0)
        self.assertAllEqual(model.get_layer("whiten").kernel, before)
        self.assertNotAllClose(model.get_layer("conv1a").kernel, moved)
