"""The cluster of a `keras.distribution.DataParallel` on JAX."""

import contextlib
import os
import re
import sys
from contextlib import AbstractContextManager
from typing import Any

import jax
import keras
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lars_keras.training import tf_config
from lars_keras.training.inputs import InputContext
from lars_keras.training.jax.mesh import mesh_of, torus_order
from lars_keras.training.jax.sharding import shard_sharding


class ShardedDataParallel(keras.distribution.DataParallel):
    """Data parallelism in which each device keeps and updates its shard of the weights and optimizer slots."""

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        return shard_sharding(variable.shape, mesh_of(self.device_mesh.backend_mesh.devices.flat))


class JaxCluster:
    """The devices and processes of a distribution; see `lars_keras.training.cluster.Cluster`.

    Args:
        distribution: a `keras.distribution.DataParallel`, or None for the first device of this process.

    Raises:
        ValueError: for another kind of distribution.

    Attributes:
        distribution: as passed.
        mesh: its devices, with an axis for each direction of a TPU's torus.
        shard_optimizer_state: True if each device keeps and updates its shard of the weights and optimizer slots.
    """

    def __init__(self, distribution: Any):
        if not isinstance(distribution, keras.distribution.DataParallel | None):
            raise ValueError(
                f"The distribution must be a keras.distribution.DataParallel. Received: {type(distribution).__name__}"
            )
        self.distribution = distribution
        self.mesh = mesh_of(
            distribution.device_mesh.backend_mesh.devices.flat if distribution else jax.local_devices()[:1]
        )
        self._processes = sorted({device.process_index for device in self.mesh.devices.flat})
        self.shard_optimizer_state = isinstance(distribution, ShardedDataParallel)
        self.replicas = self.mesh.devices.size
        self.hosts = jax.process_count()
        self.is_chief = jax.process_index() == 0
        self.remote_input = False
        self.description = type(distribution).__name__ if distribution else "one device"

    def scope(self) -> AbstractContextManager[Any]:
        """Return the context in which models and variables are made."""
        return self.distribution.scope() if self.distribution else contextlib.nullcontext()

    def check(self) -> None:
        """Warn if a training would leave out devices of this process.

        Raises:
            ValueError: if it would leave out a process of the run.
        """
        if self._processes != list(range(jax.process_count())):
            raise ValueError(
                "The distribution must have devices of every process, or each would train a model of its own: call "
                "`keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))` "
                f"before the model is made. Received: {jax.process_count()} processes, and "
                + (f"a distribution over numbers {self._processes}" if self.distribution else "no distribution")
            )
        if not self.distribution and jax.local_device_count() > 1:
            logging.log_first_n(
                logging.WARNING,
                "`Trainer` uses one of %d devices. Call `keras.distribution.set_distribution("
                "keras.distribution.DataParallel())` before the model is made to use all.",
                1,
                jax.local_device_count(),
            )

    def input_context(self) -> InputContext:
        """Return the place of this process among the readers of the input."""
        return InputContext(len(self._processes), self._processes.index(jax.process_index()), self.replicas)

    def any_across_hosts(self, *flags: bool) -> list[bool]:
        """Return the logical OR of each flag over the hosts, by one message. Collective: call it on every host."""
        if self.hosts == 1:
            return list(flags)
        return np.any(multihost_utils.process_allgather(np.array(flags)), axis=0).tolist()

    def same_on_all_hosts(self, number: int) -> bool:
        """Return True if every host has the same number. Collective: call it on every host."""
        if self.hosts == 1:
            return True
        return bool(np.all(multihost_utils.process_allgather(np.array(number)) == number))

    @staticmethod
    def is_host_lost(error: Exception) -> bool:
        """Return True if `error` comes from the loss of another process of the run."""
        # JAX has no type for it, and raises ValueError where an array is fetched. Gloo joins the CPUs of processes.
        if not re.search(r"\b(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b|Gloo \S+ failed", str(error)):
            return False
        try:  # at last, because it starts the devices
            return len(tf_config.workers()) > 1 or jax.process_count() > 1
        except RuntimeError:  # there is no device
            return False


def make_jax_cluster(name: str, replicas: int | None, tpu: str | None, shard_optimizer_state: bool) -> JaxCluster:
    """Make the cluster called `name`; see `lars_keras.training.cluster.make_cluster`."""
    if tpu not in (None, "local"):
        raise ValueError(
            'On JAX each host of a TPU slice runs this program itself, with `strategy="multi_worker"`. '
            f"Received: tpu={tpu}"
        )
    if tpu and name == "auto":
        name = "tpu"
    _keep_tensorflow_off_accelerators()
    workers = tf_config.workers()
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
    return JaxCluster(distribution)


def _keep_tensorflow_off_accelerators() -> None:
    """Hide accelerators from TensorFlow, if it is loaded. It makes batches on the CPU, but would take their memory."""
    tf: Any = sys.modules.get("tensorflow")
    for kind in ("GPU", "TPU") if tf else ():
        tf.config.set_visible_devices([], kind)


def _local_devices(name: str, replicas: int | None) -> list[jax.Device]:
    if replicas and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        _make_logical_cpus(replicas)
    try:
        devices = jax.local_devices()
    except RuntimeError as e:
        raise ValueError(f"JAX finds no device: {str(e).splitlines()[0]}") from e
    kind = devices[0].platform
    if name == "tpu" and kind != "tpu":
        raise ValueError(f'`strategy="tpu"` found no TPU on this machine: JAX has {len(devices)} {kind} device(s).')
    if name == "single" or (name == "auto" and replicas is None and len(devices) == 1):
        return devices[:1]
    if name == "mirrored" and replicas is None and len(devices) == 1:
        raise ValueError(
            f'`strategy="mirrored"` found one {kind} device. Use `strategy="single"`, or give `replicas` to try it '
            "with as many logical CPU devices."
        )
    if replicas and replicas > len(devices):
        raise ValueError(
            f"`replicas` must be at most the {len(devices)} {kind} device(s) found. Received: replicas={replicas}"
        )
    return devices[:replicas]


def _make_logical_cpus(count: int) -> None:
    """Ask JAX for `count` CPU devices. An accelerator, and a count in XLA_FLAGS, take precedence."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun: the devices are what they are
        return


def _join(workers: list[str]) -> None:
    """Make this process one of the processes of a run."""
    if jax.distributed.is_initialized():
        return
    try:
        if workers:
            keras.distribution.initialize(workers[0], len(workers), tf_config.index())
        else:  # asks the variables KERAS_DISTRIBUTION_*, then the machine
            keras.distribution.initialize()
    except (RuntimeError, ValueError) as e:
        message = tf_config.unset_message(", or KERAS_DISTRIBUTION_*, or processes that JAX finds")
        raise ValueError(f"{message} Received: {str(e).splitlines()[0]}") from e
