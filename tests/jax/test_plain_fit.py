"""`model.fit` of Keras under `keras.distribution`: LARS and LAMB take the steps that they take on one device.

`test_on_jax.py` runs this file on JAX, with eight logical CPU devices.
"""

import contextlib
import functools
import io
import re
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LAMB, LARS, schedules
from lars_keras.training import Trainer
from tests import step_cases as cases
from tests.test_blocks import notebook_code

ON_JAX = keras.backend.backend() == "jax"
OPTIMIZERS = {
    "lars": lambda **more: LARS(5.0, trust_coefficient=0.02, weight_decay=0.05, excluded_lr_scale=0.01, **more),
    "lamb": lambda **more: LAMB(0.05, weight_decay=0.05, **more),
}
FEATURES = {
    "clipnorm": {"clipnorm": 0.01},
    "together": {
        "global_clipnorm": 0.02,
        "use_ema": True,
        "ema_momentum": 0.8,
        "gradient_accumulation_steps": 2,
        "steps_per_execution": 5,
    },
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_execution": 5},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
}
WIDE = 32  # divides into two shards


def distributions():
    """Return the distributions by name: the batch over 8 devices; the batch over 4, and each kernel over 2."""
    shards = keras.distribution.DeviceMesh((4, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(shards)
    layout[".*first.kernel"] = (None, "model")
    layout[".*second.kernel"] = ("model", None)
    return {
        "none": None,
        "data": keras.distribution.DataParallel(auto_shard_dataset=False),
        "model": keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False),
    }


@functools.cache
def fitted(distribution, optimizer, feature=None):
    """Return the losses of two epochs and the weights after them."""
    options = dict(FEATURES.get(feature, {}))
    policy, steps = options.pop("policy", "float32"), options.pop("steps_per_execution", 1)
    keras.distribution.set_distribution(distributions()[distribution])
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((cases.FEATURES,)),
                keras.layers.Dense(WIDE, "relu", name="first"),
                keras.layers.Dense(cases.CLASSES, dtype="float32", name="second"),
            ]
        )
        model.compile(
            OPTIMIZERS[optimizer](**options),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            steps_per_execution=steps,
        )
        size = cases.BATCH // options.get("gradient_accumulation_steps", 1)
        history = model.fit(*cases.examples(), batch_size=size, epochs=2, shuffle=False, verbose=0)
        if distribution == "model":
            sharding = model.layers[0].kernel.value.sharding
            assert not sharding.is_fully_replicated, sharding
        return np.array(history.history["loss"]), [np.array(w) for w in model.get_weights()]
    finally:
        keras.distribution.set_distribution(None)
        keras.config.set_dtype_policy("float32")


def largest_difference(a, b):
    """Return the largest difference of two lists of weights, relative to the largest weight of each; all are finite."""
    assert all(np.isfinite(weight).all() for weight in (*a[1], *b[1]))
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(a[1], b[1], strict=True))


class PlainFitTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if not ON_JAX:
            self.skipTest("keras.distribution is JAX's")

    @parameterized.product(distribution=("data", "model"), optimizer=("lars", "lamb"))
    def test_one_device(self, distribution, optimizer):
        """Norms over a sharded kernel are norms of the whole kernel."""
        one, many = fitted("none", optimizer), fitted(distribution, optimizer)
        self.assertAllClose(many[0], one[0], rtol=1e-5)
        self.assertLess(largest_difference(many, one), 2e-6)

    @parameterized.parameters(
        ("clipnorm", "lars", "data"),
        ("together", "lars", "data"),
        ("together", "lamb", "model"),
        ("mixed_bfloat16", "lars", "data"),
    )
    def test_features(self, feature, optimizer, distribution):
        """A feature changes the step, and changes it as on one device."""
        one, many = fitted("none", optimizer, feature), fitted(distribution, optimizer, feature)
        # bfloat16 gradients are summed in another order
        self.assertLess(largest_difference(many, one), 0.02 if feature == "mixed_bfloat16" else 2e-6)
        self.assertGreater(largest_difference(one, fitted("none", optimizer)), 1e-4)

    def test_accumulation_and_several_steps_per_execution_change_nothing(self):
        self.assertLess(largest_difference(fitted("none", "lars", "accumulation"), fitted("none", "lars")), 2e-6)

    def test_a_schedule_counts_updates_under_keras_accumulation(self):
        schedule = schedules.WarmupPolynomial(peak=1.0, warmup_updates=2, total_updates=50)
        weights = []
        for steps in (None, 4):
            keras.utils.set_random_seed(1)
            model = cases.linear()
            model.compile(LARS(schedule, gradient_accumulation_steps=steps), "mse")
            model.fit(*cases.examples(), batch_size=cases.BATCH // (steps or 1), shuffle=False, verbose=0)
            self.assertAllClose(model.optimizer.learning_rate, schedule(cases.UPDATES))
            weights += [model.get_weights()]
        self.assertAllClose(*weights, rtol=1e-5)


class NotebookTest(tf.test.TestCase):
    def test_first_minutes_on_a_tpu(self):
        """The notebook, shortened, on eight devices."""
        if not ON_JAX:
            self.skipTest("the notebook is JAX's")
        names, printed = {}, io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(notebook_code("tpu"), "tpu", "exec"), names)
        finally:
            keras.distribution.set_distribution(None)
            keras.config.set_dtype_policy("float32")
        self.assertEqual(names["trainer"].replicas, 8)
        self.assertGreater(names["scores"]["accuracy"], 0.85)
        self.assertLen(re.findall("(?m)^Noise scale", printed.getvalue()), 4)  # after 20, 40, 60 and all 62 updates

    def test_large_batch_on_cifar_10(self):
        """The notebook, shortened, on images made here. Classes differ in brightness."""
        if not ON_JAX:
            self.skipTest("one backend is enough")
        random, labels = np.random.default_rng(0), np.arange(192) % 10
        images = random.integers(0, 75, (192, 32, 32, 3)) + 18 * labels[:, None, None, None]
        images, labels = images.astype("uint8"), labels.astype("uint8")[:, None]
        parts = (images[:160], labels[:160]), (images[160:], labels[160:])
        names, printed = {}, io.StringIO()
        with (
            unittest.mock.patch.object(keras.datasets.cifar10, "load_data", lambda: parts),
            contextlib.redirect_stdout(printed),
        ):
            exec(compile(notebook_code("cifar10"), "cifar10", "exec"), names)
        self.assertEqual(int(names["trainer"].model.optimizer.iterations), 15)
        self.assertRegex(printed.getvalue(), "lars +batch +32 +peak rate 10 +top-1")
        self.assertLen(re.findall("(?m)^Noise scale", printed.getvalue()), 2)


class OnTensorFlowTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        if ON_JAX:
            self.skipTest("this is the process on JAX")

    def test_keras_clips_the_gradients_of_each_replica(self):
        """So the page on devices says that two replicas can take twice the step; `Trainer` does not."""
        x, y = (np.tile(a[:8], (2, 1)) for a in cases.examples())  # the same on both replicas
        steps = {}
        for fit in (
            keras.Model.fit,
            lambda model, *data, **_: Trainer(model, batch_size=16).fit(arrays(*data), verbose=0),
        ):
            with cases.strategy("mirrored2").scope():
                model = cases.linear()
                model.compile(keras.optimizers.SGD(1.0, global_clipnorm=0.01), "mse")
            before = [np.array(w) for w in model.get_weights()]
            fit(model, x, y, batch_size=16, shuffle=False, verbose=0)
            moved = [a - b for a, b in zip(model.get_weights(), before, strict=True)]
            steps[fit is keras.Model.fit] = np.sqrt(sum(np.square(m).sum() for m in moved))
        self.assertAllClose(steps, {True: 0.02, False: 0.01}, rtol=1e-4)


def arrays(x, y):
    """Return a data set of one batch."""
    return tf.data.Dataset.from_tensors((x, y))


if __name__ == "__main__":
    tf.test.main()
