"""Attributes of LARS and LAMB that are read or set after construction, as those of Keras's optimizers.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import contextlib
import json
import warnings

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from lars_keras import DEFAULT_EXCLUDE, LAMB, LARS

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def traced(function):
    """Return what a function of a scalar returns for 0.5, while the backend traces it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)(tf.constant(0.5))
    import jax

    return jax.jit(function)(0.5)


def two_layers():
    layers = [keras.layers.Dense(3, name="stem"), keras.layers.Dense(1, name="head")]
    return keras.Sequential([keras.Input((4,)), *layers], name="net")


class LearningRateTest(parameterized.TestCase):
    @parameterized.parameters(
        float("nan"), float("inf"), -1.0, True, "5", None, np.float32("nan"), (np.array([0.1]),), ([0.1],)
    )
    def test_set_to_what_the_constructor_refuses(self, value):
        optimizer = LARS(0.5)
        for given in (value, keras.ops.convert_to_tensor(value)) if isinstance(value, float) else (value,):
            with self.assertRaisesRegex(ValueError, "`learning_rate` must be a number.*Received: learning_rate="):
                optimizer.learning_rate = given
        with self.assertRaisesRegex(ValueError, "Received: learning_rate="):
            keras.optimizers.LossScaleOptimizer(optimizer).learning_rate = value
        self.assertEqual(float(optimizer.learning_rate), 0.5)

    @parameterized.parameters(LARS, LAMB)
    def test_set_to_a_function_of_the_update(self, optimizer_class):
        optimizer = optimizer_class(0.5)
        with self.assertRaisesRegex(TypeError, "LearningRateSchedule"):
            optimizer.learning_rate = lambda step: 0.1
        optimizer.learning_rate = lambda: 0.25
        self.assertEqual(float(optimizer.learning_rate), 0.25)
        optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(0.125, 10)
        self.assertEqual(float(optimizer.learning_rate), 0.125)

    @parameterized.parameters(int, float, np.float64, np.array, keras.ops.convert_to_tensor, keras.Variable)
    def test_set_to_a_number(self, kind):
        optimizer = LARS(0.5)
        for value in (2, 0):
            optimizer.learning_rate = kind(value)
            self.assertEqual(float(optimizer.learning_rate), value)

    def test_set_while_it_is_traced(self):
        """A tensor has no value then, and is taken as Keras takes it."""
        optimizer = LARS(0.5)

        def half(x):
            # JAX keeps what is assigned in the scope.
            with keras.StatelessScope() if BACKEND == "jax" else contextlib.nullcontext():
                optimizer.learning_rate = x * 0.5
                return keras.ops.convert_to_tensor(optimizer.learning_rate)

        self.assertEqual(float(traced(half)), 0.25)

    def test_callbacks(self):
        model = two_layers()
        model.compile(LARS(0.5), "mse")
        callbacks = [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e9),
        ]
        model.fit(np.ones((4, 4)), np.ones((4, 1)), epochs=2, callbacks=callbacks, verbose=0)
        self.assertAlmostEqual(float(model.optimizer.learning_rate), 0.5 / 4 / 10, 7)

    def test_build_warns_of_the_rate_that_is_set(self):
        """The rate of the constructor was named here, whatever was set since."""
        high = keras.optimizers.schedules.CosineDecay(14.0, 9)
        for first, second in ((0.1, 14.0), (0.1, high), (20.0, np.float32(14.0))):
            optimizer = LARS(first)
            optimizer.learning_rate = second
            with self.assertWarnsRegex(UserWarning, "learning rate of up to 14,"):
                optimizer.build(two_layers().trainable_variables)
        optimizer = LARS(14.0)
        optimizer.learning_rate = 0.1
        with warnings.catch_warnings(action="error"):
            optimizer.build(two_layers().trainable_variables)

    def test_attribute_of_a_user(self):
        """An array or a tensor that is being traced cannot be compared with another."""
        optimizer = LARS(0.5)
        optimizer.seen = np.arange(3)
        optimizer.seen = np.arange(3)
        self.assertLen(optimizer.seen, 3)

        def keep(x):
            optimizer.seen = x
            return x

        traced(keep)


# What `get_config` of version 0.1.0 returned after a build with `exclude=("rank<=1", "stem/kernel")`.
SAVED = json.loads(
    """{"name": "lars", "learning_rate": 0.5, "weight_decay": 0.0005, "clipnorm": null, "global_clipnorm": null,
    "clipvalue": null, "use_ema": false, "ema_momentum": 0.99, "ema_overwrite_frequency": null,
    "loss_scale_factor": null, "gradient_accumulation_steps": null, "excluded_lr_scale": 1.0, "momentum": 0.9,
    "nesterov": false, "trust_coefficient": 0.001, "epsilon": 0.0, "variant": "paper", "trust_clip": false,
    "exclude": ["rank<=1", "stem/kernel"], "exclude_from_layer_adaptation": null, "exclude_from_weight_decay": null,
    "matches": {"variables": [["net/stem/kernel", [4, 3]], ["net/stem/bias", [3]], ["net/head/kernel", [3, 1]],
    ["net/head/bias", [1]]], "patterns": {"stem/kernel": [0]}}}"""
)


class ExclusionsTest(parameterized.TestCase):
    @parameterized.parameters(LARS, LAMB)
    def test_made_of_its_config(self, optimizer_class):
        """Keras's optimizers take their `get_config` as arguments, too."""
        first = optimizer_class(0.5, exclude=("rank<=1", "stem/"), exclude_from_weight_decay=("head/kernel",))
        first.build(two_layers().trainable_variables)
        second = optimizer_class(**first.get_config())
        self.assertEqual(second.get_config(), first.get_config())
        second.build(two_layers().trainable_variables)
        self.assertEqual(second.layer_plan(), first.layer_plan())

    @parameterized.parameters(lambda config: LARS(**config), LARS.from_config)
    def test_config_that_was_saved_before(self, make):
        """The pattern matches the kernel that it matched then, whatever the layer is called by now."""
        optimizer = make(SAVED)
        self.assertEqual(optimizer.get_config(), SAVED)
        layers = [keras.layers.Dense(3, name="first"), keras.layers.Dense(1, name="last")]
        optimizer.build(keras.Sequential([keras.Input((4,)), *layers]).trainable_variables)
        self.assertEqual([role.adapt for role in optimizer.layer_plan()], [False, False, True, False])

    @parameterized.parameters(LARS, LAMB)
    def test_read(self, optimizer_class):
        self.assertEqual(optimizer_class().exclude, DEFAULT_EXCLUDE)
        self.assertIsNone(optimizer_class().exclude_from_layer_adaptation)
        optimizer = optimizer_class(exclude=["stem"], exclude_from_layer_adaptation=iter(["head"]))
        self.assertEqual(optimizer.exclude, ("stem",))
        self.assertEqual(optimizer.exclude_from_layer_adaptation, ("head",))
        for name in optimizer.get_config():
            self.assertTrue(hasattr(optimizer, name), name)

    @parameterized.parameters("exclude", "exclude_from_layer_adaptation", "exclude_from_weight_decay")
    def test_set(self, name):
        """It would have no effect."""
        optimizer = LARS()
        with self.assertRaisesRegex(AttributeError, f"`{name}` to the constructor. Received: {name}=.'bias'"):
            setattr(optimizer, name, ["bias"])
        self.assertEqual(optimizer.get_config()["exclude"], list(DEFAULT_EXCLUDE))

    def test_variables_of_tensorflow(self):
        """Such a one is called `kernel:0`."""
        if BACKEND != "tensorflow":
            self.skipTest("has none")
        import tensorflow as tf

        variables = [tf.Variable(tf.ones((2, 2)), name=f"layer/{name}") for name in ("kernel", "bias")]
        optimizer = LARS(1.0, momentum=0.0)
        optimizer.apply([tf.ones((2, 2))] * 2, variables)
        plan = [(role.path, role.adapt) for role in optimizer.layer_plan()]
        self.assertEqual(plan, [("layer/kernel", True), ("layer/bias", False)])
        np.testing.assert_array_equal(variables[1], np.zeros((2, 2)))


class ClippingTest(parameterized.TestCase):
    @parameterized.parameters("clipnorm", "global_clipnorm", "clipvalue")
    def test_set_after_an_update(self, name):
        """It acts as that of SGD."""
        weights = []
        for optimizer in (LARS(0.5, weight_decay=0.0, exclude=(".",)), keras.optimizers.SGD(0.5, momentum=0.9)):
            kernel = keras.Variable(np.ones((2, 2)), name="kernel")
            for limit in (None, 0.125, None):
                setattr(optimizer, name, limit)
                optimizer.apply([keras.ops.ones((2, 2))], [kernel])
            weights.append(keras.ops.convert_to_numpy(kernel))
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)

    @parameterized.parameters("clipnorm", "global_clipnorm", "clipvalue")
    def test_set_after_fit_warns(self, name):
        """`fit` has compiled a step without it, as it has with Keras's optimizers."""
        model = two_layers()
        model.compile(LARS(0.5), "mse")
        model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
        with self.assertWarnsRegex(UserWarning, f"`{name}`=None .*Compile the model again.*{name}=0.5"):
            setattr(model.optimizer, name, 0.5)


class KerasNamesTest(parameterized.TestCase):
    @parameterized.parameters(LARS, LAMB)
    def test_compile_by_name(self, optimizer_class):
        model = two_layers()
        model.compile(f"lars_keras>{optimizer_class.__name__}", "mse")
        self.assertIsInstance(model.optimizer, optimizer_class)
