"""Answer a request of `lars_keras.pod.check`: make the model, compile its update, read the programs.

KERAS_BACKEND=jax python -m lars_keras.pod.worker REQUEST ANSWER
"""

import dataclasses
import math
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import keras
from jax.experimental import topologies

from lars_keras.pod.batch import parse_batch
from lars_keras.pod.chips import chip_of
from lars_keras.pod.driver import Request
from lars_keras.pod.measure import Program
from lars_keras.reference import Reference
from lars_keras.training.forward import StatelessForward
from lars_keras.training.trainer import Trainer, split_batch
from lars_keras.versions import versions

PACKAGES = ("jax", "jaxlib", "libtpu", "keras", "tensorflow", "tensorflow-cpu")  # have a part in a compiled program


class DoesNotFit(Exception):
    """The compiler found no room for a program."""


def devices_of(topology: str) -> list[jax.Device]:
    """Return the devices of a topology, for compiling only.

    Raises:
        ValueError: if the compiler does not know it.
    """
    # libtpu then asks for no TPU, on this machine or on the network, and shares the machine with others that compile.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    # The two cores of a v4 chip are one device of JAX; the compiler takes them apart unless told.
    together = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **together).devices)
    except Exception as e:  # what libtpu raises depends on what it dislikes
        raise ValueError(
            f"`topology` is not known to this TPU compiler: {_first_line(e)}. Received: topology={topology}"
        ) from e


def checked_model(make_model: Callable[[], keras.Model]) -> keras.Model:
    """Make the model.

    Raises:
        ValueError: if the result is not a compiled model, or `Trainer` refuses it.
        RuntimeError: if `make_model` fails.
    """
    if isinstance(make_model, Reference):
        make_model = make_model.resolve()
    try:
        model = make_model()
    except Exception as e:
        raise RuntimeError(f"`make_model` failed, with KERAS_BACKEND={keras.backend.backend()}: {_last_line(e)}") from e
    if not isinstance(model, keras.Model):
        raise ValueError(f"`make_model` must return a compiled Keras model. Received: a {type(model).__name__}")
    if not model.compiled:
        raise ValueError(
            "`make_model` must return a compiled Keras model: call `model.compile(optimizer, loss)` before you return "
            f"it. Received: {model.name}, not compiled"
        )
    Trainer(model, batch_size=1)
    return model


def answer(request: Request) -> dict[str, Any]:
    """Return the answer, or `{"error": message, "refused": True for the user's mistake, "traceback": text}`."""
    try:
        return _answer(request)
    except ValueError as e:
        return {"error": str(e), "refused": True, "traceback": traceback.format_exc()}
    except Exception as e:
        message = str(e) if isinstance(e, RuntimeError) else _last_line(e)
        return {"error": message, "refused": False, "traceback": traceback.format_exc()}


def _answer(request: Request) -> dict[str, Any]:
    devices = devices_of(request.topology)
    batch = parse_batch(request.batch_spec() if callable(request.batch_spec) else request.batch_spec)
    size, steps = split_batch(request.batch_size, len(devices), request.microbatch_size)
    model = checked_model(request.make_model)
    options: dict[str, Any] = {"variable_norms": request.variable_norms}
    programs_of: Callable[..., list[Program]]
    if keras.backend.backend() == "jax":
        from lars_keras.pod import jax_programs

        programs_of = jax_programs.jax_programs
        options |= {"shard_optimizer_state": request.shard_optimizer_state, "reduce_dtype": request.reduce_dtype}
    else:
        from lars_keras.pod import tensorflow_programs

        programs_of = tensorflow_programs.tensorflow_programs

    def compiled(size: int, steps: int) -> list[Program]:
        try:
            return programs_of(model, batch, devices, size, steps, **options)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" in str(e) or "Ran out of memory" in str(e):
                raise DoesNotFit(_first_line(e)) from None
            raise RuntimeError(f"The TPU compiler refused the step: {_first_line(e)}") from e

    started = time.perf_counter()
    reason, programs, smaller, fitting = None, [], None, None
    try:
        programs = compiled(size, steps)
    except DoesNotFit as e:
        reason = str(e)
        if request.search:
            capacity = chip_of(request.topology).bytes_per_device(len(devices) // _chips(devices))
            fitting = _largest_that_fits(compiled, size, steps, capacity)
    seconds = time.perf_counter() - started
    second = next((m for m in (size // 2, size // 3) if m and size % m == 0), None)
    if programs and second and request.search:
        smaller = {"microbatch_size": second, "memory": max(p.memory for p in compiled(second, steps))}
    return describe(
        model,
        request.topology,
        devices,
        microbatch_size=size,
        accumulation_steps=steps,
        programs=programs,
        compile_seconds=seconds,
        reason=reason,
        smaller=smaller,
        fitting_microbatch_size=fitting,
    )


def describe(
    model: keras.Model,
    topology: str,
    devices: Sequence[jax.Device],
    *,
    microbatch_size: int,
    accumulation_steps: int,
    programs: Sequence[Program],
    compile_seconds: float,
    reason: str | None = None,
    smaller: dict[str, int] | None = None,
    fitting_microbatch_size: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of `lars_keras.pod.report.make_report`.

    Args:
        model: compiled and built.
        topology: name of the topology.
        devices: devices of the topology.
        microbatch_size: examples that a device takes through the model at once.
        accumulation_steps: micro-batches of a device in an update.
        programs: programs of an update; none if they do not fit.
        compile_seconds: seconds that they took.
        reason: the compiler's refusal.
        smaller: `microbatch_size` and `memory` of the second size that was compiled.
        fitting_microbatch_size: a size that fits, if the requested one does not compile.
    """
    notes = []
    if model.compute_dtype == "float32":
        notes.append(
            "The model computes in float32, but the compute bound assumes bfloat16: set the dtype policy "
            '"mixed_bfloat16" in `make_model`.'
        )
    forward = StatelessForward(model, compiled=True)
    return {
        "model": model.name,
        "parameters": sum(math.prod(v.shape) for v in model.trainable_variables),
        "compute_dtype": model.compute_dtype,
        "backend": keras.backend.backend(),
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "chips": _chips(devices),
        "devices": len(devices),
        "microbatch_size": microbatch_size,
        "accumulation_steps": accumulation_steps,
        "reason": reason,
        "programs": [dataclasses.asdict(p) for p in programs],
        "smaller": smaller,
        "fitting_microbatch_size": fitting_microbatch_size,
        "reduced_bytes": 4 * sum(math.prod(v.shape) for v in (*forward.trainable, *forward.averaged)),
        "notes": notes,
        "compile_seconds": round(compile_seconds, 1),
        "versions": versions(PACKAGES),
    }


def _chips(devices: Sequence[jax.Device]) -> int:
    return len({tuple(d.coords) for d in devices})


def _largest_that_fits(
    compiled: Callable[[int, int], list[Program]], size: int, steps: int, capacity: int
) -> int | None:
    """Return the first smaller size whose programs fit, with what the device holds beside each of them.

    Each size divides the device's part, and is at most half the last.
    """
    local_batch = size * steps
    while size := max((m for m in range(1, size // 2 + 1) if local_batch % m == 0), default=0):
        try:
            programs = compiled(size, local_batch // size)
        except DoesNotFit:
            continue
        if max(p.memory for p in programs) <= capacity:
            return size
    return None


def _first_line(e: Exception) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def _last_line(e: Exception) -> str:
    return traceback.format_exception_only(e)[-1].strip()


def main(arguments: list[str]) -> int:
    """Read the request, write the answer."""
    request, out = map(Path, arguments)
    try:
        asked = pickle.loads(request.read_bytes())
    except Exception as e:  # importing the user's module runs the user's code
        message = f"The module of `make_model` or `batch_spec` cannot be imported: {_last_line(e)}"
        result: dict[str, Any] = {"error": message, "refused": False, "traceback": traceback.format_exc()}
    else:
        result = answer(asked)
    out.write_bytes(pickle.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
