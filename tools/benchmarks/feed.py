"""Time the way of large batches to the devices, beside Keras `fit`: the model looks at one pixel of an image.

    KERAS_BACKEND=jax python -m tools.benchmarks.feed --out=results/feed.json
    KERAS_BACKEND=tensorflow python -m tools.benchmarks.feed --out=results/feed.json

`Trainer` and Keras `fit` take the same batches in turn, in rounds of one process. A row is the median time of an
update. The file keeps the rows of the other backend.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import logging

from lars_keras.training import Trainer
from tools.benchmarks.machines import machine
from tools.benchmarks.training_step import OneBatch
from tools.committed import write_json

FORMS = ("PyDataset", "arrays")


def one_pixel(size: int) -> keras.Model:
    """Return a model that reads the first pixel of uint8 images."""
    x = keras.Input((size, size, 3), dtype="uint8")
    pixel = keras.layers.Flatten()(keras.layers.Cropping2D(((0, size - 1), (0, size - 1)))(x))
    model = keras.Model(x, keras.layers.Dense(10)(keras.layers.Rescaling(1 / 255)(pixel)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=keras.backend.backend() == "jax")
    return model


def loops(form: str, size: int, batch: int, updates: int) -> dict[str, Callable[[], Any]]:
    """Return functions that take `updates` updates, of `Trainer` and of Keras `fit`, on the same data."""
    rng = np.random.default_rng(0)
    several = 1 if form == "PyDataset" else updates
    x = rng.integers(0, 256, (batch * several, size, size, 3), "uint8")
    y = rng.integers(0, 10, len(x), "int32")
    first, second = one_pixel(size), one_pixel(size)
    trainer = Trainer(first, batch_size=batch)
    if form == "PyDataset":
        return {
            "Trainer": lambda: trainer.fit(OneBatch(x, y, updates), verbose=0),
            "Keras fit": lambda: second.fit(OneBatch(x, y, updates), verbose=0),
        }
    return {
        "Trainer": lambda: trainer.fit(x, y, verbose=0),
        "Keras fit": lambda: second.fit(x, y, batch_size=batch, verbose=0),
    }


def measure(form: str, size: int, batch: int, updates: int, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of an update of each loop, and the median ratio of the rounds."""
    run = loops(form, size, batch, updates)
    seen: dict[str, list[float]] = {name: [] for name in run}
    for i in range(rounds + 1):
        for name, go in run.items():
            start = time.perf_counter()
            go()
            if i:
                seen[name].append(1e3 * (time.perf_counter() - start) / updates)
    ratio = statistics.median(a / b for a, b in zip(seen["Trainer"], seen["Keras fit"], strict=True))
    milliseconds = {f"{name}, ms": round(statistics.median(values), 2) for name, values in seen.items()}
    return {"form": form, "megabytes": round(batch * size**2 * 3 / 1e6, 1), **milliseconds, "ratio": round(ratio, 3)}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=227, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--updates", type=int, default=40, help="of a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    backend = keras.backend.backend()
    rows = []
    for form in FORMS:
        rows.append({"backend": backend, **measure(form, args.size, args.batch, args.updates, args.rounds)})
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        held = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"rows": []}
        rows = [row for row in held["rows"] if row["backend"] != backend] + rows
        about = {"command": "KERAS_BACKEND=BACKEND python -m tools.benchmarks.feed", "machine": machine()}
        write_json(args.out, held | about | {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
