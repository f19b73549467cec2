"""The programs of an update of the JAX engine, compiled for the chips of a topology."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import keras
import numpy as np

from lars_keras.pod.measure import Program, program
from lars_keras.training.engine import EngineOptions
from lars_keras.training.forward import build_model
from lars_keras.training.inputs import TensorSpec
from lars_keras.training.jax.mesh import mesh_of
from lars_keras.training.jax.step import JaxStep


def jax_programs(
    model: keras.Model,
    batch: Any,
    devices: Sequence[jax.Device],
    microbatch_size: int,
    accumulation_steps: int,
    *,
    shard_optimizer_state: bool = False,
    reduce_dtype: str = "float32",
    variable_norms: bool = False,
    known_accumulate: Program | None = None,
) -> list[Program]:
    """Compile an update, and return its programs on one of the devices.

    Args:
        model: compiled.
        batch: `(x, y)` or `(x, y, sample_weight)` of `ArraySpec`s.
        devices: devices of the topology.
        microbatch_size: examples that a device takes through the model at once.
        accumulation_steps: micro-batches of a device in an update.
        shard_optimizer_state: as `JaxStep` takes it.
        reduce_dtype: see `EngineOptions`.
        variable_norms: see `EngineOptions`.
        known_accumulate: the program of a micro-batch, from a slice of another size. It has no traffic between the
            devices (unless batch normalization is synchronized), so it is the same on any number of them.

    Raises:
        ValueError: if the loss depends on no trainable variable.
        jax.errors.JaxRuntimeError: of the compiler.
    """
    spec = keras.tree.map_structure(lambda a: TensorSpec((None, *a.shape), a.dtype), batch)
    terms = build_model(model, spec, microbatch_size)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    options = EngineOptions(
        microbatch_size, accumulation_steps, reduce_dtype=reduce_dtype, variable_norms=variable_norms
    )
    step = JaxStep(model, mesh_of(devices), options, shard_optimizer_state, terms.masked)
    step.find_unreached(spec, microbatch_size)

    def shaped(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)

    def placed(tree: Any, sharding: Any) -> Any:
        return shaped(tree, jax.tree.map(lambda _: sharding, tree))

    state = {group: shaped(variables, step.state_shardings[group]) for group, variables in step.variables.items()}
    rows = len(devices) * microbatch_size
    arrays = keras.tree.map_structure(lambda a: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype), batch)
    arrays = placed(arrays, step.batch_sharding)
    ahead = _bytes_of(arrays)  # the next batch arrives while this one is used
    if accumulation_steps == 1:
        update = program("update", 1, step.single_update.lower(state, arrays).compile())
        return [dataclasses.replace(update, resident=ahead)]
    weights, sums = jax.eval_shape(step.begin, state)
    sums, weights = placed(sums, step.sums_sharding), placed(weights, step.replicated)
    kept = _bytes_of(state["optimizer"]) + (_bytes_of(state["trainable"]) if weights else 0)
    accumulate = known_accumulate
    if accumulate is None:
        read = (weights or state["trainable"], state["batch_stats"], state["rng_state"], step.scalars_of(state))
        lowered = step.accumulate.lower(sums, *read, arrays, jax.ShapeDtypeStruct((), np.int32))
        accumulate = program("accumulate", accumulation_steps, lowered.compile())
    return [
        program("begin", 1, step.begin.lower(state).compile()),
        dataclasses.replace(accumulate, times=accumulation_steps, resident=kept + ahead),
        program("finish", 1, step.finish.lower(state, sums, state["rng_state"]).compile()),
    ]


def _bytes_of(arrays: Any) -> int:
    """Return the bytes of described arrays on one device."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
