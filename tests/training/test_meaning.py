"""`Trainer` means what `model.fit` and `model.evaluate` mean, or refuses, on TensorFlow and JAX.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from models.batch_norm import SyncBatchNormalization

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype("float32")
Y = RNG.normal(size=(64, 1)).astype("float32")


def dataset(*arrays, batch=8):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch)


class Subclassed(keras.Model):
    """A model with a layer; the cases add what Keras lets a model have of its own."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)


class OverrideTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        "train_step", "test_step", "make_train_function", "make_test_function", "fit", "evaluate", "train_on_batch"
    )
    def test_a_loop_of_its_own_is_refused(self, name):
        inherited = type("Own", (Subclassed,), {name: lambda self, *args, **kwargs: None})
        for model in (inherited(), type("Child", (inherited,), {})()):
            model.compile("sgd", "mse")
            with self.assertRaisesRegex(ValueError, rf"none of a model's own: {name}\. Put"):
                Trainer(model, batch_size=16)

    def test_one_that_was_put_into_the_model_is_refused(self):
        model = Subclassed()
        model.compile("sgd", "mse")
        model.train_step = lambda data: {}
        with self.assertRaisesRegex(ValueError, "own: train_step"):
            Trainer(model, batch_size=16)

    def test_keras_models_have_none(self):
        inputs = keras.Input((4,))
        for model in (
            Subclassed(),
            keras.Sequential([inputs, keras.layers.Dense(1)]),
            keras.Model(inputs, keras.layers.Dense(1)(inputs)),
        ):
            model.compile("sgd", "mse")
            Trainer(model, batch_size=16)


def replicas(count):
    """Return a context in which models are on so many devices."""
    if BACKEND == "tensorflow":
        if count == 1:
            return tf.distribute.OneDeviceStrategy("/cpu:0").scope()
        devices = [f"/cpu:{i}" for i in range(count)]
        return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice()).scope()
    import jax

    devices = jax.devices()[:count]
    return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False).scope()


@contextlib.contextmanager
def float64():
    """Make float64 the default, which JAX has only if asked for."""

    def switch(on):
        keras.config.set_floatx("float64" if on else "float32")
        if BACKEND == "jax":
            import jax

            jax.config.update("jax_enable_x64", on)

    switch(True)
    try:
        yield
    finally:
        switch(False)


T = RNG.normal(size=(25, 10, 4)).astype("float32")
TOKENS = RNG.integers(1, 9, (25, 6))
TOKENS[:, 4:] = 0


def sequential(*layers, shape=(4,), loss="mse", metrics=("mse",), dtype=None, optimizer=None):
    model = keras.Sequential([keras.Input(shape, dtype=dtype), *layers])
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, weighted_metrics=list(metrics))
    return model


def divides_by_its_norm():
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(1)(inputs / keras.ops.sqrt(keras.ops.sum(inputs * inputs, -1, keepdims=True)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    return model


def two_outputs():
    """Return a model of two outputs of different rank, each with a loss and a weight."""
    inputs = keras.Input((10, 4))
    steps = keras.layers.Dense(1, name="steps")(inputs)
    whole = keras.layers.Dense(1, name="whole")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, {"steps": steps, "whole": whole})
    losses = {"steps": "mse", "whole": "mae"}
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights={"steps": 0.5, "whole": 2.0})
    return model


class Tracking(Subclassed):
    """Updates a metric in `compute_loss`, which has a penalty and another one in training."""

    def __init__(self):
        super().__init__()
        self.tracker = keras.metrics.Mean(name="own")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight) + 0.1 * keras.ops.sum(self.dense.kernel**2)
        self.tracker.update_state(loss, keras.ops.shape(x)[0])
        return loss + (0.0 if training else 100.0)


class IgnoresWeights(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return keras.ops.mean(keras.ops.abs(y - y_pred))


def compiled(model):
    model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=["mae"])
    return model


def scalar_loss(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)


def activity_loss(examples):
    layer = keras.layers.Dense(1, kernel_initializer="ones", activity_regularizer="l2")
    layer(np.ones((examples, 1), "float32"))
    return layer.losses[0]


CASES = {
    "time steps": (lambda: sequential(keras.layers.Dense(1), shape=(10, 4)), T, T[..., :1]),
    "pixels": (
        lambda: sequential(
            keras.layers.Conv2D(3, 3, padding="same"),
            shape=(5, 2, 4),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        ),
        T.reshape(25, 5, 2, 4),
        RNG.integers(0, 3, (25, 5, 2)),
    ),
    "two outputs": (two_outputs, T, {"steps": T[..., :1], "whole": T[:, 0, :1]}),
    "norm": (divides_by_its_norm, X[:25], Y[:25]),
    "mask": (
        lambda: sequential(
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
            shape=(6,),
            dtype="int32",
        ),
        TOKENS,
        Y[:25],
    ),
    "masked time steps": (
        lambda: sequential(
            keras.layers.Embedding(9, 4, mask_zero=True), keras.layers.Dense(1), shape=(6,), dtype="int32"
        ),
        np.where(np.arange(6) < 1 + np.arange(25)[:, None] % 6, 3, 0),
        T[:, :6, :1],
    ),
    "scalar loss": (lambda: sequential(keras.layers.Dense(1), loss=scalar_loss), X[:25], Y[:25]),
    "activity": (
        lambda: sequential(keras.layers.Dense(3, activity_regularizer="l2"), keras.layers.Dense(1)),
        X[:25],
        Y[:25],
    ),
    "regularizer": (lambda: sequential(keras.layers.Dense(1, kernel_regularizer="l2")), X[:25], Y[:25]),
    "compute_loss": (lambda: compiled(Tracking()), X[:25], Y[:25]),
    "no weights": (lambda: compiled(IgnoresWeights()), X[:25], Y[:25]),
}
DEVICES = (1, 2)
ALL = tuple((case, devices) for case in CASES for devices in DEVICES)
# On two devices every case, on one those with several losses, masks, and a loss of the model's own.
QUICK = tuple(cell for cell in ALL if cell[1] == 2 or cell[0] in ("two outputs", "masked time steps", "compute_loss"))


class EvaluationTest(parameterized.TestCase, tf.test.TestCase):
    """25 examples in batches that do not divide them, against one batch in Keras."""

    @parameterized.parameters(*QUICK)
    def test_as_keras(self, case, devices):
        self.check(case, devices)

    @parameterized.parameters(*(cell for cell in ALL if cell not in QUICK))
    @pytest.mark.slow
    def test_the_rest_as_keras(self, case, devices):
        self.check(case, devices)

    def check(self, case, devices):
        make, x, y = CASES[case]
        if case == "activity" and float(activity_loss(examples=2)) != float(activity_loss(examples=1)):
            self.skipTest(f"in Keras {keras.__version__} the loss of an activity grows with the batch")
        with replicas(devices):
            model = make()
            scores = Trainer(model, batch_size=8).evaluate(dataset(x, y, batch=6))
        reference = make()
        reference(x[:1])
        reference.set_weights([np.array(w) for w in model.get_weights()])
        expected = reference.evaluate(x, y, batch_size=25, verbose=0, return_dict=True)
        self.assertEqual(scores.pop("n"), 25)
        self.assertEqual(scores.keys(), expected.keys())
        for name, value in expected.items():
            self.assertAllClose(scores[name], value, rtol=1e-5, msg=name)

    @parameterized.parameters(1, 2)
    def test_weights_per_time_step(self, devices):
        """The loss is sum(w l) / sum(w), as for weights per example."""
        with replicas(devices):
            model = sequential(keras.layers.Dense(1), shape=(10, 4), metrics=["mae"])
            losses = (np.array(model(T)) - T[..., :1])[..., 0] ** 2
            for weights in (np.ones((25, 10)), RNG.random((25, 10))):
                data = dataset(T, T[..., :1], weights.astype("float32"), batch=6)
                scores = Trainer(model, batch_size=8).evaluate(data)
                self.assertAllClose(scores["loss"], (weights * losses).sum() / weights.sum(), rtol=1e-5)
                self.assertAllClose(scores["n"], weights.sum() / 10, rtol=1e-5)


class TrainingTest(parameterized.TestCase, tf.test.TestCase):
    """One update of a global batch, cut in every way, against Keras's."""

    @parameterized.parameters(
        *((case, devices) for case in ("two outputs", "compute_loss", "no weights") for devices in DEVICES)
    )
    def test_as_keras(self, case, devices):
        make, x, y = CASES[case]
        x, y = keras.tree.map_structure(lambda a: a[:16], (x, y))
        with replicas(devices):
            model = make()
            model(x[:1])
            start = [np.array(w) for w in model.get_weights()]
            history = Trainer(model, batch_size=16, microbatch_size=4).fit(dataset(x, y), verbose=0).history
        reference = make()
        reference(x[:1])
        reference.set_weights(start)
        expected = reference.fit(x, y, batch_size=16, verbose=0).history
        for name, values in expected.items():
            self.assertAllClose(history[name], values, rtol=1e-5, msg=name)
        for actual, value in zip(model.get_weights(), reference.get_weights(), strict=True):
            self.assertAllClose(np.array(actual), np.array(value), rtol=1e-5, atol=1e-6)

    @parameterized.parameters([(n,) for n in DEVICES if n == 1 or BACKEND == "jax"])
    def test_batch_norm_far_from_zero(self, devices):
        """A compiled step keeps the variance where E[x^2] - E[x]^2 had no digit left, at a mean of 1e4."""
        x = X[:16] + np.float32([0.0, 1e3, -1e4, 1e4])

        def make(synchronized):
            layer = SyncBatchNormalization(momentum=0.5, synchronized=synchronized)
            return sequential(layer, keras.layers.Dense(1, kernel_initializer="ones"), metrics=[])

        with replicas(devices):
            model = make(synchronized=devices > 1)
            trainer = Trainer(model, batch_size=16, jit_compile=True)
            history = trainer.fit(dataset(x, Y[:16]), epochs=3, verbose=0).history
        reference = make(synchronized=False)
        expected = reference.fit(x, Y[:16], batch_size=16, epochs=3, shuffle=False, verbose=0).history
        self.assertAllClose(history["loss"], expected["loss"], rtol=2e-3)  # a spacing of inputs is 1e-3 of their range
        variance = (1 - 0.5**3) * x.astype("float64").var(0) + 0.5**3
        self.assertAllClose(np.array(model.layers[0].moving_variance), variance, rtol=1e-5)

    def test_float64(self):
        """Sums of gradients, loss and batch statistics keep the digits of Keras's own."""
        with float64(), replicas(1):
            x, y = RNG.normal(size=(16, 4)), RNG.normal(size=(16, 1))

            def make():
                layers = [keras.layers.Dense(1, dtype="float64")]
                if BACKEND == "tensorflow":  # on JAX Keras's batch normalization computes in float32
                    layers = [keras.layers.BatchNormalization(dtype="float64"), *layers]
                model = sequential(*layers, metrics=[], dtype="float64")
                model.set_weights([np.ones(w.shape) for w in model.get_weights()])
                return model

            model, reference = make(), make()
            loss = Trainer(model, batch_size=16, microbatch_size=16).fit(dataset(x, y), verbose=0).history["loss"]
            expected = reference.fit(x, y, batch_size=16, verbose=0).history["loss"]
            split = make()
            for layer in split.layers[:-1]:
                layer.trainable = False
            once = keras.models.clone_model(split)
            once.set_weights(split.get_weights())
            for m, size in ((split, 4), (once, 16)):
                m.compile(keras.optimizers.SGD(0.1), "mse")
                Trainer(m, batch_size=16, microbatch_size=size).fit(dataset(x, y), verbose=0)
        self.assertAllClose(loss, expected, rtol=1e-6)  # Keras's own losses are in floatx
        for actual, value in ((model, reference), (split, once)):
            for a, b in zip(actual.get_weights(), value.get_weights(), strict=True):
                self.assertAllClose(np.array(a), np.array(b), rtol=1e-13, atol=1e-14)

    def test_resume_with_several_losses(self):
        _, x, y = CASES["two outputs"]
        data = dataset(x[:16], keras.tree.map_structure(lambda a: a[:16], y))
        keras.utils.set_random_seed(0)
        whole = Trainer(two_outputs(), batch_size=8).fit(data, epochs=2, verbose=0).history
        keras.utils.set_random_seed(0)
        trainer = Trainer(two_outputs(), batch_size=8)
        trainer.fit(data, verbose=0)
        for _ in range(2):  # the second restart failed on TensorFlow
            arrays, position = trainer.snapshot()
            trainer = Trainer(two_outputs(), batch_size=8)
            trainer.restore(arrays, position, data)
        rest = trainer.fit(data, epochs=2, verbose=0).history
        for name in ("loss", "steps_loss", "whole_loss"):
            self.assertAllClose(rest[name][-1], whole[name][-1], rtol=1e-6)


class SecondPhaseTest(parameterized.TestCase, tf.test.TestCase):
    """A model that is changed between two calls, against two calls of Keras's `fit`."""

    def model(self):
        model = sequential(
            keras.layers.Dense(3, kernel_initializer="ones", name="back"),
            keras.layers.Dense(1, kernel_initializer="ones"),
        )
        model.layers[0].trainable = False
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", weighted_metrics=["mse"])
        return model

    @parameterized.parameters(
        ("fit", "unfrozen"), ("fit", "loss and metrics"), ("evaluate", "frozen"), ("evaluate", "optimizer")
    )
    def test_compiled_again(self, first, change):
        def changed(model):
            if change in ("unfrozen", "frozen"):
                model.layers[0].trainable = change == "unfrozen"
                model.layers[1].trainable = change == "unfrozen"
                if change == "frozen":
                    model.layers[0].trainable = True
            if change == "loss and metrics":
                model.compile(model.optimizer, "mae", weighted_metrics=["mae", "cosine_similarity"])
            else:
                model.compile(keras.optimizers.Adam(0.01), "mse", weighted_metrics=["mse"])

        data = dataset(X, Y)
        model, reference = self.model(), self.model()
        trainer = Trainer(model, batch_size=16, microbatch_size=8)
        if first == "fit":
            trainer.fit(data, verbose=0)
            reference.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        else:
            trainer.evaluate(data)
        changed(model)
        changed(reference)
        scores = trainer.evaluate(data)
        expected = reference.evaluate(X, Y, batch_size=64, verbose=0, return_dict=True)
        self.assertEqual(scores.pop("n"), 64)
        self.assertAllClose(scores, expected, rtol=1e-5)
        history = trainer.fit(data, epochs=2, verbose=0).history
        expected = reference.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        self.assertAllClose({name: history[name] for name in expected}, expected, rtol=1e-5)
        self.assertAllClose(history["learning_rate"][-1], float(model.optimizer.learning_rate))
        for actual, value in zip(model.get_weights(), reference.get_weights(), strict=True):
            self.assertAllClose(np.array(actual), np.array(value), rtol=1e-5, atol=1e-6)
        self.assertEqual(int(model.optimizer.iterations), int(reference.optimizer.iterations))

    def test_changed_without_compile(self):
        """Keras's `fit` goes on with the old state on TensorFlow and fails on JAX; `Trainer` refuses on both."""
        model, data = self.model(), dataset(X, Y)
        trainer = Trainer(model, batch_size=16)
        trainer.fit(data, verbose=0)
        model.layers[0].trainable = True
        trainer.evaluate(data)
        with self.assertRaisesRegex(
            ValueError, "frozen or unfrozen in part: `trainable` of back .*`model.compile` again"
        ):
            trainer.fit(data, verbose=0)
        model.compile(model.optimizer, "mse")  # it knows two variables
        with self.assertRaisesRegex(ValueError, "optimizer was built for 2 variables.*the 4 trainable.*new optimizer"):
            trainer.fit(data, verbose=0)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        trainer.fit(data, verbose=0)

        class Freezes(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.model.layers[0].trainable = False

        with self.assertRaisesRegex(ValueError, "frozen or unfrozen in part: `trainable` of back"):
            trainer.fit(data, epochs=2, callbacks=[Freezes()], verbose=0)
        compiles = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: model.compile("sgd", "mse"))
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "compiled again while it was trained"):
            trainer.fit(data, epochs=2, callbacks=[compiles], verbose=0)
        trainer.fit(data, verbose=0)
        trainer.restore(*trainer.snapshot(), data)
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(RuntimeError, "no state yet"):
            trainer.snapshot()
        with self.assertRaisesRegex(ValueError, "compiled again after `restore`"):
            trainer.fit(data, verbose=0)
        model.add(keras.layers.Dense(1, name="added"))
        model.compile("sgd", "mse")
        trainer = Trainer(model, batch_size=16)
        trainer.evaluate(data)
        model.add(keras.layers.Dense(1, name="another"))
        with self.assertRaisesRegex(ValueError, "a new layer, another"):
            trainer.evaluate(data)
