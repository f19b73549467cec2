"""Time one update of models whose arithmetic costs next to nothing: what remains is the host's own work.

    KERAS_BACKEND=jax python -m tools.benchmarks.host_time --out=results/host_time.json

`Trainer` and Keras `fit` train the same model in turn, one update a call, in rounds of one process. A row is the median
time between two calls of `on_train_batch_end`. Run it once on each backend: the file keeps the other's rows.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import logging

import models
from lars_keras import LARS
from lars_keras.training import Trainer
from tools.committed import write_json

BATCH = 8


def chain(layers: int = 160) -> keras.Model:
    """Return a chain of small Dense layers: two variables each."""
    x = inputs = keras.Input((4,))
    for _ in range(layers):
        x = keras.layers.Dense(4)(x)
    return keras.Model(inputs, x)


def resnet50() -> keras.Model:
    """Return ResNet-50 for images of 32 pixels, the smallest that it takes: 161 trainable variables."""
    return models.get("resnet50", num_classes=10, input_shape=(32, 32, 3), seed=0)


MODELS: dict[str, Callable[[], keras.Model]] = {"chain of 160 Dense layers": chain, "ResNet-50 at 32 pixels": resnet50}


class Intervals(keras.callbacks.Callback):
    """Record the seconds between updates, without the first ones, which compile."""

    def __init__(self, warm_up: int):
        super().__init__()
        self.warm_up = warm_up
        self.seconds: list[float] = []
        self._calls, self._last = 0, 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._calls = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        if self._calls >= self.warm_up:
            self.seconds.append(now - self._last)
        self._calls, self._last = self._calls + 1, now


def loops(make_model: Callable[[], keras.Model], updates: int) -> dict[str, Callable[[keras.callbacks.Callback], None]]:
    """Return functions that take `updates` updates each, of `Trainer` and of Keras `fit`, on the same data."""
    run: dict[str, Callable[[keras.callbacks.Callback], None]] = {}
    for name in ("Trainer", "Keras fit"):
        model = make_model()
        shape = (BATCH * updates, *model.input_shape[1:])
        x, y = np.zeros(shape, "float32"), np.zeros((BATCH * updates, model.output_shape[-1]), "float32")
        model.compile(LARS(0.1), "mse", jit_compile=keras.backend.backend() == "jax")
        fit = model.fit if name == "Keras fit" else Trainer(model, batch_size=BATCH).fit
        options: dict[str, Any] = {"batch_size": BATCH} if name == "Keras fit" else {}

        def go(callback: Any, fit: Any = fit, x: Any = x, y: Any = y, options: Any = options) -> None:
            fit(x, y, epochs=1, shuffle=False, verbose=0, callbacks=[callback], **options)

        run[name] = go
    return run


def measure(make_model: Callable[[], keras.Model], updates: int, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds between updates of each loop, and the median ratio of the rounds."""
    run = loops(make_model, updates)
    medians: dict[str, list[float]] = {name: [] for name in run}
    for i in range(rounds + 1):
        for name, go in run.items():
            intervals = Intervals(warm_up=updates // 4)
            go(intervals)
            if i:
                medians[name].append(1e3 * statistics.median(intervals.seconds))
    ratio = statistics.median(a / b for a, b in zip(medians["Trainer"], medians["Keras fit"], strict=True))
    return {
        **{f"{name}, ms": round(statistics.median(values), 2) for name, values in medians.items()},
        "ratio": round(ratio, 3),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="only the models whose name has this word")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    backend, rows = keras.backend.backend(), []
    for name, make_model in MODELS.items():
        if args.model and args.model not in name:
            continue
        rows.append({"backend": backend, "model": name, **measure(make_model, args.updates, args.rounds)})
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        held = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
        new = {(row["backend"], row["model"]) for row in rows}
        rows = [row for row in held if (row["backend"], row["model"]) not in new] + rows
        command = f"KERAS_BACKEND=BACKEND python -m {__spec__.name}" + (f" --model={args.model}" if args.model else "")
        machine = f"{platform.machine()}, {os.cpu_count()} cores, keras {keras.__version__}"
        write_json(args.out, {"command": command, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
