"""The models, data and strategies on which one device, N replicas and k micro-batches are compared."""

import itertools
import time

import keras
import numpy as np
import tensorflow as tf

from lars_keras import LARS, SGD
from lars_keras.training import Trainer
from models.batch_norm import batch_normalization
from tests.reference import ReferenceLARS

BATCH, FEATURES, CLASSES, UPDATES = 64, 12, 5, 5

OPTIMIZERS = {
    "lars": lambda **more: LARS(5.0, trust_coefficient=0.02, weight_decay=0.05, excluded_lr_scale=0.01, **more),
    "momentum": lambda **more: SGD(0.1, momentum=0.9, excluded_lr_scale=4.0, **more),
}


def strategy(name):
    """Return a strategy by the name the tests use, with as many of the eight logical devices."""
    if isinstance(name, tf.distribute.Strategy):
        return name
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "one":
        return tf.distribute.OneDeviceStrategy("/cpu:0")
    replicas = int(name.removeprefix("mirrored"))
    return tf.distribute.MirroredStrategy(
        [f"/cpu:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def examples(updates=UPDATES):
    """Return features and one-hot labels for `updates` global batches."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * updates, FEATURES)).astype("float32")
    return x, np.eye(CLASSES, dtype="float32")[rng.integers(0, CLASSES, len(x))]


def linear():
    """Return a model whose gradient NumPy can say."""
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES)])


def hidden(features=FEATURES, classes=CLASSES):
    return keras.Sequential([keras.Input((features,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(classes)])


def batch_norm(synchronized=False):
    def make():
        return keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dense(16, use_bias=False),
                batch_normalization(momentum=0.8, synchronized=synchronized),
                keras.layers.ReLU(),
                keras.layers.Dense(CLASSES),
            ]
        )

    return make


def dropout():
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(CLASSES)])


TABLE = tuple(itertools.product((1, 4), OPTIMIZERS, ("float32", "mixed_bfloat16")))
"""Micro-batches, optimizer, precision: what every strategy is compared on."""

PAIRS = tuple(TABLE[i] for i in (0, 3, 5, 6))
"""The rows in which any two settings meet, whatever the third."""

OPPOSITES = TABLE[1], TABLE[6]
"""Two rows in which every setting comes once."""


def trained_row(strategy_name, replicas, accumulation_steps, optimizer, policy):
    """Return what `trained` does, for a row of `TABLE`."""
    size = BATCH // replicas // accumulation_steps
    return trained(hidden, OPTIMIZERS[optimizer], strategy_name, microbatch_size=size, policy=policy)


def trained(make_model, optimizer, strategy_name="none", *, microbatch_size=None, policy="float32", **trainer):
    """Return the trainer after `UPDATES` updates from the same start on the same global batches, and the history."""
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    try:
        with strategy(strategy_name).scope():
            model = make_model()
            model.compile(
                optimizer(),
                keras.losses.CategoricalCrossentropy(from_logits=True),
                weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
            )
        trainer = Trainer(model, batch_size=BATCH, microbatch_size=microbatch_size, **trainer)
        data = tf.data.Dataset.from_tensor_slices(examples()).batch(50)
        history = trainer.fit(data, epochs=1, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    return trainer, history.history


def state(trainer):
    """Return every weight and optimizer variable, by number and last word of its name."""
    variables = [*trainer.model.weights, *trainer.model.optimizer.variables]
    return {f"{i} {v.name.rpartition('_')[2]}": v.numpy() for i, v in enumerate(variables)}


def oracle():
    """Return weights, slots and losses of `linear` under `OPTIMIZERS["lars"]`, in float64 NumPy."""
    keras.utils.set_random_seed(1)
    start = [np.array(w, "float64") for w in linear().get_weights()]
    lars = ReferenceLARS(
        start,
        (True, False),
        (True, False),
        learning_rate=5.0,
        trust_coefficient=0.02,
        weight_decay=0.05,
        excluded_lr_scale=0.01,
    )
    x, y = (a.astype("float64").reshape(UPDATES, BATCH, -1) for a in examples())
    losses = []
    for features, labels in zip(x, y, strict=True):
        logits = features @ lars.weights[0] + lars.weights[1]
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.mean(np.sum(labels * np.log(p), 1)))
        lars.step([features.T @ (p - labels) / BATCH, np.mean(p - labels, 0)])
    return lars.weights, lars.slots, losses


def waits_for_slow_batches(model):
    """Trains for 16 updates; three batches take 0.5 s each to read, long after what is compiled is compiled.

    Before them a callback takes 0.3 s after each of four updates, in which no data are wanted.

    Returns the `data_wait` of each update, those of the updates that follow the callback's pauses, and the seconds in
    all.
    """
    trainer = Trainer(model, batch_size=BATCH, microbatch_size=BATCH // 2)
    waits = []

    def note(batch, logs):
        waits.append(logs["data_wait"])
        time.sleep(0.3 if 3 <= len(waits) < 7 else 0.0)

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    x, y = (part[:BATCH] for part in examples())

    def read(i):
        time.sleep(0.5 if 10 <= i < 13 else 0.0)
        return x, y

    batches = tf.data.Dataset.range(1000).map(lambda i: tf.numpy_function(read, [i], (tf.float32, tf.float32)))
    batches = batches.map(lambda x, y: (tf.ensure_shape(x, [BATCH, FEATURES]), tf.ensure_shape(y, [BATCH, CLASSES])))
    started = time.monotonic()
    trainer.fit(lambda *_: batches, epochs=16, steps_per_epoch=1, verbose=0, callbacks=[watch])
    return waits, waits[3:7], time.monotonic() - started
