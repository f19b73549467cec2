"""The norms that both engines measure for the noise scale, against every ghost batch's gradient in float64 NumPy.

`tests/jax/test_on_jax.py` runs this file on JAX, too, with eight devices.
"""

import keras
import numpy as np
import sklearn.datasets
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.noise_scale import NoiseScaleEstimator
from lars_keras.training import Trainer
from lars_keras.training.cluster import make_cluster
from tests import step_cases as cases

GHOST = 8
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def measured_by_numpy():
    """Return `(g_b, g_B)` of each update and variable of `cases.linear` at its first weights, rate 0."""
    keras.utils.set_random_seed(1)
    kernel, bias = (np.array(w, "float64") for w in cases.linear().get_weights())
    ghost, mean = [], []
    x, y = (a.astype("float64").reshape(cases.UPDATES, cases.BATCH // GHOST, GHOST, -1) for a in cases.examples())
    for features, labels in zip(x, y, strict=True):
        logits = features @ kernel + bias
        p = np.exp(logits - logits.max(-1, keepdims=True))
        error = p / p.sum(-1, keepdims=True) - labels
        gradients = [np.einsum("gbf,gbc->gfc", features, error) / GHOST, error.mean(1)[:, None]]
        ghost.append([np.square(g).sum((1, 2)).mean() for g in gradients])
        mean.append([np.square(g.mean(0)).sum() for g in gradients])
    return np.array(ghost), np.array(mean)


class Norms(keras.callbacks.Callback):
    """Keeps the norms of every update."""

    def __init__(self):
        super().__init__()
        self.ghost, self.mean = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.ghost += list(self.trainer.measures["ghost_gradient"])
        self.mean += list(self.trainer.measures["gradient"])


def digits(count=512):
    """Return the pixels and one-hot labels of handwritten digits, 8 x 8 each."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return (images[:count] / 16.0).astype("float32"), np.eye(10, dtype="float32")[labels[:count]]


def example_gradients(model, x, y):
    """Return the gradient of each example's cross-entropy in float64 NumPy, `(examples, parameters)`."""
    first, first_bias, second, second_bias = (np.array(w, "float64") for w in model.get_weights())
    hidden = np.tanh(x @ first + first_bias)
    logits = hidden @ second + second_bias
    p = np.exp(logits - logits.max(-1, keepdims=True))
    error = p / p.sum(-1, keepdims=True) - y
    back = (error @ second.T) * (1.0 - hidden**2)
    outer = [np.einsum("ni,nj->nij", *pair).reshape(len(x), -1) for pair in ((x, back), (hidden, error))]
    return np.concatenate([*outer, back, error], -1)


def measured(model=cases.linear, data=None, *, strategy="none", scaled=False, **options):
    """Return `(g_b, g_B)` of each update, of a Trainer that leaves the weights as they are.

    Args:
        model: a model, or a function that makes it under the strategy.
        data: features and labels, those of `cases` by default.
        strategy: its name.
        scaled: whether the loss is scaled.
        **options: of the Trainer.
    """
    keras.utils.set_random_seed(1)
    with cases.strategy(strategy).scope():
        model = model if isinstance(model, keras.Model) else model()
        optimizer = keras.optimizers.SGD(0.0)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    norms = Norms()
    norms.trainer = Trainer(model, batch_size=cases.BATCH, microbatch_size=GHOST, noise_scale=True, **options)
    norms.trainer.fit(
        tf.data.Dataset.from_tensor_slices(data or cases.examples()).batch(50), epochs=1, callbacks=[norms], verbose=0
    )
    return np.square(np.array(norms.ghost, "float64")), np.square(np.array(norms.mean, "float64"))


class NoiseScaleTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("none", {}),
        ("none", {"jit_compile": True, "steps_per_execution": 2}),
        ("none", {"scaled": True}),
        ("mirrored2", {}),
    )
    def test_against_every_ghost_batch(self, strategy, options):
        if not ON_TENSORFLOW and strategy != "none":
            self.skipTest("tf.distribute is TensorFlow's")
        for found, expected in zip(measured(strategy=strategy, **options), measured_by_numpy(), strict=True):
            self.assertAllClose(found, expected, rtol=1e-5)

    def test_against_the_gradient_of_every_example(self):
        """512 digits, a network with a hidden layer: the intervals hold the noise and noise scale of all of them."""
        x, y = digits()
        model = cases.hidden(x.shape[-1], y.shape[-1])
        each = example_gradients(model, x, y)
        true = np.square(each.mean(0)).sum()
        noise = each.var(0).sum()  # the updates draw with replacement, so the 512 are the whole population
        draws = np.random.default_rng(0).integers(0, len(x), (256, cases.BATCH))
        found = NoiseScaleEstimator(GHOST, cases.BATCH)
        for update in zip(*measured(model, (x[draws.ravel()], y[draws.ravel()])), strict=True):
            found.add(*update)
        found = found.total()
        self.assertBetween(noise / true, found.low, found.high)
        self.assertLess(found.high / found.low, 1.5)
        self.assertAllClose(found.noise, noise, rtol=0.03)

    def test_one_ghost_batch_is_refused(self):
        model = cases.linear()
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "choose a smaller `microbatch_size`"):
            Trainer(model, batch_size=8, noise_scale=True)

    @parameterized.parameters(False, True)
    def test_eight_devices(self, sharded):
        """The one reduction carries the squares, also where weights and gradients are sharded."""
        if ON_TENSORFLOW:
            self.skipTest("keras.distribution is JAX's")
        try:
            make_cluster("mirrored", replicas=8, shard_optimizer_state=sharded)
            found = measured()
        finally:
            keras.distribution.set_distribution(None)
        for values, expected in zip(found, measured_by_numpy(), strict=True):
            self.assertAllClose(values, expected, rtol=1e-5)


if __name__ == "__main__":
    tf.test.main()
