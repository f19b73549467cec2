"""LARS as a Keras optimizer: arguments, layer plan, `fit`, saving."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import DEFAULT_EXCLUDE, LARS, schedules
from tests import cases
from tests.reference import ReferenceLARS

COMPILED = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
RATE = {"peak": 8.0, "warmup_updates": 3, "total_updates": 12}

# Every argument away from its default, but for those that exclude one another.
ARGUMENTS = {
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 0.03,
    "trust_coefficient": 0.002,
    "epsilon": 1e-6,
    "variant": "norm_of_sum",
    "trust_clip": True,
    "exclude": [*DEFAULT_EXCLUDE, "first"],
    "exclude_from_layer_adaptation": ["second"],
    "exclude_from_weight_decay": [],
    "excluded_lr_scale": 0.25,
    "name": "mine",
    "clipnorm": 3.0,
    "use_ema": True,
    "ema_momentum": 0.7,
    "loss_scale_factor": 2.0,
}


def small_model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, activation="relu", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="second")(x))


def small_data(updates=6):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(updates * 8, 6)), rng.normal(size=(updates * 8, 3))
    return np.float32(x), np.float32(y)


class ArgumentsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": "0.9"},
        {"weight_decay": -1e-4},
        {"weight_decay": "0"},
        {"trust_coefficient": 0.0},
        {"trust_coefficient": -1.0},
        {"epsilon": -1e-9},
        {"epsilon": float("nan")},
        {"variant": "lars"},
        {"variant": None},
        {"excluded_lr_scale": -1.0},
        {"learning_rate": -1.0},
        {"learning_rate": "fast"},
        {"learning_rate": None},
        {"learning_rate": True},
        {"nesterov": True, "variant": "ratio_on_momentum"},
        {"exclude": "bias"},  # a lone string is a sequence of one-letter patterns
        {"exclude": ("(",)},
        {"exclude": (3,)},
        {"exclude_from_layer_adaptation": "bias"},
        {"exclude_from_weight_decay": ("[",)},
    )
    def test_bad_arguments(self, **arguments):
        with self.assertRaisesRegex(ValueError, "Received") as raised:
            LARS(**arguments)
        self.assertIn(next(iter(arguments)), str(raised.exception))

    def test_unknown_argument(self):
        with self.assertRaisesRegex(ValueError, "decoupled"):
            LARS(decoupled=True)

    @parameterized.parameters(2, np.float64(2.0), 2.0)
    def test_kinds_of_learning_rate(self, rate):
        optimizer = LARS(rate)
        self.assertEqual(float(optimizer.learning_rate), 2.0)
        optimizer.learning_rate = 3
        self.assertEqual(float(optimizer.learning_rate), 3.0)
        self.assertEqual(LARS.from_config(optimizer.get_config()).get_config()["learning_rate"], 3.0)

    def test_exclusions_of_the_base_class_are_refused(self):
        """They would be lost when the optimizer is saved."""
        with self.assertRaisesRegex(ValueError, "exclude_from_weight_decay="):
            LARS().exclude_from_weight_decay(var_names=["bias"])

    def test_plan_before_build(self):
        with self.assertRaisesRegex(ValueError, "build"):
            LARS().layer_plan()


class LayerPlanTest(tf.test.TestCase, parameterized.TestCase):
    def plan(self, variables, **arguments):
        optimizer = LARS(**arguments)
        optimizer.build(variables)
        return optimizer.layer_plan()

    def test_default(self):
        """Leave every kernel and table to LARS, and no bias or normalization of any name or rank."""
        inputs = keras.Input((8, 8, 4))
        x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
        for layer in (
            keras.layers.BatchNormalization(name="my_bn"),
            keras.layers.LayerNormalization(axis=(1, 2, 3), name="layer_normalization_7"),
            keras.layers.GroupNormalization(2, name="groups"),
            keras.layers.Reshape((9, 16)),
            keras.layers.RMSNormalization(name="size"),  # its `size/scale` is excluded by its rank alone
            keras.layers.MultiHeadAttention(2, 3, name="mha"),
        ):
            x = layer(x, x) if layer.name == "mha" else layer(x)
        model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
        plan = self.plan(model.trainable_variables)
        self.assertEqual([row.path for row in plan], [v.path for v in model.trainable_variables])
        self.assertEqual([row.shape for row in plan], [tuple(v.shape) for v in model.trainable_variables])
        self.assertEqual(
            [row.path for row in plan if row.adapt],
            ["conv/kernel", "mha/query/kernel", "mha/key/kernel", "mha/value/kernel"]
            + ["mha/attention_output/kernel", "head/kernel"],
        )
        for row in plan:
            self.assertEqual((row.decay, row.lr_scale), (row.adapt, 1.0))

    def test_two_switches_and_a_rate(self):
        plan = self.plan(
            small_model().trainable_variables,
            exclude_from_layer_adaptation=("rank<=1", "^second/"),
            exclude_from_weight_decay=("kernel",),
            excluded_lr_scale=0.5,
        )
        self.assertEqual(
            [(row.path, row.adapt, row.decay, row.lr_scale) for row in plan],
            [
                ("first/kernel", True, False, 1.0),
                ("first/bias", False, True, 0.5),
                ("norm/gamma", False, True, 0.5),
                ("norm/beta", False, True, 0.5),
                ("second/kernel", False, False, 0.5),
                ("second/bias", False, True, 0.5),
            ],
        )

    def test_nothing_excluded(self):
        for row in self.plan(small_model().trainable_variables, exclude=()):
            self.assertEqual((row.adapt, row.decay), (True, True))

    @parameterized.parameters("exclude", "exclude_from_layer_adaptation", "exclude_from_weight_decay")
    def test_pattern_that_matches_nothing(self, argument):
        variables = small_model().trainable_variables
        with self.assertRaisesRegex(ValueError, "absent"):
            self.plan(variables, **{argument: (*DEFAULT_EXCLUDE, "first", "absent")})
        # The default patterns may match nothing: a model need have no bias and no normalization.
        self.plan(variables[:1], **{argument: (*DEFAULT_EXCLUDE, "first")})


class FitTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*COMPILED)
    def test_dense(self, mode):
        """`fit` takes the oracle's steps; in particular, the base class's decay does not run."""
        x, y = small_data(12)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        w, bias = (v.numpy().astype("float64") for v in model.trainable_variables)
        oracle = ReferenceLARS([w, bias], [True, False], [True, False], learning_rate=cases.Rate(8.0, 3, 12),
                               weight_decay=0.05, excluded_lr_scale=0.01)  # fmt: skip
        for i in range(0, len(x), 8):
            w, bias = oracle.weights
            residual = 2 * (x[i : i + 8] @ w + bias - y[i : i + 8]) / 24
            oracle.step([x[i : i + 8].T @ residual, residual.sum(axis=0)])
        optimizer = LARS(schedules.WarmupPolynomial(**RATE), weight_decay=0.05, excluded_lr_scale=0.01)
        model.compile(optimizer, "mse", **COMPILED[mode])
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        for v, expected in zip(model.trainable_variables, oracle.weights, strict=True):
            self.assertLess(cases.relative_error(v, expected), 5e-6)

    @parameterized.parameters(*COMPILED)
    def test_embedding(self, mode):
        ids = np.random.default_rng(0).integers(0, 7, (48, 4))
        model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(9, 3)])
        oracle = ReferenceLARS([model.trainable_variables[0].numpy()], [True], [True], learning_rate=8.0)
        for i in range(0, 48, 8):
            gradient = np.zeros((9, 3))
            np.add.at(gradient, ids[i : i + 8], 2 * (oracle.weights[0][ids[i : i + 8]] - 1.0) / 96)
            oracle.step([gradient])
        model.compile(LARS(8.0), "mse", **COMPILED[mode])
        model.fit(ids, np.ones((48, 4, 3)), batch_size=8, shuffle=False, verbose=0)
        self.assertLess(cases.relative_error(model.trainable_variables[0], oracle.weights[0]), 5e-6)

    def test_loss_scaling(self):
        """Scaled gradients take the oracle's step, and one that is not finite takes none."""
        weights, gradients = cases.problem()
        oracle = cases.make_case("paper", "constant_rate").reference(weights)
        inner, variables = cases.make_case("paper", "constant_rate").lars(), cases.make_variables(weights)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
        optimizer.build(variables)
        for i, g in enumerate(gradients):
            scaled = [optimizer.scale_loss(tf.constant(x, "float32")) for x in g]
            if i == 3:
                optimizer.apply([x * float("inf") for x in scaled], variables)
            else:
                optimizer.apply(scaled, variables)
                oracle.step(g)
        for v, expected in zip(variables, oracle.weights, strict=True):
            self.assertLess(cases.relative_error(v, expected), 2e-6)


# Keras converts its own variables in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
class SavingTest(tf.test.TestCase, parameterized.TestCase):
    def test_config(self):
        optimizer = LARS(schedules.WarmupPolynomial(**RATE), **ARGUMENTS)
        config = optimizer.get_config()
        for name, value in ARGUMENTS.items():
            self.assertEqual(config[name], value, name)
        again = LARS.from_config(json.loads(json.dumps(config)))
        self.assertEqual(again.get_config(), config)
        serialized = keras.optimizers.serialize(optimizer)
        again = keras.optimizers.deserialize(json.loads(json.dumps(serialized)))
        self.assertIsInstance(again, LARS)
        self.assertEqual(again.get_config(), config)

    def test_config_of_the_defaults(self):
        again = LARS.from_config(LARS().get_config())
        again.build(small_model().trainable_variables)
        self.assertEqual([row.adapt for row in again.layer_plan()], [True, False, False, False, True, False])

    def compiled(self):
        keras.utils.set_random_seed(5)
        model = small_model()
        arguments = {k: v for k, v in ARGUMENTS.items() if k not in ("trust_clip", "use_ema", "ema_momentum")}
        optimizer = LARS(schedules.WarmupPolynomial(**RATE), **arguments)
        model.compile(optimizer, "mse")
        return model

    def uninterrupted(self, data):
        model = self.compiled()
        model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model

    def assert_same(self, a, b):
        self.assertEqual(len(a.weights + a.optimizer.variables), len(b.weights + b.optimizer.variables))
        for x, y in zip(a.weights + a.optimizer.variables, b.weights + b.optimizer.variables, strict=True):
            self.assertAllEqual(x, y)
        self.assertEqual(a.optimizer.get_config(), b.optimizer.get_config())

    def test_keras_file_continues_bit_for_bit(self):
        data, path = small_data(), os.path.join(self.get_temp_dir(), "model.keras")
        model = self.compiled()
        model.fit(*data, batch_size=8, shuffle=False, verbose=0)
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_same(loaded, model)
        self.assertEqual(loaded.optimizer.layer_plan(), model.optimizer.layer_plan())
        loaded.fit(*data, batch_size=8, shuffle=False, verbose=0)
        self.assert_same(loaded, self.uninterrupted(data))

    def test_checkpoint_continues_bit_for_bit(self):
        data, path = small_data(), os.path.join(self.get_temp_dir(), "checkpoint")
        model = self.compiled()
        model.fit(*data, batch_size=8, shuffle=False, verbose=0)
        saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(path)
        fresh = self.compiled()
        fresh.optimizer.build(fresh.trainable_variables)
        status = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).read(saved)
        status.assert_existing_objects_matched()
        self.assert_same(fresh, model)
        fresh.fit(*data, batch_size=8, shuffle=False, verbose=0)
        self.assert_same(fresh, self.uninterrupted(data))
