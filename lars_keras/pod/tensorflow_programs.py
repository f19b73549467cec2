"""The programs of one replica's update of the TensorFlow engine, compiled for a chip of a topology."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import keras
import tensorflow as tf

from lars_keras import compiled
from lars_keras._jax_internals import compile_stablehlo
from lars_keras.pod.measure import Program, program
from lars_keras.training.engine import EngineOptions
from lars_keras.training.tensorflow.cluster import TensorFlowCluster
from lars_keras.training.tensorflow.engine import TensorFlowEngine

Tensor = Any


def tensorflow_programs(
    model: keras.Model,
    batch: Any,
    devices: Sequence[jax.Device],
    microbatch_size: int,
    accumulation_steps: int,
    *,
    variable_norms: bool = False,
) -> list[Program]:
    """Compile an update of one replica, and return its programs. TensorFlow's runtime has the all-reduce.

    Args:
        model: compiled.
        batch: `(x, y)` or `(x, y, sample_weight)` of `ArraySpec`s.
        devices: devices of the topology.
        microbatch_size: examples that a replica takes through the model at once.
        accumulation_steps: micro-batches of a replica in an update.
        variable_norms: as the engine takes it.

    Raises:
        jax.errors.JaxRuntimeError: of the compiler.
    """
    # It is traced on this machine's CPU, but for a TPU: no sum is written for a CPU's compiler.
    compiled.has_accelerator = lambda: True
    spec = keras.tree.map_structure(lambda a: tf.TensorSpec((None, *a.shape), a.dtype), batch)
    options = EngineOptions(microbatch_size, accumulation_steps, jit_compile=True, variable_norms=variable_norms)
    step = TensorFlowEngine(model, TensorFlowCluster(model.distribute_strategy), options, spec).step
    data = tf.nest.map_structure(lambda s: tf.TensorSpec((microbatch_size, *s.shape[1:]), s.dtype), spec)
    sums = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), step.zero_sums())

    def update(data: Any) -> Any:
        return step.finish(step.ghost_sums(data, tf.constant(0)))

    if accumulation_steps == 1:
        return [_compile("update", 1, update, (data,), devices[0])]
    arguments = (sums, data, tf.TensorSpec((), tf.int32))
    accumulate = _compile("accumulate", accumulation_steps, step.accumulate, arguments, devices[0])
    slots = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in model.optimizer.variables)
    return [
        dataclasses.replace(accumulate, resident=slots),
        _compile("finish", 1, step.finish, (sums,), devices[0]),
    ]


def _compile(name: str, times: int, function: Any, arguments: tuple[Any, ...], device: jax.Device) -> Program:
    def flat(*tensors: Tensor) -> Any:
        return function(*tf.nest.pack_sequence_as(arguments, list(tensors)))

    traced = tf.function(flat, jit_compile=True, autograph=False)
    text = traced.experimental_get_compiler_ir(*tf.nest.flatten(arguments))(stage="stablehlo")
    return program(name, times, compile_stablehlo(_without_copies(text), device))


def _without_copies(text: str) -> str:
    """Replace each `mhlo.copy`, TensorFlow's mark against the reuse of a buffer: the compiler for TPUs refuses it."""
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
