"""Losses that are no plain mean over examples: masks, `ignore_class`, Dice; against Keras's update of the whole batch.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from tests.training.test_meaning import BACKEND, Subclassed, activity_loss, compiled, dataset, replicas

RNG = np.random.default_rng(0)
LENGTHS = np.array([1, 6, 1, 5, 6, 6, 2, 1, 6, 3, 1, 1, 4, 6, 6, 6])
VALID = np.arange(6) < LENGTHS[:, None]
TOKENS = np.where(VALID, RNG.integers(1, 9, (16, 6)), 0)
CLASSES = RNG.integers(0, 3, (16, 6))
VALUES = RNG.normal(size=(16, 6, 1)).astype("float32")
WEIGHTS = RNG.random((16, 6)).astype("float32")
FEATURES = np.where(VALID[..., None], RNG.normal(size=(16, 6, 2)), 0).astype("float32")
cross_entropy = keras.losses.SparseCategoricalCrossentropy


def tokens(*layers, loss="mse", **options):
    model = keras.Sequential([keras.Input((6,), dtype="int32"), keras.layers.Embedding(9, 4, mask_zero=True), *layers])
    model.compile(keras.optimizers.SGD(0.5), loss, **options)
    return model


def features():
    model = keras.Sequential(
        [
            keras.Input((6, 2)),
            keras.layers.Masking(),
            keras.layers.Dense(3, "tanh", kernel_regularizer="l2"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.5), "mae", weighted_metrics=["mse"])
    return model


def two_heads():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1)(x), keras.layers.Dense(1)(x)])
    model.compile("sgd", ["mse", "mae"])
    return model


CASES = {
    "weights": (lambda: tokens(keras.layers.Dense(1), weighted_metrics=["mae"]), TOKENS, VALUES, WEIGHTS),
    "masking": (features, FEATURES, VALUES),
    "ignored class": (
        lambda: tokens(keras.layers.Dense(3), loss=cross_entropy(from_logits=True, ignore_class=0)),
        TOKENS,
        np.where(RNG.random((16, 6)) < np.linspace(0, 0.9, 16)[:, None], 0, CLASSES),
    ),
}


class TrainingTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(("masking", 1), ("weights", 2), ("ignored class", 2), ("weights", 1, True))
    def test_as_keras(self, case, devices, jit_compile="auto"):
        make, *arrays = CASES[case]
        with replicas(devices):
            model = make()
            start = [np.array(w) for w in model.get_weights()]
            trainer = Trainer(model, batch_size=16, microbatch_size=4, jit_compile=jit_compile)
            history = trainer.fit(dataset(*arrays), epochs=2, verbose=0).history
        reference = make()
        reference.set_weights(start)
        expected = reference.fit(dataset(*arrays, batch=16), epochs=2, shuffle=False, verbose=0).history
        self.assertAllClose({name: history[name] for name in expected}, expected, rtol=1e-5)
        for actual, value in zip(model.get_weights(), reference.get_weights(), strict=True):
            self.assertAllClose(np.array(actual), np.array(value), rtol=1e-5, atol=1e-6)

    def test_evaluation_with_weights(self):
        model = tokens(keras.layers.Dense(1))
        scores = Trainer(model, batch_size=5).evaluate(dataset(TOKENS, VALUES, WEIGHTS))
        losses = ((np.array(model(TOKENS)) - VALUES) ** 2)[..., 0]
        expected = (VALID * WEIGHTS * losses).sum() / (VALID * WEIGHTS).sum()
        self.assertAllClose(scores["loss"], expected, rtol=1e-5)

    def test_a_batch_without_a_valid_entry(self):
        model = tokens(keras.layers.Dense(1))
        before = [np.array(w) for w in model.get_weights()]
        Trainer(model, batch_size=16, microbatch_size=4).fit(np.zeros_like(TOKENS), VALUES, verbose=0)
        for actual, value in zip(model.get_weights(), before, strict=True):
            self.assertAllEqual(np.array(actual), value)

    @parameterized.parameters(*CASES)
    def test_evaluation(self, case):
        """Batches of unequal lengths, against all of the data in one batch."""
        make, *arrays = CASES[case]
        model = make()
        scores = Trainer(model, batch_size=5).evaluate(dataset(*arrays[:2]))
        expected = model.evaluate(*arrays[:2], batch_size=16, verbose=0, return_dict=True)
        for name, value in expected.items():
            self.assertAllClose(scores[name], value, rtol=1e-5, msg=name)

    def test_what_cannot_be_weighted_is_refused(self):
        """By its name, where there are several ghost batches; one is trained as Keras does."""

        class Penalty(Subclassed):
            def call(self, x):
                return self.dense(keras.layers.Masking()(x))

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                return super().compute_loss(x, y, y_pred, sample_weight) + keras.ops.mean(y_pred**2)

        def active():
            model = tokens(keras.layers.Dense(1, activity_regularizer="l2"))
            return model

        masked = "weighted by the valid entries.*Received: a masked loss with "
        for make, arrays, message, scored in (
            (two_heads, (TOKENS, [VALUES, VALUES]), masked + "2 means over outputs", masked + "2 means"),
            (active, (TOKENS, VALUES), masked + "losses that layers add", None),
            (lambda: compiled(Penalty()), (FEATURES, VALUES), masked + r"Penalty\.compute_loss", masked + "Penalty"),
        ):
            with self.subTest(message):
                data = tf.data.Dataset.from_tensor_slices(
                    tuple(tuple(a) if isinstance(a, list) else a for a in arrays)
                ).batch(8)
                trainer = Trainer(make(), batch_size=16, microbatch_size=8)
                with self.assertRaisesRegex(ValueError, message):
                    trainer.fit(data, verbose=0)
                if scored:
                    with self.assertRaisesRegex(ValueError, scored):
                        trainer.evaluate(data)
                Trainer(make(), batch_size=16).fit(data, verbose=0)


def contrastive(y, y_pred):
    """Couple all pairs of a batch."""
    together = keras.ops.matmul(y_pred, keras.ops.transpose(y_pred))
    return -keras.ops.mean(keras.ops.log_softmax(together), -1)


def per_positive(y, y_pred):
    return keras.ops.sum(y * (y - y_pred) ** 2) / keras.ops.maximum(keras.ops.sum(y), 1.0)


def without(number):
    """Return a loss over the targets that are not this number."""

    def over_the_rest(y, y_pred):
        there = keras.ops.cast(y != number, "float32")
        return keras.ops.sum(there * (y - y_pred) ** 2) / keras.ops.maximum(keras.ops.sum(there), 1.0)

    return over_the_rest


class Adds(keras.layers.Layer):
    """Adds a loss of its inputs."""

    def __init__(self, loss, name):
        super().__init__(name=name)
        self.loss, self.seeds = loss, keras.random.SeedGenerator(0)

    def call(self, x):
        self.add_loss(self.loss(x, self.seeds))
        return x


def scalar_mean(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)


class NoMeanTest(parameterized.TestCase, tf.test.TestCase):
    """A loss whose value for a batch is not the mean over its examples, and losses that only look like one."""

    def model(self, loss, cls=None):
        model = cls() if cls else keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "sigmoid")])
        model.compile("sgd", loss)
        return model

    def trainer(self, model, microbatch_size=4):
        x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.integers(0, 2, (8, 3)).astype("float32")
        trainer = Trainer(model, batch_size=8, microbatch_size=microbatch_size)
        return lambda: trainer.fit(dataset(x, y), verbose=0)

    def test_refused_by_name(self):
        for loss, name in (
            (keras.losses.Dice(), "dice"),
            ("tversky", "tversky"),
            (contrastive, "contrastive"),
            (per_positive, "per_positive"),
            (without(0), "over_the_rest"),
            (without(-1), "over_the_rest"),
            (without(-100), "over_the_rest"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"not the mean over its examples.*: {name}"):
                self.trainer(self.model(loss))()

        class Pairs(Subclassed):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                return keras.ops.mean(contrastive(y, y_pred))

        with self.assertRaisesRegex(ValueError, r"Received: Pairs\.compute_loss"):
            self.trainer(self.model(None, Pairs))()
        self.trainer(self.model(keras.losses.Dice()), microbatch_size=8)()

    def test_named_among_several(self):
        """A mean beside the loss is not named."""

        def mean(y_true, y_pred):
            return keras.ops.mean((y_true - y_pred) ** 2, -1)

        x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.integers(0, 2, (8, 3)).astype("float32")
        inputs = keras.Input((4,))
        for losses, names in (
            ((mean, contrastive), "contrastive"),
            ((contrastive, mean), "contrastive"),
            ((contrastive, per_positive), "contrastive, per_positive"),
        ):
            heads = {name: keras.layers.Dense(3, "sigmoid", name=name)(inputs) for name in "ab"}
            model = keras.Model(inputs, heads)
            model.compile("sgd", dict(zip("ab", losses, strict=True)))
            with self.assertRaisesRegex(ValueError, f"Received: {names}$"):
                Trainer(model, batch_size=8, microbatch_size=4).fit(x, {"a": y, "b": y}, verbose=0)

    def test_weights(self):
        """A mean by the weights of a batch is not that of its parts; without weights it is."""

        class ByWeight(Subclassed):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                losses = keras.ops.mean(keras.ops.square(y - y_pred), -1)
                weights = keras.ops.ones_like(losses) if sample_weight is None else sample_weight
                return keras.ops.sum(losses * weights) / keras.ops.sum(weights)

        def trainer(loss, cls=None, weights=None, microbatch_size=4):
            x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.integers(0, 2, (8, 3)).astype("float32")
            trainer = Trainer(self.model(loss, cls), batch_size=8, microbatch_size=microbatch_size)
            trainer.fit(x, y, sample_weight=weights, verbose=0)

        weights = np.arange(1, 9, dtype="float32")
        with self.assertRaisesRegex(ValueError, r"not the mean over its examples.*ByWeight\.compute_loss"):
            trainer(None, ByWeight, weights)
        trainer(None, ByWeight)
        trainer(None, ByWeight, weights, microbatch_size=8)
        trainer(lambda y, y_pred: keras.ops.mean((y - y_pred) ** 2, -1), None, weights)

    def test_losses_of_layers(self):
        def noisy(x, seeds):
            return keras.ops.sum((x + keras.random.normal(keras.ops.shape(x), seed=seeds)) ** 2)

        def model(loss, name, dtype="float32"):
            dtype = dtype if BACKEND == "jax" else "float32"  # on TensorFlow Keras fails
            mean = float(activity_loss(examples=2)) == float(activity_loss(examples=1))  # not in Keras 3.10
            active = keras.layers.Dense(3, activity_regularizer="l2" if mean else None, dtype=dtype)
            layers = [active, Adds(loss, name), keras.layers.Dense(3)]
            model = keras.Sequential([keras.Input((4,)), *layers])
            model.compile("sgd", "mse")
            return model

        for loss, name in (
            (lambda x, seeds: keras.ops.sum(x**2), "sum_of_squares"),
            (lambda x, seeds: keras.ops.sum(keras.ops.mean(x, 0) ** 2), "balance"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"not the mean over its examples.*: {name}$"):
                self.trainer(model(loss, name))()
            self.trainer(model(loss, name), microbatch_size=8)()
        self.trainer(model(lambda x, seeds: keras.ops.mean(x**2), "mean"))()
        self.trainer(model(lambda x, seeds: keras.ops.mean(x**2), "mean", "mixed_bfloat16"))()
        self.trainer(model(noisy, "noisy"))()  # what is random cannot be tried

    def test_taken(self):
        class Mean:
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                return keras.ops.mean(keras.ops.square(keras.ops.cast(y[:, :1], y_pred.dtype) - y_pred))

        class Own(Mean, Subclassed):
            pass

        class Functional(Mean, keras.Model):
            pass

        def half():
            inputs = keras.Input((4,))
            return Functional(inputs, keras.layers.Dense(1, dtype="mixed_bfloat16")(inputs))

        for loss in (scalar_mean, keras.losses.Dice(axis=-1)):
            self.trainer(self.model(loss))()
        for cls in (Own, half):
            self.trainer(self.model(None, cls))()
