"""Settings of the optimizers and schedules: numbers, names, exclusions over saving, what warns.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import json
import os
import pickle
import tempfile
import warnings

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from lars_keras import LAMB, LARS, schedules
from tests import cases

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def net(*layers, name="net"):
    return keras.Sequential([keras.Input((4,)), *layers], name=name)


def two_layers(name="net"):
    return net(keras.layers.Dense(3, name="stem"), keras.layers.Dense(1, name="head"), name=name)


def train(model, optimizer=None, **arguments):
    """Give a model an update by `fit`, compiled with a new optimizer if there is one."""
    if optimizer is not None:
        model.compile(optimizer, keras.losses.MeanSquaredError())
    return model.fit(np.ones((4, 4), "float32"), np.ones((4, 1), "float32"), verbose=0, **arguments)


GRADIENT = [[0.3, -0.2]]


def updates(first, second):
    """Return a weight after an update of one optimizer and, with the same slots, an update of another."""
    variable = keras.Variable(np.float32([[3.0, 4.0]]), name="kernel")
    cases.step_plainly(first, [keras.ops.convert_to_tensor(GRADIENT)], [variable])
    second.build([variable])
    for a, b in zip(first.variables, second.variables, strict=True):
        b.assign(a)
    cases.step_plainly(second, [keras.ops.convert_to_tensor(GRADIENT)], [variable])
    return keras.ops.convert_to_numpy(variable)


class HyperparametersTest(parameterized.TestCase):
    @parameterized.parameters(
        (LARS, "momentum", 0.2),
        (LARS, "nesterov", True),
        (LARS, "weight_decay", 0.5),
        (LARS, "trust_coefficient", 0.1),
        (LARS, "epsilon", 0.3),
        (LARS, "variant", "ratio_on_momentum"),
        (LARS, "trust_clip", True),
        (LAMB, "beta_1", 0.1),
        (LAMB, "beta_2", 0.5),
        (LAMB, "epsilon", 0.3),
        (LAMB, "weight_decay", 0.5),
        (LAMB, "bias_correction", False),
        (LAMB, "trust_clip", True),
    )
    def test_set_after_an_update(self, optimizer_class, name, value):
        """As if each update were that of an optimizer made with the value."""
        variable, optimizer = keras.Variable(np.float32([[3.0, 4.0]]), name="kernel"), optimizer_class(0.5)
        optimizer.apply([keras.ops.convert_to_tensor(GRADIENT)], [variable])
        setattr(optimizer, name, value)
        optimizer.apply([keras.ops.convert_to_tensor(GRADIENT)])
        found = keras.ops.convert_to_numpy(variable)
        expected = updates(optimizer_class(0.5), optimizer_class(0.5, **{name: value}))
        ignored = updates(optimizer_class(0.5), optimizer_class(0.5))
        self.assertLess(cases.relative_error(found, expected), 1e-6)
        self.assertGreater(cases.relative_error(found, ignored), 1e-5)

    @parameterized.parameters(
        (LARS, {"momentum": 1.0}),
        (LARS, {"variant": "norm-of-sum"}),
        (LARS, {"weight_decay": -1.0}),
        (LARS, {"excluded_lr_scale": -1.0}),
        (LARS, {"nesterov": "False"}),
        (LARS, {"trust_clip": None}),
        (LAMB, {"bias_correction": 1}),
        (LAMB, {"beta_2": 1.5}),
    )
    def test_set_to_what_the_constructor_refuses(self, optimizer_class, argument):
        optimizer = optimizer_class()
        (name, value), *_ = argument.items()
        with self.assertRaisesRegex(ValueError, f"`{name}` must be .*Received: {name}="):
            setattr(optimizer, name, value)
        self.assertEqual(optimizer.get_config()[name], optimizer_class().get_config()[name])

    @parameterized.parameters(LARS, LAMB)
    def test_none_is_no_decay(self, optimizer_class):
        """Take None as Keras does."""
        optimizer = optimizer_class(weight_decay=None)
        self.assertEqual(optimizer.weight_decay, 0.0)
        self.assertEqual(optimizer_class.from_config(optimizer.get_config()).weight_decay, 0.0)

    @parameterized.parameters(LARS, LAMB)
    def test_function_of_the_update_is_no_rate(self, optimizer_class):
        with self.assertRaisesRegex(TypeError, "LearningRateSchedule"):
            optimizer_class(lambda step: 0.1)
        self.assertEqual(float(optimizer_class(lambda: 0.25).learning_rate), 0.25)

    def test_no_exclusions_have_one_spelling(self):
        with self.assertRaisesRegex(ValueError, r"`exclude` must be .*\(\) for none. Received: exclude=None"):
            LARS(exclude=None)

    def test_nesterov_set_where_it_is_not_supported(self):
        optimizer = LARS(0.1, variant="ratio_on_momentum")
        optimizer.nesterov = True
        with self.assertRaisesRegex(ValueError, "Nesterov momentum is not supported"):
            optimizer.apply([keras.ops.convert_to_tensor(GRADIENT)], [keras.Variable(np.ones((1, 2)), name="kernel")])

    def test_rate_of_excluded_variables_set_after_an_update(self):
        bias, optimizer = keras.Variable(np.float32([1.0]), name="bias"), LARS(1.0, momentum=0.0)
        for scale in (1.0, 0.25):
            optimizer.excluded_lr_scale = scale
            optimizer.apply([keras.ops.convert_to_tensor([1.0])], [bias])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(bias), [1.0 - 1.0 - 0.25], atol=1e-7)
        self.assertEqual(optimizer.layer_plan()[0].lr_scale, 0.25)

    def test_set_after_fit_warns_once_it_is_another_value(self):
        """`fit` has compiled a step with the old one in it, as it has of Keras's optimizers."""
        model = net(keras.layers.Dense(1))
        train(model, LARS(0.1))
        model.optimizer.momentum = 0.9
        with self.assertWarnsRegex(UserWarning, "`momentum`=0.9 .*Compile the model again.*momentum=0.5"):
            model.optimizer.momentum = 0.5
        before = keras.ops.convert_to_numpy(model.layers[0].kernel)
        model.compile(LARS(0.1, momentum=0.5), "mse")
        train(model)
        self.assertFalse(np.array_equal(before, keras.ops.convert_to_numpy(model.layers[0].kernel)))


class VariablesTest(parameterized.TestCase):
    @parameterized.parameters(LARS, LAMB)
    def test_none(self, optimizer_class):
        """As Keras's optimizers, they leave a model without trainable variables as it is."""
        model = net(keras.layers.Dense(1, trainable=False))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The model does not have any trainable weights")
            train(model, optimizer_class(0.1))
        self.assertEqual(int(model.optimizer.iterations), 0)

    def test_complex(self):
        with self.assertRaisesRegex(ValueError, "real variables.*Received: phase of dtype complex64"):
            LARS().build([keras.Variable(np.ones((2, 2), "complex64"), dtype="complex64", name="phase")])

    def test_a_gradient_of_another_shape(self):
        """It would be broadcast, and train on rubbish."""
        kernel = keras.Variable(np.ones((2, 3)), name="kernel")
        optimizer = LARS(0.1)
        optimizer.build([kernel])
        message = r"shape of its variable. Received: a gradient of shape \(3,\) for kernel of shape \(2, 3\)"
        with self.assertRaisesRegex(ValueError, message):
            optimizer.apply([keras.ops.ones(3)], [kernel])

    @parameterized.parameters(1, 3)
    def test_gradients_of_another_number(self, gradients):
        """Keras's optimizers leave out the last of them."""
        variables = [keras.Variable(np.ones(2), name=name) for name in ("a", "b")]
        with self.assertRaisesRegex(ValueError, f"Received: {gradients} gradients for 2 variables"):
            LARS(0.1).apply([keras.ops.ones(2)] * gradients, variables)

    @parameterized.parameters({"global_clipnorm": 1.0}, {"clipnorm": 1.0})
    def test_clipping_in_float16(self, **clipping):
        """The square of a norm above 256 is no float16."""
        kernel = keras.Variable(np.zeros((250, 1000)), dtype="float16")
        optimizer = LARS(1.0, trust_coefficient=1.0, exclude=(".*",), momentum=0.0, **clipping)
        optimizer.build([kernel])
        optimizer.apply([keras.ops.ones((250, 1000), "float16")], [kernel])  # of norm 500
        moved = np.asarray(keras.ops.convert_to_numpy(kernel), "float64")
        np.testing.assert_allclose(moved, -1 / 500, rtol=1e-3)

    def test_config_is_a_copy(self):
        optimizer = LARS(0.1, exclude=("kernel",))
        optimizer.build([keras.Variable(np.ones((2, 3)), name="kernel")])
        config = optimizer.get_config()
        self.assertEqual(pickle.loads(pickle.dumps(config)), config)
        config["matches"]["patterns"]["kernel"].append(99)
        self.assertEqual(optimizer.get_config()["matches"]["patterns"], {"kernel": [0]})


class NameTest(parameterized.TestCase):
    @parameterized.parameters(LARS, LAMB)
    def test_every_optimizer_has_a_name_of_its_own(self, optimizer_class):
        a, b = optimizer_class(), optimizer_class()
        self.assertStartsWith(a.name, optimizer_class.__name__.lower())
        self.assertNotEqual(a.name, b.name)
        self.assertEqual(optimizer_class(name="mine").name, "mine")
        self.assertEqual(optimizer_class.from_config(a.get_config()).name, a.name)

    def test_two_in_a_multi_optimizer(self):
        multi = getattr(keras.optimizers, "MultiOptimizer", None)
        if multi is None:
            self.skipTest("this Keras has no MultiOptimizer")
        model = two_layers()
        stem, head = LARS(0.1), LARS(0.2)
        train(model, multi(lambda variable: stem if "stem" in variable.path else head))
        tree = model.get_state_tree()["optimizer_variables"]
        self.assertLen([name for name in tree if name.startswith("lars")], 2)


class NumbersTest(parameterized.TestCase):
    """Numbers of NumPy and of the backend are numbers."""

    @parameterized.parameters(np.float32, np.float64, np.int64, np.array, keras.ops.convert_to_tensor)
    def test_schedules(self, kind):
        kinds = (np.int64, np.int32, np.array, keras.ops.convert_to_tensor)
        for count in kinds:
            made = [
                schedules.WarmupPolynomial(kind(2), count(5), count(50), power=kind(2), start=kind(0), end=kind(0)),
                schedules.WarmupCosine(kind(2), count(5), count(50)),
                schedules.WarmupExponential(kind(2), count(5), count(50), end=kind(1)),
                schedules.WarmupStep(kind(2), count(5), np.array([10, 20]), factor=kind(1)),
            ]
            plain = [
                schedules.WarmupPolynomial(2, 5, 50),
                schedules.WarmupCosine(2, 5, 50),
                schedules.WarmupExponential(2, 5, 50, end=1),
                schedules.WarmupStep(2, 5, [10, 20], factor=1),
            ]
            for a, b in zip(made, plain, strict=True):
                self.assertEqual(a.get_config(), b.get_config())
                self.assertIs(type(a.warmup_updates), int)
        self.assertEqual(schedules.duration_in_updates(count(5), batch_size=np.int64(2), num_examples=np.int64(3)), 5)

    @parameterized.parameters(np.float32, np.float64, np.array, keras.ops.convert_to_tensor)
    def test_optimizers(self, kind):
        lars = LARS(kind(1.0), momentum=kind(0.5), weight_decay=kind(0.25), excluded_lr_scale=kind(0.5))
        self.assertEqual([lars.momentum, lars.weight_decay, lars.excluded_lr_scale], [0.5, 0.25, 0.5])
        lamb = LAMB(kind(1.0), beta_1=kind(0.5), epsilon=kind(0.25), trust_clip=kind(1.0) > 0)
        self.assertEqual([lamb.beta_1, lamb.epsilon, lamb.trust_clip], [0.5, 0.25, True])

    @parameterized.parameters(np.float32(5), [np.array([5])], True, np.bool_(True), "5", None)
    def test_no_counts(self, value):
        with self.assertRaisesRegex(ValueError, "`warmup_updates` must be a whole number"):
            schedules.WarmupCosine(1.0, value, 50)


class ExclusionTest(parameterized.TestCase):
    def plan(self, model, **arguments):
        optimizer = LARS(**arguments)
        optimizer.build(model.trainable_variables)
        return {role.path: role.adapt for role in optimizer.layer_plan()}

    @parameterized.parameters("renorm", "prenorm", "post_normalization", "layernorm", "weight_norm", "norm", "normal")
    def test_name_of_a_layer_does_not_exclude_its_kernel(self, name):
        model = net(keras.layers.Dense(2, name=name), name="net_norm")
        self.assertEqual(list(self.plan(model).values()), [True, False])

    def test_normalization_over_several_axes(self):
        class MatrixNorm(keras.layers.Layer):
            def build(self, shape):
                self.scale = self.add_weight(shape=shape[1:], name="scale")
                self.offset = self.add_weight(shape=shape[1:], name="offset")
                self.mix = self.add_weight(shape=(2, 2), name="kernel")

            def call(self, x):
                return (x * self.scale + self.offset) @ self.mix

        inputs = keras.Input((3, 2))
        x = keras.layers.LayerNormalization(axis=(1, 2))(inputs)
        model = keras.Model(inputs, keras.layers.Flatten()(MatrixNorm(name="own")(x)))
        adapted = [path for path, adapt in self.plan(model).items() if adapt]
        self.assertEqual(adapted, ["own/kernel"])

    @parameterized.parameters(
        (("net/stem/kernel$", "bias$"), {}),
        (("^net/stem/", "bias$"), {}),
        (("stem/kernel",), {}),
        ((), {"exclude_from_layer_adaptation": ("net/head/",), "exclude_from_weight_decay": ("^net/stem/kernel$",)}),
    )
    def test_what_trains_also_loads(self, exclude, more):
        """Keras gives the variables of a loaded `Sequential` shorter paths."""
        model = two_layers()
        model.compile(LARS(0.1, exclude=exclude, **more), keras.losses.MeanSquaredError())
        model.optimizer.build(model.trainable_variables)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            loaded = keras.saving.load_model(path)
            loaded.save(path)
            again = keras.saving.load_model(path)
        plans = [[(r.adapt, r.decay) for r in m.optimizer.layer_plan()] for m in (model, loaded, again)]
        self.assertEqual(plans[0], plans[1])
        self.assertEqual(plans[0], plans[2])
        self.assertNotEqual(set(plans[0]), {(True, True)})
        self.assertEqual(loaded.optimizer.get_config(), model.optimizer.get_config())
        if more:
            self.assertEqual(train(model).history, train(loaded).history)

    def test_layers_that_are_numbered_anew(self):
        """The match at the first build counts, where another layer now has the name."""
        first = LARS(exclude=("dense_1/",))
        first.build(net(keras.layers.Dense(4, name="dense"), keras.layers.Dense(4, name="dense_1")).trainable_variables)
        second = LARS.from_config(first.get_config())
        renamed = net(keras.layers.Dense(4, name="dense_1"), keras.layers.Dense(4, name="dense_2"))
        second.build(renamed.trainable_variables)
        self.assertEqual([r.adapt for r in second.layer_plan()], [True, True, False, False])
        other = LARS.from_config(first.get_config())  # of another shape: the patterns are searched again
        other.build(net(keras.layers.Dense(4, name="dense_1"), keras.layers.Dense(3, name="last")).trainable_variables)
        self.assertEqual([r.adapt for r in other.layer_plan()], [False, False, True, True])

    def test_layers_in_another_order(self):
        """Match by path where the layers have the same shapes and paths. An earlier version saved no paths."""
        a, b = keras.layers.Dense(4, name="a"), keras.layers.Dense(4, name="b")
        optimizer = LARS(exclude=("a/",))
        optimizer.build(net(a, b).trainable_variables)
        config = optimizer.get_config()
        matches = config["matches"]
        without_paths = matches | {"variables": [[path.split("/")[-1], s] for path, s in matches["variables"]]}
        for saved, expected in ((matches, [True, True, False, False]), (without_paths, [False, False, True, True])):
            again = LARS.from_config(json.loads(json.dumps(config | {"matches": saved})))
            again.build(net(b, a).trainable_variables)
            self.assertEqual([r.adapt for r in again.layer_plan()], expected)
            second = LARS.from_config(again.get_config())
            second.build(net(b, a).trainable_variables)
            self.assertEqual(second.layer_plan(), again.layer_plan())

    def test_layers_frozen_since_the_first_update(self):
        """Load the file, as with Keras's optimizers; the pattern matched once, so it is no mistake in typing."""
        model = two_layers()
        train(model, LARS(0.1, exclude=("rank<=1", "^net/stem/")))
        model.get_layer("stem").trainable = False
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            with self.assertWarnsRegex(UserWarning, "'\\^net/stem/' matches none of the 2 trainable variables"):
                loaded = keras.saving.load_model(path)
        self.assertEqual([r.adapt for r in loaded.optimizer.layer_plan()], [True, False])

    def test_pattern_changed_in_a_config(self):
        optimizer = LARS(exclude=("stem/",))
        optimizer.build(two_layers().trainable_variables)
        again = LARS.from_config(optimizer.get_config() | {"exclude": ["head/"]})
        again.build(two_layers().trainable_variables)
        self.assertEqual([r.adapt for r in again.layer_plan()], [True, True, False, False])
        missing = LARS.from_config(optimizer.get_config() | {"exclude": ["absent/"]})
        with self.assertRaisesRegex(ValueError, "absent/"):
            missing.build(two_layers().trainable_variables)

    def test_default_exclusions_of_an_earlier_version(self):
        former = ["rank<=1", r"(^|/)(bias|beta|gamma|alpha)$", r"norm(alization)?(_\d+)?/[^/]+$"]
        self.assertEqual(list(self.plan(two_layers(), exclude=former).values()), [True, False, True, False])

    def test_legacy_h5_file(self):
        """It loads, and trains with a fresh optimizer, as Keras warns."""
        model = two_layers()
        train(model, LARS(0.1, exclude=("stem/", "bias$")))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = os.path.join(folder, "model.h5")
            model.save(path)
            loaded = keras.saving.load_model(path)
        train(loaded)
        self.assertEqual([r.adapt for r in loaded.optimizer.layer_plan()], [False, False, True, False])
        self.assertEqual(int(loaded.optimizer.iterations), 1)


class RawRateTest(parameterized.TestCase):
    def build(self, *layers, **arguments):
        optimizer = LARS(**arguments)
        optimizer.build(net(*layers).trainable_variables)

    @parameterized.parameters(
        14.0,
        schedules.WarmupPolynomial(14.0, 5, 50),
        keras.optimizers.schedules.CosineDecay(14.0, 9),
        keras.optimizers.schedules.CosineDecay(0.1, 9, warmup_target=14.0, warmup_steps=3),
        keras.optimizers.schedules.PiecewiseConstantDecay([5, 9], [2.0, 14.0, 1.0]),
    )
    def test_biases_without_normalization(self, rate):
        message = (
            r"up to 14, .*has no normalization.*net/stem/bias, net/head/bias.*`excluded_lr_scale=0.05`.*up to 0\.7"
        )
        with self.assertWarnsRegex(UserWarning, message):
            self.build(*two_layers().layers, learning_rate=rate)

    @parameterized.named_parameters(
        ("published", {"learning_rate": 24.7}, True, True),
        ("low_factor", {"learning_rate": 14.0, "excluded_lr_scale": 0.05}, True, False),
        ("low_rate", {"learning_rate": 4.0}, True, False),
        ("nothing_excluded", {"learning_rate": 14.0, "exclude": ()}, True, False),
        ("no_bias", {"learning_rate": 14.0}, False, False),
    )
    def test_does_not_warn(self, arguments, use_bias, normalize):
        """The highest rate that MLPerf publishes for a network with batch normalization is among them."""
        layers = [keras.layers.Dense(3, use_bias=use_bias)]
        layers += [keras.layers.BatchNormalization()] if normalize else []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.build(*layers, keras.layers.Dense(1, use_bias=use_bias), **arguments)
