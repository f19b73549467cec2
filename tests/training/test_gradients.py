"""Gradients that are no plain sums: new values of float8 layers, rows of an embedding, and none at all.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import unittest

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from absl.testing import parameterized

from lars_keras import LAMB, LARS
from lars_keras.layerwise import MEASURES
from lars_keras.training import Trainer
from tests import step_cases as cases
from tests.jax.test_engine import distribution
from tests.training.test_meaning import BACKEND, replicas

# Keras converts tensors and variables in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

OPTIMIZERS = {
    "lars": cases.OPTIMIZERS["lars"],
    "ema": lambda: cases.OPTIMIZERS["lars"](use_ema=True, ema_momentum=0.8),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(cases.OPTIMIZERS["lars"](), initial_scale=2.0**8),
    "sgd": lambda: keras.optimizers.SGD(0.1),
}
SCALES_AND_HISTORIES = [
    f"{name}_{kind}" for name in ("inputs", "kernel", "outputs_grad") for kind in ("scale", "amax_history")
]


def compiled(model, optimizer, loss="mse"):
    model.compile(optimizer, loss)
    return model


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


class Float8Test(tf.test.TestCase, parameterized.TestCase):
    """Keras's own update of the whole batch is the oracle."""

    def model(self, optimizer):
        keras.utils.set_random_seed(1)
        model = cases.hidden()
        for layer in model.layers:
            layer.quantize("float8")
        return compiled(model, OPTIMIZERS[optimizer](), keras.losses.CategoricalCrossentropy(from_logits=True))

    def fitted(self, optimizer):
        """Return the variables after two updates; with EMA, its second value in place of the weights."""
        model, after = self.model(optimizer), []
        if optimizer == "ema":
            model.compile(OPTIMIZERS["lars"](), model.loss)  # Keras's `fit` with EMA ends in an error on TensorFlow
        for x, y in zip(*(np.split(a, 2) for a in cases.examples(2)), strict=True):
            model.fit(x, y, batch_size=cases.BATCH, epochs=1, shuffle=False, verbose=0)
            after.append(values(model.trainable_variables))
        if optimizer != "ema":
            return after[-1]
        learned = [v.name not in SCALES_AND_HISTORIES for v in model.trainable_variables]
        triples = zip(*after, learned, strict=True)
        return [0.8 * first + 0.2 * last if moves else last for first, last, moves in triples]

    def trained(self, optimizer, count, size, updates=2, **options):
        with replicas(count):
            trainer = Trainer(self.model(optimizer), batch_size=cases.BATCH, microbatch_size=size, **options)
        data = tf.data.Dataset.from_tensor_slices(cases.examples(updates)).batch(cases.BATCH)
        trainer.fit(data, epochs=1, verbose=0)
        return trainer

    @parameterized.parameters(("lars", 1, 16), ("scaled", 2, 32))
    @pytest.mark.slow
    def test_more_microbatches_and_replicas(self, optimizer, count, size):
        self.check(self.trained(optimizer, count, size), optimizer)

    def check(self, trainer, optimizer):
        for v, expected in zip(trainer.model.trainable_variables, self.fitted(optimizer), strict=True):
            # A last bit of an activation may turn its rounding to float8; Keras adds up the bias in bfloat16.
            tolerance = 1e-5 if v.name in SCALES_AND_HISTORIES else 1e-3 if v.name == "kernel" else 0.02
            self.assertLess(np.abs(np.array(v) - expected).max(), tolerance * np.abs(expected).max(), v.path)
        self.assertEqual(sum(v.name in SCALES_AND_HISTORIES for v in trainer.model.trainable_variables), 12)

    def test_microbatches_and_replicas(self):
        """Only what has a gradient has norms, ratios and an EMA."""
        trainer = self.trained("ema", 2, 16, variable_norms=True, trust_ratios=True, noise_scale=True)
        self.check(trainer, "ema")
        names = [v.name for v in trainer.model.trainable_variables]
        learned = [name not in SCALES_AND_HISTORIES for name in names]
        for measure in ("gradient", "ghost_gradient", *MEASURES):
            self.assertAllEqual(trainer.measures[measure][0] > 0, learned, measure)
        plan = trainer.model.optimizer.layer_plan()
        self.assertAllEqual([row.adapt for row in plan], [name == "kernel" for name in names])
        self.assertAllEqual([row.lr_scale > 0 for row in plan], learned)
        trainer.evaluate(tf.data.Dataset.from_tensor_slices(cases.examples(1)).batch(cases.BATCH))

    def test_a_mask_weights_no_scale(self):
        """One ghost batch has 8 valid entries, the other 24; the histories have the largest values all the same."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(8, 4, 3)).astype("float32"), rng.normal(size=(8, 4, 1)).astype("float32")
        x[:4, 2:] = 0
        histories = []
        for size in (4, 8):
            keras.utils.set_random_seed(1)
            model = keras.Sequential([keras.Input((4, 3)), keras.layers.Masking(), keras.layers.Dense(1)])
            model.layers[-1].quantize("float8")
            trainer = Trainer(compiled(model, OPTIMIZERS["sgd"]()), batch_size=8, microbatch_size=size)
            trainer.fit(x, y, shuffle=False, epochs=1, verbose=0)
            histories.append([np.array(model.layers[-1].inputs_amax_history), np.array(model.layers[-1].inputs_scale)])
        for a, b in zip(*histories, strict=True):
            self.assertAllEqual(a, b)
        self.assertAllClose(histories[0][0].max(), np.abs(x).max())


class SparseTest(tf.test.TestCase, parameterized.TestCase):
    def test_embedding(self):
        self.check_embedding(LARS)

    @pytest.mark.slow
    def test_embedding_of_lamb(self):
        self.check_embedding(LAMB)

    def test_clipped_embedding(self):
        self.check_embedding(lambda rate: LARS(rate, global_clipnorm=0.1))

    def check_embedding(self, optimizer):
        """`fit` and `Trainer` on tokens of which most rows of the table have none: TensorFlow's gradient is sparse."""
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 5, (32, 6)), rng.normal(size=(32, 1)).astype("float32")
        weights = []
        for in_trainer in (False, True):
            keras.utils.set_random_seed(1)
            layers = [keras.layers.Embedding(40, 3), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
            model = compiled(keras.Sequential([keras.Input((6,), dtype="int32"), *layers]), optimizer(0.1))
            before = values(model.weights)
            if in_trainer:
                Trainer(model, batch_size=16, microbatch_size=8).fit(x, y, shuffle=False, verbose=0)
            else:
                model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
            weights.append(values(model.weights))
            self.assertGreater(np.abs(weights[-1][0] - before[0]).max(), 1e-6)
        for a, b in zip(*weights, strict=True):
            self.assertAllClose(a, b, rtol=1e-5, atol=1e-6)

    def test_a_scale_beyond_float16(self):
        """A gradient of weights in float16 is scaled back before it is rounded: there 2**16 is infinite."""
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, dtype="float16")])
        model.set_weights([np.zeros((1, 1))])
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(2.0**10), initial_scale=2.0**16)
        model.compile(optimizer, lambda y, y_pred: y_pred[:, 0] * 2.0**-10)
        Trainer(model, batch_size=8, microbatch_size=4).fit(np.ones((8, 1)), np.ones((8, 1)), verbose=0)
        self.assertAllEqual(model.get_weights()[0], [[-1.0]])

    def test_rows_in_bfloat16(self):
        """A row of 1,024 tokens has the sum of their gradients, of which bfloat16 would lose three quarters."""
        if BACKEND == "jax":
            self.skipTest("JAX's own gradient is dense, a sum in bfloat16")
        model = keras.Sequential(
            [keras.Input((64,), dtype="int32"), keras.layers.Embedding(3, 1, "zeros", dtype="bfloat16")]
        )
        trainer = Trainer(compiled(model, LARS(0.0)), batch_size=16, variable_norms=True)
        trainer.fit(np.ones((16, 64), "int32"), np.ones((16, 64, 1), "float32"), verbose=0)
        self.assertAllClose(trainer.measures["gradient"], [[2.0]], rtol=0.01)

    @parameterized.parameters(LARS, LAMB)
    def test_bcoo(self, optimizer):
        """A sparse gradient of `jax.experimental.sparse`, with repeated rows: Keras's `fit` on JAX has none."""
        if BACKEND != "jax":
            self.skipTest("BCOO is JAX's")
        import jax
        from jax.experimental import sparse

        start, rows = np.ones((11, 3), "float32"), np.array([[1], [4], [1]])
        gradients = np.random.default_rng(0).normal(size=(3, 3, 3)).astype("float32")
        found = []
        for dense in (False, True):
            variable = keras.Variable(start)
            rule = optimizer(0.1)
            rule.build([variable])
            stateless = jax.jit(rule.stateless_apply)
            weights, slots = [variable.value], [v.value for v in rule.variables]
            for data in gradients:
                g = sparse.BCOO((data, rows), shape=start.shape)
                g = g.todense() if dense else g
                rule.apply([g], [variable])
                weights, slots = stateless(slots, [g], weights)
            found.append([np.array(variable), np.array(weights[0]), *values(rule.variables)])
        for actual, expected in zip(*found, strict=True):
            self.assertAllClose(actual, expected, rtol=1e-6)


class UnreachedTest(tf.test.TestCase, parameterized.TestCase):
    """A trainable layer that is called, and that the loss does not depend on."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.reached = keras.layers.Dense(cases.CLASSES)
            self.unreached = keras.layers.Dense(3, name="unreached")

        def call(self, x):
            self.unreached(x)
            return self.reached(x)

    def model(self, optimizer):
        model = self.Model()
        model(np.zeros((1, cases.FEATURES)))
        return compiled(model, optimizer)

    @parameterized.parameters((LARS(2.0, weight_decay=0.05), 0.1), (LAMB(0.01, weight_decay=0.05), 0.01))
    @pytest.mark.filterwarnings("ignore:Gradients do not exist")
    def test_in_fit(self, optimizer, decay):
        """The page on optimizers says so: TensorFlow skips it. JAX has a gradient of 0: LARS and LAMB decay it."""
        model = self.model(optimizer)
        before = values(model.unreached.weights)
        model.fit(*cases.examples(1), batch_size=cases.BATCH, epochs=1, verbose=0)
        kept = 1.0 - decay if BACKEND == "jax" else 1.0
        self.assertAllClose(values(model.unreached.weights), [kept * before[0], before[1]], rtol=1e-5)

    @parameterized.parameters(
        (OPTIMIZERS["lars"], 1, {}),
        (OPTIMIZERS["lars"], 2, {"microbatch_size": 8, "trust_ratios": True}),
        (OPTIMIZERS["scaled"], 1, {"microbatch_size": 16, "variable_norms": True}),
        (lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5), 1, {}),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1, loss_scale_factor=8.0), 2, {}),
    )
    def test_in_trainer(self, optimizer, devices, options):
        """It is named once and keeps its values, whatever the optimizer does beside the gradient; the rest trains."""
        results = []
        for trainable in (True, False):
            keras.utils.set_random_seed(1)
            with replicas(devices):
                model = self.model(optimizer())
                model.unreached.trainable = trainable
                model.compile(optimizer(), "mse")
                before = values(model.unreached.weights)
                trainer = Trainer(model, batch_size=cases.BATCH, **options)
                with self.assertLogs(level="WARNING") as logs:
                    logging.warning("none yet")
                    trainer.fit(*cases.examples(2), epochs=2, shuffle=False, verbose=0)
            self.assertLen([line for line in logs.output if "unreached/kernel, " in line], 1 if trainable else 0)
            for a, b in zip(values(model.unreached.weights), before, strict=True):
                self.assertAllEqual(a, b)
            results.append(values(model.reached.weights))
            for name, rows in trainer.measures.items() if trainable else ():
                self.assertAllEqual(rows[:, 2:], np.zeros_like(rows[:, 2:]) if name != "weight" else rows[:, 2:])
                self.assertTrue(rows[:, :2].any())
        for a, b in zip(*results, strict=True):
            self.assertAllClose(a, b, rtol=1e-6)

    @unittest.skipIf(BACKEND == "tensorflow", "weights are sharded on JAX only")
    def test_shards_of_a_weight_that_no_layer_uses(self):
        class Forgetful(keras.layers.Dense):
            def build(self, shape):
                super().build(shape)
                self.more = self.add_weight(shape=(256, 64), name="more")

        with distribution(8, True):
            x = keras.Input((cases.FEATURES,))
            model = compiled(keras.Model(x, Forgetful(cases.CLASSES, name="forgotten")(x)), LARS())
            weight = model.layers[-1].more
            before = values([weight])
            with self.assertLogs(level="WARNING") as logs:
                Trainer(model, batch_size=cases.BATCH).fit(*cases.examples(2), verbose=0)
            self.assertFalse(weight.value.is_fully_replicated)
            self.assertAllEqual(values([weight]), before)
        self.assertIn("forgotten/more", "".join(logs.output))

    def test_nothing_reached(self):
        class Constant(self.Model):
            def call(self, x):
                return keras.ops.zeros_like(super().call(x))

        model = Constant()
        model(np.zeros((1, cases.FEATURES)))
        trainer = Trainer(compiled(model, "sgd"), batch_size=cases.BATCH)
        with self.assertRaisesRegex(ValueError, "depends on no trainable variable"):
            trainer.fit(*cases.examples(1), verbose=0)


if __name__ == "__main__":
    tf.test.main()
