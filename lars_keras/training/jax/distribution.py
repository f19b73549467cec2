"""Data parallelism on JAX: the devices of a run, as a `keras.distribution.Distribution`, and the processes it has."""

import json
import os
from typing import Any

import jax
import keras
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils

from lars_keras.runtime.errors import UsageError
from lars_keras.training.cluster import workers_of_cluster
from lars_keras.training.jax.mesh import mesh_of, shard_sharding, torus_order


class ShardedDataParallel(keras.distribution.DataParallel):
    """Data parallelism in which each device keeps and updates its share of the weights and of the optimizer's slots."""

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        return shard_sharding(variable.shape, mesh_of(self.device_mesh.backend_mesh.devices.flat))


def make_distribution(
    name: str = "auto", *, replicas: int | None = None, shard_optimizer_state: bool = False
) -> keras.distribution.DataParallel:
    """The data parallelism called `name`, made the current one. Call it before anything touches JAX's devices.

    Args:
        name: `"single"`: the first device. `"mirrored"`: all devices of this process, or the first `replicas` of them;
            where there is only a CPU, `replicas` logical CPU devices. `"multi_worker"`: all devices of the processes
            that the environment variable TF_CONFIG lists, or, without it, of those that `jax.distributed` finds (a TPU
            pod slice, Slurm, Open MPI). `"tpu"`: all TPU chips of this machine. `"auto"`: multi_worker (if TF_CONFIG
            lists several workers), mirrored (several devices, or `replicas`), one.
        replicas: number of replicas of `"mirrored"`.
        shard_optimizer_state: keep weights and slots in shares.

    Raises:
        UsageError: if the devices asked for are not there.
    """
    # TensorFlow makes the batches, on the CPU; it would take the accelerator's memory.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    workers = workers_of_cluster()
    if name == "multi_worker" or (name == "auto" and len(workers) > 1):
        _join(workers)
        devices = jax.devices()
    else:
        devices = _local_devices(name, replicas)
    mesh = keras.distribution.DeviceMesh((len(devices),), ["batch"], np.array(torus_order(devices)))
    distribution = (ShardedDataParallel if shard_optimizer_state else keras.distribution.DataParallel)(
        device_mesh=mesh, auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)
    return distribution


def on_any_process(mine: bool) -> bool:
    """Whether a thing is so in any process; all of them must ask."""
    if jax.process_count() == 1:
        return mine
    return bool(np.any(multihost_utils.process_allgather(np.array(mine))))


def same_in_all_processes(mine: int) -> bool:
    """Whether all processes have the same number; all of them must ask."""
    if jax.process_count() == 1:
        return True
    return bool(np.all(multihost_utils.process_allgather(np.array(mine)) == mine))


def _local_devices(name: str, replicas: int | None) -> list[jax.Device]:
    if replicas and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        _make_logical_cpus(replicas)
    try:
        devices = jax.local_devices()
    except RuntimeError as e:
        raise UsageError(f"JAX finds no device: {str(e).splitlines()[0]}") from e
    kind = devices[0].platform
    if name == "tpu" and kind != "tpu":
        raise UsageError(f"--strategy=tpu found no TPU on this machine: JAX has {len(devices)} {kind} device(s).")
    if name == "single" or (name == "auto" and replicas is None and len(devices) == 1):
        return devices[:1]
    if name == "mirrored" and replicas is None and len(devices) == 1:
        raise UsageError(
            f"--strategy=mirrored found one {kind} device. Use --strategy=single, or --replicas=N to try it with N "
            "logical CPU devices."
        )
    if replicas and replicas > len(devices):
        raise UsageError(f"--replicas={replicas} asks for more devices than the {len(devices)} {kind} device(s) found.")
    return devices[:replicas]


def _make_logical_cpus(count: int) -> None:
    """Has no effect where there is an accelerator, and none on a count that XLA_FLAGS gives."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun: the devices are what they are
        return


def _join(workers: list[str]) -> None:
    """Makes this process one of a cluster's."""
    if jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] = {}
    if workers:
        task = json.loads(os.environ["TF_CONFIG"]).get("task", {})
        chiefs = len(json.loads(os.environ["TF_CONFIG"])["cluster"].get("chief", []))
        index = int(task.get("index", 0)) + (chiefs if task.get("type") == "worker" else 0)
        arguments = {"coordinator_address": workers[0], "num_processes": len(workers), "process_id": index}
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as e:
        raise UsageError(
            "--strategy=multi_worker needs the environment variable TF_CONFIG with the cluster's workers and this "
            f"task's type and index, or a cluster that JAX knows: {str(e).splitlines()[0]}"
        ) from e
