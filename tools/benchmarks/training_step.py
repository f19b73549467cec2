"""Time whole training steps: ours, Keras `fit` and PyTorch, in turn, on the same images.

    python -m tools.benchmarks.training_step --out=results/training_step.json
    KERAS_BACKEND=jax python -m tools.benchmarks.training_step --networks=resnet50,alexnet_bn --batch=256 --out=FILE

The first command suits a CPU. The second needs no TensorFlow, and suits a GPU. A row is the median images per second
over the rounds, and the median of the ratios to Keras `fit` in the mode of the row, round by round. PyTorch is timed
if it is installed: compiled where a GPU is found, else eager. Networks have the size of their published inputs.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import logging

import models
from lars_keras import LARS
from lars_keras.training import Trainer
from lars_keras.versions import versions
from tools.benchmarks.machines import machine
from tools.committed import write_json

BACKEND = keras.backend.backend()
MODES = {"jax": ("jit",), "tensorflow": ("graph", "xla")}
DTYPES = ("float32", "bfloat16")
PACKAGES = ("keras", "tensorflow", "tensorflow-cpu", "jax", "torch", "numpy")


class OneBatch(keras.utils.PyDataset):
    """Gives the same batch, again and again."""

    def __init__(self, x: np.ndarray, y: np.ndarray, count: int):
        super().__init__()
        self.x, self.y, self.count = x, y, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x, self.y


@dataclasses.dataclass
class Candidate:
    """Hold one way to train. `train` takes so many steps and returns when the device is done."""

    name: str
    mode: str
    dtype: str
    train: Callable[[int], Any]


def batch_of(network: str, size: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, size, size, 3), "uint8"), rng.integers(0, classes(network), batch, "int32")


def classes(network: str) -> int:
    """Return the number of classes of the data set for which a network is made."""
    return 1000 if models.default_image_size(network) > 100 else 10


def keras_candidates(network: str, x: np.ndarray, y: np.ndarray, dtype: str) -> list[Candidate]:
    """Return `Trainer` and Keras `fit` on the same network with LARS, in each mode of the backend."""
    found = []
    for mode in MODES[BACKEND]:
        for name in ("Trainer", "Keras fit"):
            keras.config.set_dtype_policy("float32" if dtype == "float32" else f"mixed_{dtype}")
            try:
                model = models.get(network, num_classes=classes(network), input_shape=x.shape[1:], seed=0)
            finally:
                keras.config.set_dtype_policy("float32")
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(LARS(0.1), loss, jit_compile=mode != "graph")
            trainer = Trainer(model, batch_size=len(x), jit_compile=mode != "graph")
            fit = model.fit if name == "Keras fit" else trainer.fit

            def train(steps: int, fit: Callable[..., Any] = fit) -> None:
                fit(OneBatch(x, y, steps), verbose=0)

            found.append(Candidate(name, mode, dtype, train))
    return found


def torch_candidates(network: str, x: np.ndarray, y: np.ndarray, dtype: str) -> list[Candidate]:
    """Return PyTorch with SGD and momentum, if it is installed and has the network."""
    if not importlib.util.find_spec("torch"):
        return []
    import torch

    from tools.benchmarks.torch_networks import NETWORKS

    if network not in NETWORKS:
        return []

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = NETWORKS[network](classes(network)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    mean, images, labels = 127.5, torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y, dtype=torch.long)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model((images.float() - mean) / mean)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    compiled = torch.compile(loss_of) if device.type == "cuda" else loss_of

    def train(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = compiled(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            loss.backward()
            optimizer.step()
        return float(loss.detach())  # waits for the device

    return [Candidate("PyTorch", "compile" if device.type == "cuda" else "eager", dtype, train)]


def measure(
    network: str, size: int, batch: int, steps: int, rounds: int, dtypes: Sequence[str] = DTYPES
) -> list[dict[str, Any]]:
    """Return a row for each candidate: it takes `steps` steps a round, after two that compile and warm up."""
    x, y = batch_of(network, size, batch)
    found = []
    for dtype in dtypes:
        found += [*keras_candidates(network, x, y, dtype), *torch_candidates(network, x, y, dtype)]
    for candidate in found:
        candidate.train(2)
    speeds: list[list[float]] = [[] for _ in found]
    for _ in range(rounds):
        for candidate, seen in zip(found, speeds, strict=True):
            start = time.perf_counter()
            candidate.train(steps)
            seen.append(batch * steps / (time.perf_counter() - start))
    rows: list[dict[str, Any]] = []
    for candidate, seen in zip(found, speeds, strict=True):
        beside = [c.dtype == candidate.dtype and c.name == "Keras fit" for c in found]
        same = [i for i, fits in enumerate(beside) if fits and found[i].mode in (candidate.mode, MODES[BACKEND][0])][-1]
        ratio = statistics.median(a / b for a, b in zip(seen, speeds[same], strict=True))
        row = {"network": network, "size": size, "batch": batch, "backend": BACKEND, "name": candidate.name}
        row |= {"mode": candidate.mode, "dtype": candidate.dtype}
        row |= {"images_per_second": round(statistics.median(seen), 1), "of_keras_fit": round(ratio, 3)}
        row |= {"steps": steps, "rounds": rounds}
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="fast_cifar,resnet18", help="of `models`")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, help="height and width of the images; default: that of the network")
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results; rows of other networks and backends stay")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    rows, networks = [], args.networks.split(",")
    for network in networks:
        size = args.size or models.default_image_size(network)
        rows += measure(network, size, args.batch, args.steps, args.rounds, args.dtypes.split(","))
        print("\n".join(json.dumps(row) for row in rows if row["network"] == network), flush=True)
    if args.out:
        held = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
        new = {(row["backend"], row["network"], row["dtype"]) for row in rows}
        rows = [row for row in held if (row["backend"], row["network"], row["dtype"]) not in new] + rows
        about = {"machine": machine(), "versions": versions(PACKAGES), "xla_flags": os.environ.get("XLA_FLAGS", "")}
        write_json(args.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
