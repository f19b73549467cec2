"""Try the installed wheel, outside of the checkout and without TensorFlow: `make test-wheel` runs this as a script."""

import importlib.util
import pathlib
import tempfile

import keras
import numpy as np

import lars_keras
from lars_keras import LARS, schedules

CHECKOUT = pathlib.Path(__file__).parents[1]


def made():
    """Return a compiled model and data that it can learn."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(2)])
    rate = schedules.WarmupPolynomial(peak=10.0, warmup_updates=8, total_updates=160)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = LARS(rate, trust_coefficient=0.02, excluded_lr_scale=0.01)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model, x, y


def main():
    """Train by `fit` and by `Trainer`, save and load."""
    installed = pathlib.Path(lars_keras.__file__)
    assert "site-packages" in installed.parts, f"not the wheel: {installed}"
    assert importlib.util.find_spec("tensorflow") is None, "the environment is not empty: it has TensorFlow"
    for name in ("models", "flags", "running", "tools", "tests", "train"):
        assert importlib.util.find_spec(name) is None, f"`{name}` is in the wheel"
    for name in ("py.typed", "report/templates/report.html"):
        assert (installed.parent / name).is_file(), f"`{name}` is not in the wheel"

    model, x, y = made()
    history = model.fit(x, y, batch_size=32, epochs=20, verbose=0).history
    assert history["accuracy"][-1] > 0.95, history["accuracy"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))

    from lars_keras.training import Trainer

    model, x, y = made()
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, len(x), 32)]
    history = Trainer(model, batch_size=32, microbatch_size=8).fit(batches, epochs=20, verbose=0).history
    assert history["accuracy"][-1] > 0.9, history["accuracy"]
    print(f"lars_keras {lars_keras.__version__}, Keras {keras.__version__}, {keras.backend.backend()}: works")


if __name__ == "__main__":
    main()
