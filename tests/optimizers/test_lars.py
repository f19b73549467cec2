"""The rules of LARS against the float64 oracle, on TensorFlow: eager, graph and XLA."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LAMB, LARS
from tests import cases
from tests.reference import ReferenceLARS, round_to

# The problem of `tests.cases` has high rates and no normalization.
pytestmark = pytest.mark.filterwarnings("ignore:Variables that are not adapted take a learning rate")

MODES = ("eager", "graph", "xla")
HAND_GRADIENTS = ([-0.8, 0.6], [0.3, -0.2], [0.05, 0.1])

# Name, variant, factor on the weights [3, 4], gradient, and the weights after an update.
ZERO_NORMS = (
    ("zero_weights", "paper", 0.0, [0.3, 0.4], [-0.6, -0.8]),
    ("zero_weights_norm_of_sum", "norm_of_sum", 0.0, [0.3, 0.4], [-0.6, -0.8]),
    ("zero_weights_lr_outside", "lr_outside_momentum", 0.0, [0.3, 0.4], [-0.6, -0.8]),
    ("zero_weights_on_momentum", "ratio_on_momentum", 0.0, [0.3, 0.4], [-0.6, -0.8]),
    # w - lr * b * w: the ratio is 1, although the denominator of the rule is b * |w|.
    ("zero_gradient", "paper", 1.0, [0.0, 0.0], [2.4, 3.2]),
    ("zero_gradient_lr_outside", "lr_outside_momentum", 1.0, [0.0, 0.0], [2.4, 3.2]),
    # Here g is no zero: 0.1 * w * (1 - lr * eta / 0.1) remains of the norm rules.
    ("zero_gradient_norm_of_sum", "norm_of_sum", 1.0, [0.0, 0.0], [2.97, 3.96]),
    ("zero_gradient_on_momentum", "ratio_on_momentum", 1.0, [0.0, 0.0], [2.97, 3.96]),
    # g = -b * w.
    ("zero_sum_paper", "paper", 1.0, [-0.375, -0.5], [3.0, 4.0]),
    ("zero_sum", "norm_of_sum", 1.0, [-0.375, -0.5], [3.0, 4.0]),
    ("zero_momentum", "ratio_on_momentum", 1.0, [-0.375, -0.5], [3.0, 4.0]),
)


class TableRate(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, *rates):
        self.rates = rates

    def __call__(self, step):
        return keras.ops.take(keras.ops.convert_to_tensor(self.rates, "float32"), step)


def make_step(optimizers, mode):
    """Return a function that gives built optimizers the same gradients; one program but for "eager"."""

    def step(gradients):
        for optimizer in optimizers:
            optimizer.apply(gradients)

    return step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")


class LARSTest(tf.test.TestCase, parameterized.TestCase):
    def check(self, compared, mode, dtype="float32", sparse=False):
        """Compare cases with their oracles; returns oracles, optimizers and variables after 20 updates."""
        weights, gradients = cases.problem(dtype)
        stored = "float64" if dtype == "float32" else dtype
        oracles = [case.reference(weights, stored) for case in compared]
        variables = [cases.make_variables(weights, dtype) for _ in compared]
        optimizers = [case.lars() for case in compared]
        for optimizer, v in zip(optimizers, variables, strict=True):
            optimizer.build(v)
        step = make_step(optimizers, mode)
        for update, g in enumerate(gradients):
            tensors = [tf.constant(x, dtype) for x in g]
            if sparse:
                values, rows = g[3][:4], [update % 11, 2, 2, 7]
                g[3] = np.zeros_like(g[3])
                np.add.at(g[3], rows, values)
                tensors[3] = tf.IndexedSlices(tf.constant(values, dtype), tf.constant(rows), tf.constant([11, 3]))
            step(tensors)
            for oracle in oracles:
                oracle.step(g)
        tolerance = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
        for case, oracle, optimizer, v in zip(compared, oracles, optimizers, variables, strict=True):
            self.assertEqual(int(optimizer.iterations), len(gradients))
            self.assert_close(oracle, optimizer, v, tolerance, case.arguments)
        return oracles, optimizers, variables

    def assert_close(self, oracle, optimizer, variables, tolerance=2e-6, message=""):
        """Weights and slots, relative to the largest of each variable."""
        actual, expected = variables + cases.slots(optimizer), oracle.weights + oracle.slots
        for a, e in zip(actual, expected, strict=True):
            self.assertLess(cases.relative_error(a, e), tolerance, f"{a.path} of {message}")

    @parameterized.parameters(*cases.VARIANTS)
    def test_rule_over_twenty_updates(self, variant):
        """The rule is a pure function: every case of it, without a program."""
        weights, gradients = cases.problem()
        for case in cases.all_cases(variant):
            optimizer, oracle = case.lars(), case.reference(weights)
            optimizer.build(cases.make_variables(weights))
            found = cases.follow_rule(optimizer, weights, gradients)
            for g in gradients:
                oracle.step(g)
            for i, (actual, expected) in enumerate(zip(found, oracle.weights + oracle.slots, strict=True)):
                self.assertLess(cases.relative_error(actual, expected), 2e-6, f"{i} of {case.arguments}")

    @parameterized.parameters(*MODES)
    def test_twenty_updates(self, mode):
        """The way from `apply` to the rule, in each mode: rates, roles, slots, steps that look ahead or are clipped."""
        compared = [cases.make_case(variant, "excluded_rate") for variant in cases.VARIANTS]
        compared += [cases.make_case(variant, "nesterov") for variant in ("paper", "lr_outside_momentum")]
        self.check([*compared, cases.make_case("paper", "clip")], mode)

    @parameterized.parameters(*itertools.product(cases.VARIANTS, MODES))
    @pytest.mark.slow
    def test_twenty_updates_of_every_case(self, variant, mode):
        self.check(cases.all_cases(variant), mode)

    @parameterized.parameters("plain", "nesterov", "epsilon", "clip", "nothing_excluded")
    def test_problem_separates_the_variants(self, name):
        """Otherwise the comparison above would prove little."""
        weights, gradients = cases.problem()
        results = []
        for variant in cases.VARIANTS:
            if (variant, name) != ("ratio_on_momentum", "nesterov"):
                oracle = cases.make_case(variant, name).reference(weights)
                for g in gradients:
                    oracle.step(g)
                results.append(oracle.weights)
        for a, b in itertools.combinations(results, 2):
            for i in (0, 3):
                self.assertGreater(cases.relative_error(a[i], b[i]), 1e-3)

    @parameterized.parameters(
        ("paper", False, [2.949381528365601, 3.962475597161792]),
        ("paper", True, [2.9131063367516195, 3.928632941992636]),
        ("norm_of_sum", False, [2.944814482546282, 3.964174597741757]),
        ("lr_outside_momentum", False, [2.971833456454056, 3.938811578824061]),
        ("ratio_on_momentum", False, [3.048992510107046, 3.925975440408708]),
    )
    def test_values_worked_by_hand(self, variant, nesterov, expected):
        """Of the optimizer and of the oracle, in float64."""
        arguments = {"variant": variant, "nesterov": nesterov, "weight_decay": 0.01}
        rates = (2.0, 6.0, 10.0)
        oracle = ReferenceLARS([[3, 4]], [1], [1], learning_rate=rates.__getitem__, **arguments)
        w = keras.Variable([3.0, 4.0], dtype="float64")
        optimizer = LARS(learning_rate=TableRate(*rates), exclude=(), **arguments)
        for g in HAND_GRADIENTS:
            oracle.step([np.array(g)])
            cases.step_plainly(optimizer, [tf.constant(g, "float64")], [w])
        self.assertAllClose(oracle.weights[0], expected, rtol=1e-15, atol=0)
        self.assertAllClose(w, expected, rtol=1e-15, atol=0)

    @parameterized.parameters(*itertools.product(("float16", "bfloat16"), ("eager", "xla")))
    def test_half_precision_variables(self, dtype, mode):
        """Store what the oracle stores, but for a few neighbors where a rounding is a near tie."""
        compared = [cases.make_case(variant, "excluded_rate") for variant in cases.VARIANTS]
        for oracle, optimizer, variables in zip(*self.check(compared, mode, dtype), strict=True):
            actual = variables + cases.slots(optimizer)
            self.assertEqual({keras.backend.standardize_dtype(a.dtype) for a in actual}, {dtype})
            actual = np.concatenate([np.asarray(a, "float64").ravel() for a in actual])
            expected = np.concatenate([e.ravel() for e in oracle.weights + oracle.slots])
            self.assertLess(np.mean(actual != expected), 0.02)

    @parameterized.parameters(*itertools.product(cases.VARIANTS, (1e-4, 300.0), (1e-4, 300.0)))
    def test_norms_that_float16_cannot_hold(self, variant, weight, gradient):
        """Squares of 300 overflow in float16 and squares of 1e-4 vanish."""
        w, g = round_to("float16", np.full((40, 30), weight)), round_to("float16", np.full((40, 30), gradient))
        arguments = {"variant": variant, "learning_rate": 500.0, "weight_decay": 1e-3}
        oracle = ReferenceLARS([w], [True], [True], dtype="float16", **arguments)
        oracle.step([g])
        variable = keras.Variable(w, dtype="float16")
        cases.step_plainly(LARS(exclude=(), **arguments), [tf.constant(g, "float16")], [variable])
        self.assertGreater(cases.relative_error(oracle.weights[0], w), 0.1)
        self.assertAllClose(np.asarray(variable, "float64"), oracle.weights[0], rtol=2**-10, atol=0)

    @parameterized.parameters("eager", "xla")
    def test_zero_norms(self, mode):
        def optimizer(variant, gradient):
            decay = 0.125 if gradient[0] < 0 else 0.1
            return LARS(2.0, variant=variant, weight_decay=decay, trust_coefficient=0.005, exclude=())

        optimizers = [optimizer(variant, gradient) for _, variant, _, gradient, _ in ZERO_NORMS]
        variables = [keras.Variable(np.array([3.0, 4.0]) * scale, dtype="float32") for _, _, scale, _, _ in ZERO_NORMS]
        for made, variable in zip(optimizers, variables, strict=True):
            made.build([variable])

        def step():
            for made, variable, (_, _, _, gradient, _) in zip(optimizers, variables, ZERO_NORMS, strict=True):
                made.update_step(tf.constant(gradient), variable, made.learning_rate)

        (tf.function(step, jit_compile=True) if mode == "xla" else step)()
        for variable, (name, _, _, _, expected) in zip(variables, ZERO_NORMS, strict=True):
            self.assertAllClose(variable, expected, rtol=1e-6, atol=0, msg=name)

    @parameterized.parameters(*itertools.product(cases.VARIANTS, (False, True), (0.0, 2.0)))
    def test_zeros_stay_finite(self, variant, clip, rate):
        """Zero weights, then a gradient, then none again; also at a rate of 0."""
        arguments = {"learning_rate": rate, "variant": variant, "trust_clip": clip}
        oracle = ReferenceLARS([np.zeros((2, 2))], [True], [True], **arguments)
        w, optimizer = keras.Variable(np.zeros((2, 2)), dtype="float32"), LARS(**arguments)
        for g in (np.zeros((2, 2)), np.full((2, 2), 0.5), np.zeros((2, 2))):
            oracle.step([g])
            cases.step_plainly(optimizer, [tf.constant(g, "float32")], [w])
        self.assertAllClose(w, oracle.weights[0], rtol=2e-6, atol=0)

    @parameterized.parameters(*cases.VARIANTS)
    def test_clip_where_the_ratio_is_one(self, variant):
        """The effective rate is then min(1, lr), not lr; and an excluded variable is not clipped."""
        for exclude, rate in (((), 1.0), ((".",), 3.0)):
            w = keras.Variable([0.0, 0.0], dtype="float32")
            optimizer = LARS(3.0, variant=variant, trust_clip=True, exclude=exclude)
            cases.step_plainly(optimizer, [tf.constant([0.25, 0.5])], [w])
            self.assertAllClose(w, [-0.25 * rate, -0.5 * rate], rtol=1e-6, atol=0)

    @parameterized.parameters(*MODES)
    def test_sparse_gradient(self, mode):
        """Rows that occur twice are added, and rows that do not occur move by momentum and decay."""
        self.check([cases.make_case(variant) for variant in cases.VARIANTS], mode, sparse=True)

    @parameterized.parameters(
        ({"clipnorm": 1.0}, "float32", 0.5),
        ({"global_clipnorm": 1.0}, "float32", 0.5),
        ({"clipvalue": 2.0}, "float32", 2.0),
        ({"loss_scale_factor": 64.0}, "float32", 64.0),
        ({}, "bfloat16", 4096.0),
        ({}, "float16", 4096.0),
    )
    def test_rows_are_added_before_they_are_clipped(self, arguments, dtype, expected):
        """A row of four ones that occurs 4096 times is one of 4096, whose norm is 8192; in bfloat16, 256 + 1 = 256."""
        seen = []

        class Recorder(LARS):
            def update_variables(self, gradients, variables, learning_rate):
                seen.extend(gradients)

        table = keras.Variable(np.ones((3, 4)), dtype=dtype, name="table")
        gradient = tf.IndexedSlices(tf.ones((4096, 4), dtype), tf.ones(4096, "int32"), tf.constant([3, 4]))
        Recorder(1.0, **arguments).apply([gradient], [table])
        self.assertAllClose(seen, [[[0.0] * 4, [expected] * 4, [0.0] * 4]], rtol=1e-5)

    @parameterized.product(optimizer_class=(LARS, LAMB), shape=(None, [None, 2]))
    def test_gradient_of_unknown_shape(self, optimizer_class, shape):
        """Take a gradient of a `tf.numpy_function` in a graph, whose shape is unknown."""
        known, unknown = (keras.Variable([[3.0, 4.0]], name="kernel") for _ in range(2))
        a, b, g = optimizer_class(0.5), optimizer_class(0.5), tf.constant([[0.3, -0.2]])
        a.build([known])
        b.build([unknown])
        a.apply([g])
        tf.function(lambda g: b.apply([g]), input_signature=[tf.TensorSpec(shape, "float32")])(g)
        self.assertAllEqual(unknown, known)

    def test_variables_of_tensorflow(self):
        """They take the same update, as one program, too."""
        of_keras, of_tensorflow = keras.Variable([[3.0, 4.0]], name="kernel"), tf.Variable([[3.0, 4.0]], name="kernel")
        for variable in (of_keras, of_tensorflow):
            optimizer = LARS(2.0)
            optimizer.apply_gradients([(tf.constant([[0.3, 0.4]]), variable)])
            self.assertLen(optimizer._program._programs, 1)
        self.assertAllEqual(of_keras, of_tensorflow)

    @parameterized.parameters("graph", "xla")
    def test_second_update_is_not_traced_again(self, mode):
        weights, gradients = cases.problem()
        variables, optimizer = cases.make_variables(weights), LARS(2.0)
        optimizer.build(variables)
        step = make_step([optimizer], mode)
        for i, g in enumerate(gradients):
            optimizer.learning_rate = float(i)
            step([tf.constant(x, "float32") for x in g])
        self.assertEqual(step.experimental_get_tracing_count(), 1)

    @parameterized.named_parameters(
        ("clipnorm", {"clipnorm": 0.01}),
        ("global_clipnorm", {"global_clipnorm": 0.1}),
        ("clipvalue", {"clipvalue": 0.01}),
        ("loss_scale_factor", {"loss_scale_factor": 64.0}),
    )
    def test_gradient_arguments_of_the_base_class(self, arguments):
        (name, value), *_ = arguments.items()

        def prepared(gradients):
            norms = [np.sqrt(np.sum(g**2)) for g in gradients]
            everything = np.sqrt(np.sum(np.square(norms)))
            factor = {
                "clipnorm": [min(1.0, value / n) for n in norms],
                "global_clipnorm": [min(1.0, value / everything)] * 4,
                "loss_scale_factor": [1.0 / value] * 4,
            }.get(name, [1.0] * 4)
            gradients = [f * g for f, g in zip(factor, gradients, strict=True)]
            return [np.clip(g, -value, value) for g in gradients] if name == "clipvalue" else gradients

        weights, gradients = cases.problem()
        oracle = cases.make_case("paper").reference(weights)
        optimizer, variables = cases.make_case("paper", **arguments).lars(), cases.make_variables(weights)
        for g in gradients:
            oracle.step(prepared(g))
            optimizer.apply([tf.constant(x, "float32") for x in g], variables)
        self.assert_close(oracle, optimizer, variables)

    def test_gradient_accumulation_of_the_base_class(self):
        weights, gradients = cases.problem()
        oracle = cases.make_case("paper").reference(weights)
        variables = cases.make_variables(weights)
        optimizer = cases.make_case("paper", gradient_accumulation_steps=2).lars()
        for a, b in zip(gradients[::2], gradients[1::2], strict=True):
            oracle.step([(x + y) / 2 for x, y in zip(a, b, strict=True)])
            optimizer.apply([tf.constant(x, "float32") for x in a], variables)
            optimizer.apply([tf.constant(x, "float32") for x in b], variables)
        self.assert_close(oracle, optimizer, variables)

    def test_moving_average_of_the_base_class(self):
        weights, gradients = cases.problem()
        oracle, variables = cases.make_case("paper").reference(weights), cases.make_variables(weights)
        optimizer = cases.make_case("paper", use_ema=True, ema_momentum=0.5).lars()
        average = None
        for g in gradients:
            oracle.step(g)
            optimizer.apply([tf.constant(x, "float32") for x in g], variables)
            w = oracle.weights[1]
            average = w if average is None else 0.5 * average + 0.5 * w
        self.assert_close(oracle, optimizer, variables)
        optimizer.finalize_variable_values(variables)
        self.assertLess(cases.relative_error(variables[1], average), 2e-6)
