"""The programs of train.py's update, compiled for the chips of a topology; run in a process for each Keras backend.

KERAS_BACKEND=jax python -m lars_keras.pod.programs REQUEST.json ANSWER.json
"""

import dataclasses
import json
import math
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

# libtpu then asks for no TPU, on this machine or on the network, and shares the machine with others that compile.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu"
)

import jax
import keras
import numpy as np
import tensorflow as tf
from jax.experimental import topologies

import flags
import models
import train
from lars_keras._jax_internals import compile_stablehlo
from lars_keras.pod.measure import Program, program
from lars_keras.runtime.errors import UsageError
from lars_keras.training.forward import build_model
from lars_keras.training.trainer import split_batch
from lars_keras.versions import versions

Tensor = Any

PACKAGES = ("jax", "jaxlib", "libtpu", "keras", "tensorflow", "tensorflow-cpu")  # have a part in a compiled program

# Classes, training examples, and shape, as `lars_keras.data.load` gives them: no data are needed here.
_DATA = {"digits": (10, 49152, (16, 16, 1)), "cifar10": (10, 50000, (32, 32, 3)), "imagenet2012": (1000, 1281167, None)}


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a topology, for compiling only.

    Raises:
        UsageError: if the compiler does not know it.
    """
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:  # what libtpu raises depends on what it dislikes
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UsageError(f"--topology={topology} is not known to this TPU compiler: {reason}") from e


def model_of(config: flags.RunConfig) -> tuple[keras.Model, Any, Any]:
    """train.py's model, compiled and built; the data set's figures; the shapes of its examples."""
    if config.dataset not in _DATA:
        raise UsageError(f"--dataset must be one of {', '.join(_DATA)} here. Received: --dataset={config.dataset}")
    classes, examples, shape = _DATA[config.dataset]
    if shape is None:
        size = config.image_size or models.default_image_size(config.model)
        shape = (size, size, 3)
    zeros, ones = [0.0] * shape[2], [1.0] * shape[2]
    data: Any = types.SimpleNamespace(num_classes=classes, num_train=examples, image_shape=shape, mean=zeros, std=ones)
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    model = train.make_model(config, data)
    train.compile_model(model, config, data)
    spec = (
        tf.TensorSpec((None, *shape), tf.uint8),
        tf.TensorSpec((None, classes), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    build_model(model, spec)
    return model, data, spec


def jax_programs(
    config: flags.RunConfig,
    devices: list[jax.Device],
    microbatch_size: int,
    k: int,
    known_pass: Program | None = None,
) -> list[Program]:
    """The programs of an update on JAX, on one of the devices.

    A pass has no traffic between the devices (unless batch normalisation is synchronised), so it is the same on any
    number of them: `known_pass` saves compiling it again.
    """
    from lars_keras.training.jax.mesh import mesh_of
    from lars_keras.training.jax.step import JaxStep

    model, _, spec = model_of(config)
    options: dict[str, Any] = {
        "shard_optimizer_state": config.shard_optimizer_state,
        "reduce_dtype": config.reduce_dtype,
    }
    step = JaxStep(model, mesh_of(devices), accumulation_steps=k, layer_norms=True, **options)

    def shaped(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)

    def placed(tree: Any, sharding: Any) -> Any:
        return shaped(tree, jax.tree.map(lambda _: sharding, tree))

    state = {group: shaped(variables, step.state_shardings[group]) for group, variables in step.variables.items()}
    rows = len(devices) * microbatch_size
    batch = placed(
        tuple(jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype.as_numpy_dtype) for s in spec), step.batch_sharding
    )
    ahead = _bytes_of(batch)  # the next batch comes while this one is used
    if k == 1:
        update = program("update", 1, step.single_update.lower(state, batch).compile())
        return [dataclasses.replace(update, beside=ahead)]
    weights, scale, sums = jax.eval_shape(step.begin, state)
    sums, (weights, scale) = placed(sums, step.sums_sharding), placed((weights, scale), step.replicated)
    kept = _bytes_of(state["optimizer"]) + (_bytes_of(state["trainable"]) if weights else 0)
    a_pass = known_pass
    if a_pass is None:
        inputs = (state["batch_stats"], state["rng_state"], scale, batch, jax.ShapeDtypeStruct((), np.int32))
        a_pass = program("pass", k, step.accumulate.lower(sums, weights or state["trainable"], *inputs).compile())
    return [
        program("begin", 1, step.begin.lower(state).compile()),
        dataclasses.replace(a_pass, times=k, beside=kept + ahead),
        program("finish", 1, step.finish.lower(state, sums, state["rng_state"]).compile()),
    ]


def tensorflow_programs(
    config: flags.RunConfig, devices: list[jax.Device], microbatch_size: int, k: int
) -> list[Program]:
    """The programs of one replica's update on TensorFlow; its all-reduce is not in them: the runtime has it."""
    from lars_keras import compiled
    from lars_keras.training.tensorflow.engine import TensorFlowEngine

    # It is traced on this machine's CPU, but for a TPU: the sums that are written for a CPU's compiler are not its.
    compiled.has_accelerator = lambda: True
    model, _, spec = model_of(config)
    engine = TensorFlowEngine(model, spec, accumulation_steps=k, jit_compile=True, layer_norms=True)
    examples = tuple(tf.TensorSpec((microbatch_size, *s.shape[1:]), s.dtype) for s in spec)
    nothing = engine._no_sums()
    sums = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), nothing)

    def update(x: Tensor, y: Tensor, weight: Tensor) -> Any:
        return engine._reduce_and_apply(*engine._ghost_sums((x, y, weight), tf.constant(0)))

    def a_pass(sums: Any, x: Tensor, y: Tensor, weight: Tensor, i: Tensor) -> Any:
        return engine._add_ghost_batch(sums, (x, y, weight), i)

    def finish(sums: Any) -> Any:
        return engine._reduce_and_apply(*sums)

    if k == 1:
        return [_tensorflow_program("update", 1, update, examples, devices)]
    a_program = _tensorflow_program("pass", k, a_pass, (sums, *examples, tf.TensorSpec((), tf.int32)), devices)
    slots = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in model.optimizer.variables)
    return [
        dataclasses.replace(a_program, beside=slots),
        _tensorflow_program("finish", 1, finish, (sums,), devices),
    ]


def _tensorflow_program(
    name: str, times: int, function: Any, arguments: tuple[Any, ...], devices: list[jax.Device]
) -> Program:
    compiled = tf.function(function, jit_compile=True, autograph=False)
    text = compiled.experimental_get_compiler_ir(*arguments)(stage="stablehlo")
    return program(name, times, compile_stablehlo(_without_copies(text), devices[0]))


def _without_copies(text: str) -> str:
    """Each `mhlo.copy` of a StableHLO text as the identity."""
    lines = []
    for line in text.splitlines():
        if "mhlo.copy" in line:
            target, _, rest = line.partition(" = ")
            operand = rest.partition("mhlo.copy")[2].strip().strip('"()').split()[0].rstrip(")")
            kind = rest.rpartition(" : ")[2].partition(" loc(")[0].strip()
            kind = kind.partition("->")[2].strip() or kind
            line = f"{target} = stablehlo.optimization_barrier {operand} : {kind}"
        lines.append(line)
    return "\n".join(lines)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what the request asks for, and as much again at a smaller micro-batch, to see what grows with it."""
    fields = request["flags"]
    fields["exclude"] = None if fields["exclude"] is None else tuple(fields["exclude"])
    config = flags.RunConfig(**fields)
    devices = devices_of(request["topology"])
    microbatch_size, k = split_batch(config.batch_size, len(devices), config.microbatch_size)
    compiled_programs = jax_programs if keras.backend.backend() == "jax" else tensorflow_programs
    started = time.perf_counter()
    programs = compiled_programs(config, devices, microbatch_size, k)
    seconds = time.perf_counter() - started
    smaller = next((m for m in (microbatch_size // 2, microbatch_size // 3) if m and microbatch_size % m == 0), None)
    small: list[Program] = []
    if smaller and request["search"]:
        small = compiled_programs(config, devices, smaller, k)
    model, data, _ = model_of(config)
    chips = len({tuple(d.coords) for d in devices})
    return {
        "engine": keras.backend.backend(),
        "devices": len(devices),
        "chips": chips,
        "device_kind": devices[0].device_kind,
        "microbatch_size": microbatch_size,
        "accumulation_steps": k,
        "updates": config.total_updates(data.num_train),
        "reduced_bytes": 4 * sum(math.prod(v.shape) for v in (*model.trainable_variables, *_averaged(model))),
        "programs": [dataclasses.asdict(p) for p in programs],
        "smaller": {"microbatch_size": smaller, "memory": max(p.memory for p in small)} if small else None,
        "compile_seconds": round(seconds, 1),
        "versions": versions(PACKAGES),
    }


def _bytes_of(arrays: Any) -> int:
    """Bytes of arrays, or of what describes them, on one device."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def _averaged(model: keras.Model) -> list[keras.Variable]:
    return [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]


def main(arguments: list[str]) -> int:
    request, out = arguments
    try:
        result = answer(json.loads(Path(request).read_text()))
    except Exception as e:  # of the compiler: its first line is what a person needs
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        result = {"error": lines[0], "out_of_memory": "RESOURCE_EXHAUSTED" in str(e) or "Ran out of memory" in str(e)}
        if not isinstance(e, (ValueError, jax.errors.JaxRuntimeError)):
            raise
    Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
