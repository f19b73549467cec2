"""Processes of train.py that are started to be killed."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from running.exit_codes import HOST_LOST, USAGE

ROOT = Path(__file__).parents[2]
NUM_TRAIN, NUM_TEST, BATCH = 320, 40, 64
UPDATES_PER_EPOCH = NUM_TRAIN // BATCH
FLAGS = (
    "--model=alexnet_small",  # has dropout and batch normalization
    "--dataset=cifar10",
    f"--batch_size={BATCH}",
    "--microbatch_size=16",
    "--warmup=1",
    "--learning_rate=2",
    "--excluded_lr_scale=0.01",
    "--ema_momentum=0.9",
    "--checkpoint_updates=1",
)
PLAN = "\n  batch "  # is printed by the process that holds the folder
LAST_WORDS = 40.0  # seconds in which a worker notices that another is gone


@dataclasses.dataclass(frozen=True)
class Cell:
    """The devices of a run.

    Attributes:
        name: name of the cell.
        flags: in addition to `FLAGS`.
        backend: Keras backend.
        processes: number of processes of a run.
        at_once: runs that are started on one folder.
        tolerance: largest relative difference to a run that was not killed; 0 is bit for bit.
        steps: updates of a run. Workers that share a processor wait for each other.
    """

    name: str
    flags: tuple[str, ...]
    backend: str = "tensorflow"
    processes: int = 1
    at_once: int = 1
    tolerance: float = 0.0
    steps: int = 24


SINGLE = ("--strategy=single",)
EIGHT = ("--strategy=mirrored", "--replicas=8", "--microbatch_size=4", "--shard_optimizer_state")
CELLS = {
    cell.name: cell
    for cell in (
        Cell("single", SINGLE),
        Cell("mirrored", ("--strategy=mirrored", "--replicas=2"), tolerance=1e-5),
        Cell("two_workers", ("--strategy=multi_worker",), processes=2, tolerance=1e-5, steps=12),
        Cell("jax", SINGLE, "jax"),
        Cell("jax_8", EIGHT, "jax", tolerance=1e-5),
        Cell("hammer", SINGLE, at_once=2),
        Cell("array", SINGLE),
    )
}


def write_images(folder: Path) -> None:
    """Write random images as the data set cifar10, which is augmented by crops and flips."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)

    def split(n: int) -> Iterator[Any]:
        for i in range(n):
            yield i, {"id": str(i), "image": rng.integers(0, 256, (32, 32, 3), np.uint8), "label": i % 10}

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version="3.0.2",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": split(NUM_TRAIN), "test": split(NUM_TEST)},
        data_dir=folder,
    )


class Job:
    """One run of train.py, in as many processes as its cell asks for.

    Args:
        cell: its devices.
        flags: all flags but those of every run.
        cache: folder of the programs that JAX has compiled.
        cwd: working folder.

    Attributes:
        pids: IDs of its processes.
        started: time of its start.
    """

    def __init__(self, cell: Cell, flags: Sequence[str], cache: Path, cwd: Path = ROOT):
        environment = {
            **os.environ,
            "KERAS_BACKEND": cell.backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for name in ("INTEROP", "INTRAOP"):  # the order of a parallel sum follows the number of threads
            environment[f"TF_NUM_{name}_THREADS"] = "2"
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        self._cell, self._killed, self.started = cell, False, time.time()
        self._printed: list[str] = []
        self._outputs = [tempfile.TemporaryFile("w+b") for _ in range(cell.processes)]
        self._processes = [
            subprocess.Popen(command, cwd=cwd, env=environment | more, stdout=output, stderr=subprocess.STDOUT)
            for output, more in zip(self._outputs, _clusters(cell.processes), strict=True)
        ]
        self.pids = [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Return True while one of its processes lives."""
        return any(process.poll() is None for process in self._processes)

    @property
    def trains(self) -> bool:
        """Return True if it has come to hold its folder."""
        return any(PLAN in self.output(i) for i in range(len(self._outputs)))

    def output(self, process: int) -> str:
        """Return the output of a process."""
        if self._printed:
            return self._printed[process]
        descriptor = self._outputs[process].fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def kill(self, only: int | None = None) -> bool:
        """Kill its processes, or first only one, which the others must notice. Return False if none was left to kill.

        Raises:
            RuntimeError: if a process that was left alone ends as if nothing were wrong.
        """
        chosen = self._processes if only is None else [self._processes[only]]
        if all(process.poll() is not None for process in chosen):
            return False
        for process in chosen:
            process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + LAST_WORDS * (only is not None)
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        for i, process in enumerate(self._processes):
            process.send_signal(signal.SIGKILL)  # a worker that still waits for the other to start
            process.wait()
            if process.returncode not in (0, -signal.SIGKILL, HOST_LOST):
                raise RuntimeError(f"A worker whose peer was killed ended with {process.returncode}:\n{self.output(i)}")
        self._killed = True
        self._close()
        return True

    def end(self) -> bool:
        """Wait for its end, unless it was killed. Return True if it was refused because another holds the folder.

        Raises:
            RuntimeError: if it failed.
        """
        while not self._killed and all(process.poll() is None for process in self._processes):
            time.sleep(0.05)
        if not self._killed and any(process.returncode == HOST_LOST for process in self._processes):
            self.kill()  # a busy machine made one miss the other; the run is started again
        if self._killed:
            return False
        try:
            codes = [process.wait(timeout=600) for process in self._processes]
        finally:
            self._close()
        if codes == [USAGE] and self._cell.at_once > 1:
            self._check_refusal()
            return True
        for i, code in enumerate(codes):
            if code and not (code == HOST_LOST and len(codes) > 1):
                raise RuntimeError(f"train.py ended with {code}:\n{self.output(i)}")
        return False

    def _check_refusal(self) -> None:
        output, messages = self.output(0), ("in use by process", "holds a finished run")
        if len(output.splitlines()) != 1 or not any(text in output for text in messages):
            raise RuntimeError(f"train.py did not refuse its folder in one line:\n{output}")

    def _close(self) -> None:
        self._printed = [self.output(i) for i in range(len(self._outputs))]
        for output in self._outputs:
            output.close()


def _clusters(count: int) -> list[dict[str, str]]:
    """Return the environment of each process of a run."""
    if count == 1:
        return [{}]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    clusters = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(count)]
    return [{"TF_CONFIG": json.dumps(cluster)} for cluster in clusters]
