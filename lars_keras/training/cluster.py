"""The devices and processes of a run, behind one interface for both backends."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras

from lars_keras.training import tf_config

STRATEGIES = ("auto", "single", "mirrored", "multi_worker", "tpu")


class Cluster(Protocol):
    """The replicas of a run, and the processes that drive them, one on each host.

    Attributes:
        replicas: number of devices that train in parallel.
        hosts: number of processes of the run. A TPU slice that one process drives over the network counts once.
        is_chief: True in the one process that prints and writes.
        remote_input: True if another host, which does not run this program, reads the input: a remote TPU slice.
        description: name of the cluster in the plan.
    """

    replicas: int
    hosts: int
    is_chief: bool
    remote_input: bool
    description: str

    def scope(self) -> AbstractContextManager[Any]:
        """Return the context in which models and variables are made."""

    def input_context(self) -> Any:
        """Return the place of this process among the readers of the input, to be passed to functions of data.

        It is an `InputContext`, or on TensorFlow a `tf.distribute.InputContext`. For a TPU slice it is the context of
        the first host.
        """

    def any_across_hosts(self, *flags: bool) -> list[bool]:
        """Return the logical OR of each flag over the hosts, by one message. Collective: call it on every host."""

    def same_on_all_hosts(self, number: int) -> bool:
        """Return True if every host has the same number. Collective: call it on every host."""

    def is_host_lost(self, error: Exception) -> bool:
        """Return True if `error` comes from the loss of another process of the run."""


def make_cluster(
    strategy: str = "auto", *, replicas: int | None = None, tpu: str | None = None, shard_optimizer_state: bool = False
) -> Cluster:
    """Make the cluster of a run. Call it before anything else touches the devices.

    Args:
        strategy: one of `STRATEGIES`.
            `"single"`: one GPU, or else the CPU; on JAX the first device.
            `"mirrored"`: all GPUs (on JAX all devices) of this machine, or the first `replicas` of them. Without an
            accelerator: `replicas` logical CPU devices, to try it anywhere.
            `"multi_worker"`: the processes that the environment variable TF_CONFIG lists. On JAX all their devices.
            On JAX without TF_CONFIG, the processes that `keras.distribution.initialize()` joins: those that the
            variables KERAS_DISTRIBUTION_* name, or those that JAX finds (a TPU slice, Slurm, Open MPI).
            `"tpu"`: the TPU slice `tpu`; on JAX the TPU chips of this machine.
            `"auto"`: the first that applies of tpu (if `tpu` is given), multi_worker (if TF_CONFIG lists several
            workers), mirrored (if there are several devices, or `replicas` is given), single.
        replicas: number of replicas of `"mirrored"`.
        tpu: name or address of a TPU; `"local"` on a TPU VM.
        shard_optimizer_state: JAX only: each device keeps and updates its shard of the weights and optimizer slots.

    Returns:
        The cluster. On JAX its distribution is now the current `keras.distribution`.

    Raises:
        ValueError: if an argument has no meaning on this backend, or the devices it asks for are not there.
    """
    backend = keras.backend.backend()
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}. Received: strategy={strategy!r}")
    if strategy == "auto" and replicas and len(tf_config.workers()) > 1:
        raise ValueError(
            'TF_CONFIG lists several workers, and `replicas` needs `strategy="mirrored"`. '
            f"Received: replicas={replicas}"
        )
    if backend == "jax":
        from lars_keras.training.jax.cluster import make_jax_cluster

        return make_jax_cluster(strategy, replicas, tpu, shard_optimizer_state)
    if backend == "tensorflow":
        from lars_keras.training.tensorflow.cluster import make_tensorflow_cluster

        return make_tensorflow_cluster(strategy, replicas, tpu, shard_optimizer_state)
    raise unknown_backend(backend)


def cluster_of(model: keras.Model) -> Cluster:
    """Return the cluster of the strategy under which a model was made; on JAX, of the current distribution.

    Raises:
        ValueError: for a distribution that is not data parallel, and on any other backend.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        from lars_keras.training.jax.cluster import JaxCluster

        return JaxCluster(keras.distribution.distribution())
    if backend == "tensorflow":
        from lars_keras.training.tensorflow.cluster import TensorFlowCluster

        return TensorFlowCluster(model.distribute_strategy)
    raise unknown_backend(backend)


def is_host_lost(error: Exception) -> bool:
    """Return `Cluster.is_host_lost`, even if no cluster could be made."""
    if keras.backend.backend() == "jax":
        from lars_keras.training.jax.cluster import JaxCluster

        return JaxCluster.is_host_lost(error)
    from lars_keras.training.tensorflow.cluster import TensorFlowCluster

    return TensorFlowCluster.is_host_lost(error)


def has_peers() -> bool:
    """Return True if this process has joined others on JAX. They then wait for it at an ordinary exit."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    # A process that has not joined asks for no devices. One that has joined has them, unless asking for them failed.
    try:
        return jax.distributed.is_initialized() and jax.process_count() > 1
    except RuntimeError:
        return True


def unknown_backend(backend: str) -> ValueError:
    """Return the error for a backend on which nothing trains."""
    return ValueError(f"Training runs with KERAS_BACKEND=tensorflow or jax. Received: KERAS_BACKEND={backend}")
