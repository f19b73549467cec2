"""Metrics over micro-batches and replicas, against Keras's of the whole batch; those that would be wrong are refused.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.metrics import MaskedExamples
from lars_keras.training import Trainer
from lars_keras.training.padding_terms import check_padding
from lars_keras.training.scoring import score_batch, summary
from tests.training.test_meaning import BACKEND, IgnoresWeights, Subclassed, X, dataset, replicas

TARGETS = np.random.default_rng(1).integers(0, 2, (64, 1)).astype("float32")


class State(keras.metrics.Metric):
    """A metric of one number."""

    start, dtype_of_state = 0.0, "float32"

    def __init__(self, name=None):
        super().__init__(name=name or type(self).__name__.lower())
        start = keras.initializers.Constant(self.start)
        self.v = self.add_variable((), start, name="v", dtype=self.dtype_of_state)

    def reset_state(self):
        self.v.assign(self.start)

    def update_state(self, y, p, sample_weight=None):
        self.v.assign(self.updated(self.v, keras.ops.abs(y - p)))

    def result(self):
        return keras.ops.convert_to_tensor(self.v)


class Largest(State):
    def updated(self, v, error):
        return keras.ops.maximum(v, keras.ops.max(error))


class Smallest(State):
    start = 1e9

    def updated(self, v, error):
        return keras.ops.minimum(v, keras.ops.min(error))


class Count(State):
    dtype_of_state = "int32"

    def updated(self, v, error):
        return v + keras.ops.shape(error)[0]


class FromOne(State):
    """A sum that does not start from 0."""

    start = 1.0

    def updated(self, v, error):
        return v + keras.ops.sum(error)


class Moving(State):
    def updated(self, v, error):
        return 0.5 * v + 0.5 * keras.ops.mean(error)


def root_of_mean(y, p):
    return keras.ops.sqrt(keras.ops.mean((y - p) ** 2))


def mean_error(y, p):
    return keras.ops.mean(keras.ops.abs(y - p))


def model(*metrics, unweighted=()):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    model.set_weights([np.linspace(-1, 1, 4, dtype="float32")[:, None], np.zeros(1, "float32")])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=list(unweighted), weighted_metrics=list(metrics))
    return model


def sums():
    return [
        keras.metrics.AUC(num_thresholds=20, name="auc"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.RootMeanSquaredError(name="rmse"),
        keras.metrics.R2Score(name="r2"),
        Count(),
        mean_error,
    ]


class MetricsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(1, 2)
    def test_as_keras(self, devices):
        """Sums anywhere; a maximum and a minimum on one device."""
        ordered = [Largest, Smallest, FromOne] if devices == 1 else []

        def metrics():
            return sums() + [metric() for metric in ordered]

        with replicas(devices):
            trainer = Trainer(model(*metrics()), batch_size=16, microbatch_size=4)
            history = trainer.fit(dataset(X, TARGETS), epochs=2, verbose=0).history
            scores = trainer.evaluate(dataset(X, TARGETS))
        expected = model(*metrics()).evaluate(X, TARGETS, batch_size=64, verbose=0, return_dict=True)
        for name, value in expected.items():
            self.assertAllClose(history[name], [value, value], rtol=1e-5, msg=name)
            self.assertAllClose(scores[name], value, rtol=1e-5, msg=name)

    @parameterized.parameters(1, 2)
    def test_that_ignore_weights(self, devices):
        """`metrics=` beside `weighted_metrics=`, with weights, and a last batch that is not whole."""
        weights = np.random.default_rng(1).random(50).astype("float32")
        with replicas(devices):
            trainer = Trainer(model("mae", unweighted=["mse", "accuracy"]), batch_size=16, microbatch_size=4)
            scored = X[:50], TARGETS[:50], weights
            history = trainer.fit(dataset(X, TARGETS), validation_data=scored, verbose=0).history
        own = model("mae", unweighted=["mse", "accuracy"])
        trained = own.evaluate(X, TARGETS, batch_size=64, verbose=0, return_dict=True)
        scored = own.evaluate(X[:50], TARGETS[:50], 50, sample_weight=weights, verbose=0, return_dict=True)
        self.assertNotAllClose(scored["mse"], scored["loss"])
        scored["loss"] *= 50 / weights.sum()  # a mean by weight
        self.assertEqual(len(scored), 4)
        for name, value in scored.items():
            self.assertAllClose(history[f"val_{name}"], [value], rtol=1e-5, msg=name)
            self.assertAllClose(history[name], [trained[name]], rtol=1e-5, msg=name)

    def test_of_batches_are_refused(self):
        for metric, name in ((Moving(), "moving"), (root_of_mean, "root_of_mean")):
            with self.subTest(name):
                trainer = Trainer(model(metric, "mae"), batch_size=16, microbatch_size=8)
                with self.assertRaisesRegex(ValueError, rf"from its 2 parts they.*Received: {name}$"):
                    trainer.fit(dataset(X, TARGETS), verbose=0)
                with self.assertRaisesRegex(ValueError, rf"Received: {name}$"):
                    trainer.evaluate(dataset(X, TARGETS))
                trainer.evaluate(dataset(X[:8], TARGETS[:8]))
        trainer = Trainer(model(Moving()), batch_size=16)
        history = trainer.fit(dataset(X, TARGETS), verbose=0).history
        expected = model(Moving()).fit(X, TARGETS, batch_size=16, shuffle=False, verbose=0).history
        self.assertAllClose(history["moving"], expected["moving"], rtol=1e-5)

    def test_of_a_validation_are_refused_before_the_first_update(self):
        trainer = Trainer(model(Moving()), batch_size=16)
        with self.assertRaisesRegex(ValueError, "from its 4 parts they.*Received: moving$"):
            trainer.fit(X, TARGETS, validation_data=(X, TARGETS), verbose=0)
        self.assertEqual(trainer.position.update, 0)
        history = trainer.fit(X, TARGETS, validation_data=(X[:16], TARGETS[:16]), verbose=0).history
        self.assertLen(history["val_moving"], 1)

    def test_that_cannot_be_added_are_refused_on_replicas(self):
        with replicas(2):
            trainer = Trainer(model(Largest(), "mae", FromOne()), batch_size=16)
            names = "Received: (largest, fromone|fromone, largest)$"  # the order is Keras's
            with self.assertRaisesRegex(ValueError, f"the added states of 2 replicas.*{names}"):
                trainer.fit(dataset(X, TARGETS), verbose=0)
            if BACKEND == "tensorflow":  # on JAX an evaluation is one program over all devices
                with self.assertRaisesRegex(ValueError, names):
                    trainer.evaluate(dataset(X, TARGETS))
            else:
                expected = np.abs(trainer.model(X) - TARGETS).max()
                self.assertAllClose(trainer.evaluate(dataset(X, TARGETS))["largest"], expected)

    def test_in_compute_loss(self):
        class Own(Subclassed):
            def __init__(self):
                super().__init__()
                self.tracker = Moving()

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                self.tracker.update_state(y, y_pred)
                return super().compute_loss(x, y, y_pred, sample_weight)

        own = Own()
        own.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "Received: moving$"):
            Trainer(own, batch_size=16, microbatch_size=8).fit(dataset(X, TARGETS), verbose=0)

    def test_a_run_that_had_others(self):
        """Begin the metrics anew with a warning, also if their shapes are the same, and restore the rest."""
        first, second = (Trainer(model(metric), batch_size=16) for metric in ("mse", "mae"))
        first.fit(X, TARGETS, epochs=1.5, shuffle=False, verbose=0)
        with self.assertLogs(level="WARNING") as logs:
            second.restore(*first.snapshot(), (X, TARGETS))
        self.assertIn("The saved run had other metrics", "".join(logs.output))
        history = second.fit(X, TARGETS, epochs=2, shuffle=False, verbose=0).history
        self.assertEqual(second.position.update, 8)
        _, error = model("mae").evaluate(X[32:], TARGETS[32:], verbose=0)  # what the epoch had left; the rate is 0
        self.assertAllClose(history["mae"], [error], rtol=1e-6)


class OverrideTest(tf.test.TestCase):
    def test_values_without_a_metric_are_named(self):
        """Only the last batch would tell them, and there is none that all devices have."""

        class Model(keras.Sequential):
            def compute_metrics(self, x, y, y_pred, sample_weight=None):
                results = super().compute_metrics(x, y, y_pred, sample_weight)
                self.kept.update_state(y_pred)
                return results | {"gap": keras.ops.max(y_pred) - keras.ops.min(y_pred), "kept": self.kept.result()}

        model = Model([keras.layers.Dense(1)])
        model.kept = keras.metrics.Mean(name="kept")
        model.compile("sgd", "mse")
        x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
        with self.assertLogs(level="WARNING") as logs:
            history = Trainer(model, batch_size=8, microbatch_size=4).fit(x, y, verbose=0).history
        self.assertEqual([line.count("'gap'") for line in logs.output if "compute_metrics" in line], [1])
        self.assertNotIn("'kept'", str(logs.output))
        self.assertIn("kept", history)


class Penalty(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight) + keras.ops.sum(self.dense.kernel**2)


class PaddingTest(parameterized.TestCase, tf.test.TestCase):
    """Where the last batch is filled up, as on several hosts: what ignores weights is refused by name."""

    def check(self, own):
        engine = Trainer(own, batch_size=16)
        engine.evaluate(dataset(X, TARGETS))
        engine = engine.engine
        engine.check_scoring()  # nothing is padded on one host
        check_padding(own, engine.loss_terms)

    def test_refused_by_name(self):
        own = IgnoresWeights()
        own.compile("sgd", "mse")
        active = model("mae")
        active.layers[0].activity_regularizer = keras.regularizers.L2()
        scalar = model()
        scalar.compile("sgd", mean_error)
        for refused, name in (
            (own, r"IgnoresWeights\.compute_loss"),
            (scalar, "mean_error"),
            (model(Count(), "mae"), "count"),
            (active, "losses that layers add"),
            (model("mae", unweighted=["mse"]), "`metrics=`"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"weight 0. They would count in: {name}[.,] "):
                self.check(refused)

    def test_padding_leaves_the_score(self):
        """A penalty in the loss counts once for each example, and padding is none."""
        own, plain = Penalty(), Subclassed()
        tracked = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_regularizer="l2")])
        sequences = keras.Sequential([keras.Input((10, 4)), keras.layers.Dense(1)])
        steps = np.random.default_rng(1).normal(size=(5, 10, 4)).astype("float32")
        for model, x, y in (
            (own, X[:5], TARGETS[:5]),
            (plain, X[:5], TARGETS[:5]),
            (tracked, X[:5], TARGETS[:5]),
            (sequences, steps, steps[..., :1]),
        ):
            model.compile("sgd", "mse")
            model(x)
            filled = [np.concatenate([a, np.repeat(a[:1], 3, axis=0)]) for a in (x, y)]
            whole = score_batch(model, x, y, None, padded=False)
            padded = score_batch(model, *filled, np.array([1.0] * 5 + [0.0] * 3, "float32"), padded=True)
            self.assertAllClose(summary(*map(float, padded)), summary(*map(float, whole)), rtol=1e-6)

    def test_taken(self):
        own = Penalty()
        own.compile("sgd", "mse", weighted_metrics=["mae", lambda y, p: keras.ops.mean(keras.ops.abs(y - p), -1)])
        self.check(own)
        self.check(model("mae", MaskedExamples()))  # train.py's: to count what has weight 0 is what it is for
        with self.assertRaisesRegex(ValueError, "They would count in: count[.,] "):
            self.check(model(Count(), MaskedExamples()))
