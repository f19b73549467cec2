"""LAMB against the float64 oracle and against optax, on TensorFlow; JAX and torch are in test_backends.py."""

import gc
import itertools
import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LAMB, LARS
from tests import cases
from tests.reference import ReferenceLAMB

# Arguments, then what the exclusions among them mean: adapt? and decay? by variable of `cases.VARIABLES`.
CASES = {
    "plain": ({}, cases.KERNELS, cases.KERNELS),
    "no_correction": ({"bias_correction": False}, cases.KERNELS, cases.KERNELS),
    "epsilon": ({"epsilon": 1.0}, cases.KERNELS, cases.KERNELS),
    "clip": ({"trust_clip": True, "epsilon": 1.0}, cases.KERNELS, cases.KERNELS),  # ratios above 1
    "no_decay": ({"weight_decay": 0}, cases.KERNELS, cases.NONE),
    "betas": ({"beta_1": 0.5, "beta_2": 0.9, "epsilon": 0.01}, cases.KERNELS, cases.KERNELS),
    "no_momentum": ({"beta_1": 0.0}, cases.KERNELS, cases.KERNELS),
    "nothing_excluded": ({"exclude": ()}, cases.ALL, cases.ALL),
    "excluded_rate": (
        {"exclude": ("conv", "^model"), "exclude_from_weight_decay": (), "excluded_lr_scale": 0.1},
        (False, True, False, True),
        cases.ALL,
    ),
}


def make(name, weights, dtype="float64"):
    """Return a built-in case as optimizer and oracle."""
    arguments, adapt, decay = CASES[name]
    arguments = {"weight_decay": 0.3, "learning_rate": 0.05} | arguments
    own = {k: v for k, v in arguments.items() if not k.startswith("exclude_from") and k != "exclude"}
    return LAMB(**arguments), ReferenceLAMB(weights, adapt, decay, dtype=dtype, **own)


class LAMBTest(tf.test.TestCase, parameterized.TestCase):
    def assert_close(self, oracle, optimizer, variables, tolerance=4e-6):
        actual, expected = variables + cases.slots(optimizer), oracle.weights + oracle.first
        actual += [v for v in optimizer.variables if v.path.endswith("velocity")]
        for a, e in zip(actual, expected + oracle.second, strict=True):
            self.assertLess(cases.relative_error(a, e), tolerance, a.path)

    @parameterized.parameters(*CASES)
    def test_rule_over_twenty_updates(self, name):
        """The rule is a pure function: every case of it, without a program."""
        weights, gradients = cases.problem()
        optimizer, oracle = make(name, weights)
        optimizer.build(cases.make_variables(weights))
        found = cases.follow_rule(optimizer, weights, gradients)
        for g in gradients:
            oracle.step(g)
        for i, (actual, expected) in enumerate(zip(found, oracle.weights + oracle.slots, strict=True)):
            self.assertLess(cases.relative_error(actual, expected), 4e-6, i)

    @parameterized.parameters(("excluded_rate", "eager"), ("excluded_rate", "xla"), ("clip", "xla"))
    def test_twenty_updates(self, name, mode):
        self.check(name, mode)

    @parameterized.parameters(*itertools.product(CASES, ("eager", "xla")))
    @pytest.mark.slow
    def test_twenty_updates_of_every_case(self, name, mode):
        self.check(name, mode)

    def check(self, name, mode):
        weights, gradients = cases.problem()
        optimizer, oracle = make(name, weights)
        variables = cases.make_variables(weights)
        optimizer.build(variables)
        step = optimizer.apply if mode == "eager" else tf.function(optimizer.apply, jit_compile=True)
        for g in gradients:
            step([tf.constant(x, "float32") for x in g])
            oracle.step(g)
        self.assert_close(oracle, optimizer, variables)

    def test_cases_differ(self):
        """Otherwise the comparison above would prove little."""
        weights, gradients = cases.problem()
        results = []
        for name in CASES:
            _, oracle = make(name, weights)
            for g in gradients:
                oracle.step(g)
            results.append(oracle.weights)
        for (a, x), (b, y) in itertools.combinations(zip(CASES, results, strict=True), 2):
            self.assertGreater(max(map(cases.relative_error, x, y)), 1e-3, f"{a} and {b}")

    @parameterized.parameters("float16", "bfloat16")
    def test_half_precision_variables(self, dtype):
        weights, gradients = cases.problem(dtype)
        optimizer, oracle = make("plain", weights, dtype)
        variables = cases.make_variables(weights, dtype)
        for g in gradients:
            optimizer.apply([tf.constant(x, dtype) for x in g], variables)
            oracle.step(g)
        for v, expected in zip(variables, oracle.weights, strict=True):
            self.assertEqual(keras.backend.standardize_dtype(v.dtype), dtype)
            self.assertLess(
                cases.relative_error(np.asarray(v, "float64"), expected), 2**-9 if dtype == "float16" else 2**-6
            )

    def test_second_moment_in_bfloat16(self):
        """Stored in bfloat16 it would stay at a quarter of the squares, and never sink."""
        arguments = {"learning_rate": 1e-3, "beta_2": 0.99}
        optimizer, oracle = LAMB(**arguments), ReferenceLAMB([np.ones((2, 3))], [1], [1], dtype="bfloat16", **arguments)
        variable = keras.Variable(np.ones((2, 3)), dtype="bfloat16", name="kernel")
        for update in range(200):
            g = 1.0 if update < 150 else 0.0
            optimizer.apply([tf.fill((2, 3), tf.constant(g, "bfloat16"))], [variable])
            oracle.step([np.full((2, 3), g)])
        velocity = next(v for v in optimizer.variables if v.path.endswith("velocity"))
        self.assertLess(cases.relative_error(velocity, oracle.second[0]), 1e-5)

    def test_equals_optax(self):
        try:
            import jax
            import optax
        except ImportError:
            self.skipTest("optax is not installed")
        weights, gradients = cases.problem_with_zeros()
        theirs = optax.lamb(0.05, weight_decay=0.3, mask=[True, False, False, True, True])
        ours = LAMB(0.05, weight_decay=0.3, exclude=(), exclude_from_weight_decay=("v1", "v2"))
        variables = [keras.Variable(np.float32(w), name=f"v{i}") for i, w in enumerate(weights)]
        w = [jax.numpy.asarray(x, "float32") for x in weights]
        state = theirs.init(w)
        for g in gradients:
            g = [np.float32(x) for x in g]
            update, state = theirs.update(g, state, w)
            w = optax.apply_updates(w, update)
            ours.apply([tf.constant(x) for x in g], variables)
        for v, expected in zip(variables, w, strict=True):
            # optax subtracts beta^t from 1 in float32, which costs it two digits in the first updates.
            self.assertLess(cases.relative_error(v, expected), 4e-5, v.path)

    def test_saved_model_goes_on_alike(self):
        rng = np.random.default_rng(0)
        x, y = np.float32(rng.normal(size=(32, 6))), np.float32(rng.normal(size=(32, 3)))
        arguments = {"exclude": (), "exclude_from_weight_decay": ("bias$",), "trust_clip": True, "beta_2": 0.9}
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model.compile(LAMB(0.05, **arguments), "mse")
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            again = keras.models.load_model(path)
        self.assertIsInstance(again.optimizer, LAMB)
        self.assertEqual(again.optimizer.get_config(), model.optimizer.get_config())
        for m in (model, again):
            m.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        for a, b in zip(model.trainable_variables, again.trainable_variables, strict=True):
            self.assertAllEqual(a, b)
        self.assertEqual([(r.adapt, r.decay) for r in again.optimizer.layer_plan()], [(True, True), (True, False)])

    @parameterized.parameters(
        ({"beta_1": 1.0}, "beta_1"),
        ({"beta_2": -0.1}, "beta_2"),
        ({"epsilon": None}, "epsilon"),
        ({"epsilon": 0.0}, "epsilon.*above 1e-38"),  # 0 / 0 where all gradients were 0
        ({"epsilon": 1e-50}, "epsilon.*above 1e-38"),  # is 0 in float32
        ({"weight_decay": "a"}, "weight_decay"),
    )
    def test_bad_argument(self, arguments, named):
        with self.assertRaisesRegex(ValueError, named):
            LAMB(**arguments)


class CompiledUpdateTest(tf.test.TestCase, parameterized.TestCase):
    """The compiled program against the same rule, variable by variable."""

    @parameterized.parameters(*((LARS, {"variant": v}) for v in cases.VARIANTS), (LAMB, {}))
    def test_equals_the_plain_path(self, optimizer_class, arguments):
        """To 8 units in the last place of the largest, over 10 updates; sizes above and below a block of the norm."""
        rng = np.random.default_rng(0)
        shapes = [(37, 41), (64, 96), (3, 5), (7,)]
        weights = [rng.normal(0, 0.1, s) for s in shapes]
        fast, plain = ([keras.Variable(np.float32(w), name=f"v{i}") for i, w in enumerate(weights)] for _ in range(2))
        a, b = (optimizer_class(0.5 if optimizer_class is LARS else 0.01, **arguments) for _ in range(2))
        a.build(fast)
        b.build(plain)
        for _ in range(10):
            g = [tf.constant(rng.normal(0, 0.01, s), "float32") for s in shapes]
            a.apply(g)
            for gradient, variable in zip(g, plain, strict=True):
                b.update_step(gradient, variable, b.learning_rate)
            b.iterations.assign_add(1)
        self.assertLen(a._program._programs, 1)
        self.assertEmpty(b._program._programs)
        for x, y in zip(fast + a.variables[2:], plain + b.variables[2:], strict=True):
            self.assertLess(cases.relative_error(x, np.asarray(y)), 8 * 2.0**-23, x.path)

    @parameterized.parameters(LARS, LAMB)
    def test_set_hyperparameter_takes_the_place_of_the_program(self, optimizer_class):
        """Its value counts from then on. A function that was traced before keeps its own program."""
        fast, plain = (keras.Variable([[3.0, 4.0]], name="kernel") for _ in range(2))
        a, b, g = optimizer_class(0.5), optimizer_class(0.5), tf.constant([[0.3, -0.2]])
        a.build([fast])
        for decay in (0.5, 0.25, 0.125):
            a.weight_decay = b.weight_decay = decay
            a.apply([g])
            cases.step_plainly(b, [g], [plain])
            self.assertLen(a._program._programs, 1)
        self.assertLess(cases.relative_error(fast, plain), 1e-6)
        traced = tf.function(lambda g: a.apply([g]))
        traced(g)
        with self.assertWarnsRegex(UserWarning, "`weight_decay`=0.125"):
            a.weight_decay = 0.5
        a.apply([g])
        gc.collect()
        traced(g)
        for decay in (0.125, 0.5, 0.125):
            b.weight_decay = decay
            cases.step_plainly(b, [g], [plain])
        self.assertLess(cases.relative_error(fast, plain), 1e-6)

    def test_default_fit_compiles_the_update_and_nothing_else(self):
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model.compile(LARS(0.1), "mse")
        model.fit(np.ones((8, 6), "float32"), np.ones((8, 3), "float32"), batch_size=4, verbose=0)
        self.assertFalse(model.jit_compile)
        (program,) = model.optimizer._program._programs.values()
        self.assertEqual(program.experimental_get_tracing_count(), 1)
        self.assertTrue(program.function_spec.jit_compile)

    def test_measures(self):
        """Norms, ratio and effective rate are those of the oracle's rule, before the update."""
        weights, gradients = cases.problem(updates=1)
        variables, optimizer = cases.make_variables(weights), LARS(3.0, weight_decay=0.05, excluded_lr_scale=0.01)
        optimizer.build(variables)
        g = [tf.constant(x, "float32") for x in gradients[0]]
        measures = optimizer.update(g, variables, 3.0, measure=True)
        for i, (w, x) in enumerate(zip(weights, gradients[0], strict=True)):
            w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(x)
            ratio = 1e-3 * w_norm / (g_norm + 0.05 * w_norm) if cases.KERNELS[i] else 1.0
            rate = 3.0 * ratio * (1.0 if cases.KERNELS[i] else 0.01)
            self.assertAllClose(measures[i], [w_norm, g_norm, ratio, rate], rtol=2e-6, atol=0)


if __name__ == "__main__":
    tf.test.main()
