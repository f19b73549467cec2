"""LARS on the JAX and torch backends: a Keras backend is chosen at import, so each has its own process.

Run by pytest on TensorFlow, this file holds no comparison with the oracle, only a start of itself on torch.
`tests/jax/test_on_jax.py` runs it on JAX.
"""

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from lars_keras import LAMB, LARS, schedules
from tests import cases
from tests.reference import ReferenceLAMB, ReferenceLARS
from tests.second_process import run_on

BACKEND = keras.backend.backend()
# Keras converts tensors and variables in a way that NumPy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:Variables that are not adapted take a learning rate"),
]


def on(backend):
    """Return a decorator that keeps a test class on one backend."""
    return lambda test: test if BACKEND == backend else None


class Comparison(parameterized.TestCase):
    def assert_close(self, variables, optimizer, oracle, tolerance=2e-6, message=""):
        actual, expected = variables + cases.slots(optimizer), oracle.weights + oracle.slots
        for a, e in zip(actual, expected, strict=True):
            a = keras.ops.convert_to_numpy(keras.ops.cast(a, "float32"))
            self.assertLess(cases.relative_error(a, e), tolerance, message)


@on("tensorflow")
class SecondProcessTest(parameterized.TestCase):
    def test_torch(self):
        run_on("torch", self, __file__, "tests/optimizers/test_accumulation.py", "tests/test_blocks.py")


@on("jax")
class JaxTest(Comparison):
    @parameterized.parameters(*cases.VARIANTS)
    def test_twenty_updates(self, variant):
        """`stateless_apply` under `jax.jit`, traced once."""
        import jax

        weights, gradients = cases.problem()
        names = ("excluded_rate", "clip") + (("nesterov",) if variant != "ratio_on_momentum" else ())
        compared = [cases.make_case(variant, name) for name in names]
        oracles = [case.reference(weights) for case in compared]
        variables = [cases.make_variables(weights) for _ in compared]
        optimizers = [case.lars() for case in compared]
        for optimizer, v in zip(optimizers, variables, strict=True):
            optimizer.build(v)

        @jax.jit
        def step(states, g):  # one program for all the cases: compiling is most of this test
            pairs = zip(optimizers, states, strict=True)
            return [optimizer.stateless_apply(slots, g, w) for optimizer, (w, slots) in pairs]

        states = [
            ([x.value for x in v], [x.value for x in o.variables]) for o, v in zip(optimizers, variables, strict=True)
        ]
        for g in gradients:
            states = step(states, [np.float32(x) for x in g])
            for oracle in oracles:
                oracle.step(g)
        self.assertEqual(step._cache_size(), 1)
        for i, (w, slots) in enumerate(states):
            for variable, value in zip(variables[i] + optimizers[i].variables, w + slots, strict=True):
                variable.assign(value)
            self.assert_close(variables[i], optimizers[i], oracles[i], message=compared[i].arguments)

    def test_a_loop_of_the_users_own(self):
        """The block of docs/optimizers.md takes the updates of `model.fit`."""
        from tests.test_blocks import blocks, digits, network

        (images, labels), _ = digits()
        model = network(True)
        start = model.get_weights()
        batches = [(images[i : i + 128], labels[i : i + 128]) for i in (0, 128, 256)]
        names = {"model": model, "batches": batches}
        (code,) = (code for reason, code in blocks("docs/optimizers.md", "python") if "stateless_apply" in code)
        exec(code, names)
        end = model.get_weights()
        model.set_weights(start)
        model.compile(LARS(0.1), "sparse_categorical_crossentropy", jit_compile=True)
        losses = [model.train_on_batch(x, y) for x, y in batches]
        for own, expected in zip(end, model.get_weights(), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)
        self.assertEqual(int(names["optimizer"].iterations), 3)
        self.assertNotAlmostEqual(float(names["loss"]), float(losses[0]), places=4)

    @parameterized.parameters(False, True)
    def test_norm_of_sum_is_that_of_optax(self, nesterov):
        """With separate masks for adaptation and decay, and through every zero norm."""
        try:
            import optax
        except ImportError:
            self.skipTest("optax is not installed")
        import jax

        weights, gradients = cases.problem_with_zeros()
        gradients[0][0] = -0.5 * weights[0]  # g + b*w is 0
        adapt, decay = [True, False, False, True, True], [True, True, False, False, True]
        theirs = optax.lars(
            lambda t: 8.0 / (t + 1),
            weight_decay=0.5,
            weight_decay_mask=decay,
            trust_ratio_mask=adapt,
            eps=1e-3,
            nesterov=nesterov,
        )
        variables = [keras.Variable(np.float32(w), name=f"v{i}") for i, w in enumerate(weights)]
        ours = LARS(
            InverseRate(),
            variant="norm_of_sum",
            weight_decay=0.5,
            epsilon=1e-3,
            nesterov=nesterov,
            exclude_from_layer_adaptation=("v1", "v2"),
            exclude_from_weight_decay=("v2", "v3"),
        )
        w = [jax.numpy.asarray(x, "float32") for x in weights]
        state = theirs.init(w)
        for g in gradients:
            g = [np.float32(x) for x in g]
            update, state = theirs.update(g, state, w)
            w = optax.apply_updates(w, update)
            ours.apply(g, variables)
        for v, expected in zip(variables, w, strict=True):
            self.assertLess(cases.relative_error(v, expected), 2e-6, v.path)


@on("torch")
class TorchTest(Comparison):
    @parameterized.parameters(*cases.VARIANTS)
    def test_twenty_updates(self, variant):
        weights, gradients = cases.problem()
        names = ("excluded_rate", "clip") + (("nesterov",) if variant != "ratio_on_momentum" else ())
        for case in [cases.make_case(variant, name) for name in names]:
            oracle, variables, optimizer = case.reference(weights), cases.make_variables(weights), case.lars()
            for g in gradients:
                oracle.step(g)
                optimizer.apply([keras.ops.convert_to_tensor(x, "float32") for x in g], variables)
            self.assert_close(variables, optimizer, oracle, message=case.arguments)


class InverseRate(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 8.0 / (keras.ops.cast(step, "float32") + 1.0)


@on(BACKEND if BACKEND != "tensorflow" else None)  # there, the other files have them
class AnyBackendTest(Comparison):
    @parameterized.parameters(*cases.VARIANTS)
    def test_rule_over_twenty_updates(self, variant):
        weights, gradients = cases.problem()
        for case in cases.all_cases(variant):
            optimizer, oracle = case.lars(), case.reference(weights)
            optimizer.build(cases.make_variables(weights))
            found = cases.follow_rule(optimizer, weights, gradients)
            for g in gradients:
                oracle.step(g)
            for actual, expected in zip(found, oracle.weights + oracle.slots, strict=True):
                actual = keras.ops.convert_to_numpy(actual)
                self.assertLess(cases.relative_error(actual, expected), 2e-6, case.arguments)

    def test_lamb(self):
        weights, gradients = cases.problem()
        oracle = ReferenceLAMB(weights, cases.KERNELS, cases.KERNELS, learning_rate=0.05, weight_decay=0.3)
        optimizer, variables = LAMB(0.05, weight_decay=0.3), cases.make_variables(weights)
        for g in gradients:
            oracle.step(g)
            optimizer.apply([keras.ops.convert_to_tensor(x, "float32") for x in g], variables)
        for v, expected in zip(variables, oracle.weights, strict=True):
            v = keras.ops.convert_to_numpy(v)
            self.assertLess(cases.relative_error(v, expected), 4e-6)

    @parameterized.parameters("float16", "bfloat16")
    def test_half_precision_variables(self, dtype):
        for variant in cases.VARIANTS:
            weights, gradients = cases.problem(dtype)
            case = cases.make_case(variant, "excluded_rate")
            oracle, optimizer = case.reference(weights, dtype), case.lars()
            variables = cases.make_variables(weights, dtype)
            for g in gradients:
                oracle.step(g)
                optimizer.apply([keras.ops.convert_to_tensor(x, dtype) for x in g], variables)
            self.assert_close(variables, optimizer, oracle, 2**-10 if dtype == "float16" else 2**-7, variant)

    def test_fit(self):
        """A linear model, whose gradient the oracle can be told."""
        rng = np.random.default_rng(0)
        x, y = np.float32(rng.normal(size=(96, 6))), np.float32(rng.normal(size=(96, 3)))
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        weights = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        oracle = ReferenceLARS(weights, [1, 0], [1, 0], learning_rate=cases.Rate(8.0, 3, 12), excluded_lr_scale=0.01)
        for i in range(0, 96, 8):
            w, bias = oracle.weights
            residual = 2 * (x[i : i + 8] @ w + bias - y[i : i + 8]) / 24
            oracle.step([x[i : i + 8].T @ residual, residual.sum(axis=0)])
        model.compile(LARS(schedules.WarmupPolynomial(8.0, 3, 12), excluded_lr_scale=0.01), "mse")
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        self.assert_close(model.trainable_variables, model.optimizer, oracle, 1e-5)
