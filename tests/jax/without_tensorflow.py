"""Trains on JAX from NumPy batches where TensorFlow cannot be imported; run by test_without_tensorflow.py.

Prints `equal` if training, evaluation, snapshot and restore do from NumPy batches what they must.
"""

import json
import pathlib
import sys
import tempfile


class NoTensorFlow:
    """Refuses the import of TensorFlow."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("no TensorFlow here")


sys.meta_path.insert(0, NoTensorFlow())

import keras  # noqa: E402
import numpy as np  # noqa: E402

import lars_keras.runtime.checkpoint  # noqa: E402
import lars_keras.runtime.divergence  # noqa: E402
import lars_keras.runtime.preemption  # noqa: E402
import lars_keras.runtime.recovery  # noqa: E402, F401
from lars_keras import LARS  # noqa: E402
from lars_keras.training import Trainer  # noqa: E402
from lars_keras.training.cluster import make_cluster  # noqa: E402
from tools.benchmarks import cifar10_arrays, optimizer_step, training_step  # noqa: E402

BATCH, FEATURES, CLASSES, UPDATES = 16, 6, 3, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH * UPDATES + 3, FEATURES)).astype("float32")
Y = np.eye(CLASSES, dtype="float32")[RNG.integers(0, CLASSES, len(X))]


def batches(size, x=X, y=Y):
    """Return the examples in batches of another size than any that the trainer takes."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def endless(context, first_update):
    """Return the training feed: a generator of the examples from an update on, again and again."""
    start = first_update * BATCH
    while True:
        yield X[start : start + 7], Y[start : start + 7]
        start = start + 7 if start + 7 < len(X) else 0


def finite(context):
    """Return the feed of an evaluation: a generator that ends."""
    yield from batches(10)


def make_trainer(cluster):
    keras.utils.set_random_seed(1)
    with cluster.scope():
        model = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.2, seed=3),
                keras.layers.Dense(CLASSES),
            ]
        )
        model.compile(
            LARS(1.0, weight_decay=1e-3),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
        )
    return Trainer(model, batch_size=BATCH, microbatch_size=4, variable_norms=True)


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)


def main():
    cluster = make_cluster("mirrored", replicas=2)
    assert (cluster.replicas, cluster.hosts, cluster.is_chief) == (2, 1, True)

    # A feed that is a function.
    trainer = make_trainer(cluster)
    trainer.fit(endless, epochs=1, steps_per_epoch=3, verbose=0)
    middle = trainer.snapshot()
    trainer.fit(endless, epochs=1, steps_per_epoch=UPDATES, validation_data=finite, verbose=0)
    middle_of_other = trainer.snapshot()[0]
    assert any((middle_of_other[name] != value).any() for name, value in middle[0].items())

    # Restored, it goes on as a run that was not interrupted.
    resumed, whole = make_trainer(cluster), make_trainer(cluster)
    resumed.restore(*middle, endless)
    resumed.fit(endless, epochs=UPDATES, steps_per_epoch=1, verbose=0)
    whole.fit(endless, epochs=UPDATES, steps_per_epoch=1, verbose=0)
    assert (resumed.position.update, whole.position.update) == (UPDATES, UPDATES)
    same(
        {k: v for k, v in resumed.snapshot()[0].items() if not k.startswith("metric")},
        {k: v for k, v in whole.snapshot()[0].items() if not k.startswith("metric")},
    )

    # A list of batches has the same examples; its last partial global batch is left out.
    listed = make_trainer(cluster)
    history = listed.fit(batches(10), epochs=1, verbose=0)
    assert listed.position.update == UPDATES, history.history
    same(
        {k: v for k, v in listed.snapshot()[0].items() if not k.startswith("metric")},
        {k: v for k, v in whole.snapshot()[0].items() if not k.startswith("metric")},
    )

    # So have arrays.
    of_arrays = make_trainer(cluster)
    of_arrays.fit(X, Y, shuffle=False, validation_data=(X, Y), verbose=0)
    same(
        {k: v for k, v in of_arrays.snapshot()[0].items() if not k.startswith("metric")},
        {k: v for k, v in whole.snapshot()[0].items() if not k.startswith("metric")},
    )

    # Every example is scored once, whatever the batches.
    logits = whole.model(X, training=False)
    loss = float(keras.losses.CategoricalCrossentropy(from_logits=True)(Y, logits))
    for data in (finite, batches(10), batches(1), batches(len(X))):
        scores = whole.evaluate(data)
        assert scores["n"] == len(X), scores
        np.testing.assert_allclose(scores["loss"], loss, rtol=1e-5)

    # What can be read once only is refused.
    try:
        make_trainer(cluster).fit(iter(batches(10)), epochs=1, steps_per_epoch=2, verbose=0)
    except ValueError as e:
        assert "again and again" in str(e), e
    else:
        raise AssertionError("an iterator was taken")
    # The benchmarks of a GPU machine.
    update = optimizer_step.measure([(9, 8), (8,)], "float32", rounds=1)
    assert {"LARS (ours)", "LAMB (ours)", "optax.lars"} <= {row["name"] for row in update["rows"]}
    rows = training_step.measure("lenet1989", size=16, batch=4, steps=1, rounds=1, dtypes=["bfloat16"])
    assert [row["name"] for row in rows[:2]] == ["Trainer", "Keras fit"], rows
    assert all(row["images_per_second"] > 0 for row in rows), rows
    recipes_of_cifar10()
    assert not [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]
    print("equal")


def recipes_of_cifar10():
    """Train two runs of bright and dark images at once, and look at their rows."""
    labels = RNG.integers(0, 2, 160).astype("uint8")
    images = RNG.integers(0, 100, (160, 16, 16, 3), "uint8") + 150 * labels[:, None, None, None]
    with tempfile.TemporaryDirectory() as folder:
        path, runs, out = (pathlib.Path(folder) / name for name in ("images.npz", "runs.txt", "rows.jsonl"))
        splits = (images[:120], labels[:120], images[120:], labels[120:])
        np.savez(path, **dict(zip(cifar10_arrays.ARRAYS, splits, strict=True)))
        flags = "--model=lenet1989 --dataset=cifar10 --augment=alternating_flip --batch_size=24 --microbatch_size=12"
        flags += ' --epochs=6 --warmup="2 updates" --optimizer=momentum --learning_rate=0.02 --test_views=2'
        runs.write_text(f"{flags} --seed=1\n\n{flags} --validation_split=0.2\n")
        assert cifar10_arrays.several(runs, 2, path, out)
        rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["seed"])
        assert [(row["updates"], row["validation_split"]) for row in rows] == [(24, 0.2), (30, 0.0)], rows
        assert all(row["top1"] == row["top1_views"] == 1 and "trust_coefficient" not in row for row in rows), rows


if __name__ == "__main__":
    main()
