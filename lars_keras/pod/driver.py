"""`check`: answers a request in a process with the right Keras backend."""

import dataclasses
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from lars_keras.pod.chips import chip_of
from lars_keras.pod.report import PodReport, make_report
from lars_keras.reference import Reference

BACKENDS = ("jax", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Request:
    """The request to a worker: the arguments of `check`.

    Attributes:
        make_model: function that returns the model.
        batch_spec: structure as `lars_keras.pod.batch.parse_batch` takes it, or a function that returns it.
        search: compile a second size, to find the largest micro-batch.
    """

    make_model: Callable[[], keras.Model]
    batch_spec: Any
    topology: str
    batch_size: int
    microbatch_size: int | None
    shard_optimizer_state: bool
    reduce_dtype: str
    variable_norms: bool
    search: bool


def check(
    make_model: Callable[[], keras.Model] | str,
    batch_spec: Any,
    *,
    topology: str,
    batch_size: int,
    microbatch_size: int | None = None,
    backend: str = "jax",
    shard_optimizer_state: bool = False,
    reduce_dtype: str = "float32",
    variable_norms: bool = False,
    search: bool = True,
) -> PodReport:
    """Compile the update that `Trainer` would run on a TPU slice, and say what it costs. No TPU is needed.

    The work is done in a process of its own with the requested Keras backend. It imports `make_model` by its name. A
    function that cannot be imported (a lambda, or one defined in a notebook, in `__main__` or inside another function)
    runs in this process instead, if JAX is both the requested backend and the backend of this process.

    Args:
        make_model: a function without arguments that returns a compiled `keras.Model`, or its name,
            `"package.module:function"`. A `functools.partial` of an importable function is accepted, if its arguments
            can be pickled. The function sets the dtype policy, too:
            `keras.config.set_dtype_policy("mixed_bfloat16")`.
        batch_spec: `(x, y)` or `(x, y, sample_weight)`, each a nested structure: a text such as `"uint8:224,224,3"`,
            the dtype and shape of one example, or anything with `shape`, batch dimension first, and `dtype`, such as an
            array. Or a function that returns this structure, or the name of such a function.
        topology: chip and shape of the slice, such as `"v5e:8x8"`; the chips are in `lars_keras.pod.chips.CHIPS`.
        batch_size: global batch size.
        microbatch_size: examples that a device takes through the model at once. Default: its part of the batch.
        backend: Keras backend of the step, `"jax"` or `"tensorflow"`.
        shard_optimizer_state: each device keeps and updates a shard of the weights; JAX only.
        reduce_dtype: dtype of the gradients on their way between devices; JAX only.
        variable_norms: measure the norms of all layers in the update, as `Trainer(variable_norms=True)` does.
        search: compile at a second micro-batch size, to find the largest that fits; takes twice the time.

    Raises:
        ValueError: for an argument or a model that is refused; the message says what is accepted.
        RuntimeError: if the TPU compiler is not installed, or `make_model` or the compiler fails.
    """
    chip = chip_of(topology)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}. Received: backend={backend!r}")
    if backend == "tensorflow" and (shard_optimizer_state or reduce_dtype != "float32"):
        raise ValueError(
            "`shard_optimizer_state` and `reduce_dtype` are for JAX. Received: backend='tensorflow', "
            f"shard_optimizer_state={shard_optimizer_state}, reduce_dtype={reduce_dtype!r}"
        )
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
        raise RuntimeError("The pod check needs the TPU compiler: install this project with its extra [pod].")
    if isinstance(make_model, str):
        make_model = Reference(make_model, "make_model")
    if not callable(make_model):
        raise ValueError(
            "`make_model` must be a function that returns a compiled Keras model. Received: "
            f"{type(make_model).__name__}"
        )
    if isinstance(batch_spec, str):
        batch_spec = Reference(batch_spec, "batch_spec")
    if not callable(batch_spec):
        from lars_keras.pod.batch import parse_batch

        batch_spec = parse_batch(batch_spec)
    request = Request(
        make_model=make_model,
        batch_spec=batch_spec,
        topology=topology,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        shard_optimizer_state=shard_optimizer_state,
        reduce_dtype=reduce_dtype,
        variable_norms=variable_norms,
        search=search,
    )
    pickled = _pickled(request)
    if pickled is not None:
        answer = _in_own_process(pickled, backend)
    elif backend == "jax" == keras.backend.backend():
        answer = _in_this_process(request)
    else:
        raise ValueError(
            f"The step runs in a process with KERAS_BACKEND={backend}, which must import `make_model`: write it at the "
            "top of a module, and give the function or its name, package.module:function. Received: "
            f"make_model={make_model!r}, in a process with KERAS_BACKEND={keras.backend.backend()}"
        )
    if "error" in answer:
        error = (ValueError if answer["refused"] else RuntimeError)(answer["error"])
        if answer["traceback"]:
            error.add_note(answer["traceback"])
        raise error
    return make_report(answer, chip, batch_size)


def _pickled(request: Request) -> bytes | None:
    """Return the request for another process, or None if that could not import its functions."""
    try:
        pickled = pickle.dumps(request)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return None if b"__main__" in pickled else pickled


def _in_this_process(request: Request) -> dict[str, Any]:
    from lars_keras.pod import worker

    policy, distribution = keras.config.dtype_policy(), keras.distribution.distribution()
    keras.distribution.set_distribution(None)  # the model is only described; it lies on no device of this one
    try:
        return worker.answer(request)
    finally:
        keras.config.set_dtype_policy(policy)
        keras.distribution.set_distribution(distribution)


def _in_own_process(pickled: bytes, backend: str) -> dict[str, Any]:
    """Run `lars_keras.pod.worker` on a request, with that Keras backend and this process's sys.path."""
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request", Path(folder) / "answer"
        request.write_bytes(pickled)
        process = subprocess.run(
            [sys.executable, "-m", "lars_keras.pod.worker", os.fspath(request), os.fspath(out)],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                "JAX_PLATFORMS": "cpu",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if out.exists():
            return pickle.loads(out.read_bytes())
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    raise RuntimeError(
        f"The compiler's process ended with exit code {process.returncode}: {(lines or ['no message'])[-1]}"
    )
