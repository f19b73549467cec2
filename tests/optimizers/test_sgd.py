"""SGD with another rate for biases: against Keras's SGD to the bit, and against float64 NumPy."""

import pathlib
import tempfile
import warnings

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

from lars_keras import SGD, schedules

RATE = {"peak": 0.2, "warmup_updates": 2, "total_updates": 9}
SHAPES = {"kernel": (4, 3), "bias": (3,)}


def trained(optimizer, steps=8):
    """Return kernel and bias after some updates with random gradients."""
    rng = np.random.default_rng(5)
    values = {name: rng.normal(size=shape).astype("float32") for name, shape in SHAPES.items()}
    variables = [keras.Variable(value, name=name) for name, value in values.items()]
    optimizer.build(variables)
    for _ in range(steps):
        gradients = [keras.ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32")) for v in variables]
        optimizer.apply(gradients)
    return [keras.ops.convert_to_numpy(v) for v in variables]


def oracle(momentum, nesterov, weight_decay, bias_scale, steps=8):
    """Return the same, in float64."""
    rng = np.random.default_rng(5)
    w = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    schedule = schedules.WarmupPolynomial(**RATE)
    for step in range(steps):
        rate = float(schedule(step))
        for name in SHAPES:
            g = rng.normal(size=SHAPES[name])
            if name == "kernel":
                w[name] = w[name] - rate * weight_decay * w[name]
            own = rate * (bias_scale if name == "bias" else 1.0)
            v[name] = momentum * v[name] - own * g
            w[name] = w[name] + (momentum * v[name] - own * g if nesterov else v[name])
    return [w["kernel"], w["bias"]]


def model():
    inputs = keras.Input((6,))
    x = layers.Dense(5, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(2, name="second")(x))


class SGDTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(nesterov=[False, True], momentum=[0.0, 0.9], scale=[1.0, 64.0, 0.0])
    def test_oracle(self, nesterov, momentum, scale):
        optimizer = SGD(
            schedules.WarmupPolynomial(**RATE),
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=0.1,
            excluded_lr_scale=scale,
        )
        for found, expected in zip(trained(optimizer), oracle(momentum, nesterov, 0.1, scale), strict=True):
            self.assertAllClose(found, expected, rtol=2e-6, atol=2e-6 * max(1.0, scale))

    def test_at_scale_1_it_is_that_of_keras_to_the_bit(self):
        options = {"momentum": 0.9, "nesterov": True}
        ours = trained(SGD(schedules.WarmupPolynomial(**RATE), **options))
        theirs = trained(keras.optimizers.SGD(schedules.WarmupPolynomial(**RATE), **options))
        for found, expected in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_patterns_decide(self):
        net = model()
        optimizer = SGD(0.1, exclude=("^norm/", "second/bias"), excluded_lr_scale=8.0, weight_decay=0.5)
        optimizer.build(net.trainable_variables)
        before = [keras.ops.convert_to_numpy(v) for v in net.trainable_variables]
        optimizer.apply([keras.ops.ones(v.shape) for v in net.trainable_variables])
        for v, old in zip(net.trainable_variables, before, strict=True):
            excluded = v.path.startswith("norm/") or v.path == "second/bias"
            expected = old - 0.8 if excluded else old * (1 - 0.1 * 0.5) - 0.1
            self.assertAllClose(keras.ops.convert_to_numpy(v), expected, rtol=1e-6, atol=1e-6, msg=v.path)

    def test_a_saved_model_keeps_its_exclusions(self):
        """Keras drops the name of a `Sequential`, which the pattern names, when it loads the model."""
        net = keras.Sequential([keras.Input((6,)), layers.Dense(5), layers.Dense(2)], name="outer")
        optimizer = SGD(0.1, momentum=0.9, exclude=("^outer/.*kernel",), excluded_lr_scale=8.0, weight_decay=0.5)
        net.compile(optimizer, "mse")
        x, y = np.random.default_rng(0).normal(size=(2, 16, 6)).astype("float32")
        y = y[:, :2]
        net.fit(x, y, epochs=2, verbose=0)
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "m.keras")
        net.save(path)
        loaded = keras.models.load_model(path)
        self.assertEqual(loaded.optimizer.get_config(), optimizer.get_config())
        for each in (net, loaded):
            each.fit(x, y, epochs=2, shuffle=False, verbose=0)
        for a, b in zip(net.variables, loaded.variables, strict=True):
            self.assertAllClose(*map(keras.ops.convert_to_numpy, (a, b)), rtol=1e-6, atol=1e-7)

    def test_variables_that_keras_excludes_from_decay_stay_so(self):
        """Also a decay that is set after the optimizer is built leaves the excluded variables alone."""
        kernel, bias = keras.Variable(np.ones((2, 2), "float32"), name="kernel"), keras.Variable([1.0], name="bias")
        optimizer = SGD(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["kernel"])
        optimizer.build([kernel, bias])
        optimizer.weight_decay = 0.25
        optimizer.apply([keras.ops.zeros((2, 2)), keras.ops.zeros(1)])
        for variable in (kernel, bias):
            self.assertAllEqual(keras.ops.convert_to_numpy(variable), np.ones(variable.shape))

    def test_a_model_without_trained_variables(self):
        net = keras.Sequential([keras.Input((6,)), layers.Rescaling(2.0)])
        net.compile(SGD(0.1), "mse")
        x = np.ones((4, 6), "float32")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The model does not have any trainable weights")
            self.assertAllClose(net.fit(x, x, verbose=0).history["loss"], [1.0])

    @parameterized.parameters(
        ({"excluded_lr_scale": -1.0}, "`excluded_lr_scale` must be a number of at least 0"),
        ({"exclude": "bias"}, "`exclude` must be a list or tuple"),
    )
    def test_bad_arguments(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            SGD(0.1, **arguments)

    def test_set_later(self):
        """The constructor would refuse what is saved, or the exclusions would be those of before."""
        optimizer = SGD(0.1)
        with self.assertRaisesRegex(AttributeError, "`exclude` to the constructor"):
            optimizer.exclude = ()
        with self.assertRaisesRegex(ValueError, "`excluded_lr_scale`.*Received: excluded_lr_scale=-1"):
            optimizer.excluded_lr_scale = -1
        optimizer.excluded_lr_scale = 2
        self.assertEqual(SGD.from_config(optimizer.get_config()).excluded_lr_scale, 2.0)

    def test_a_pattern_that_matches_nothing(self):
        with self.assertRaisesRegex(ValueError, "matches none of the 6 trainable variables"):
            SGD(0.1, exclude=("nothing",)).build(model().trainable_variables)


if __name__ == "__main__":
    tf.test.main()
