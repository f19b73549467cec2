"""The cluster of a `tf.distribute` strategy."""

import socket
import urllib.parse
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from lars_keras.training import tf_config
from lars_keras.training.tensorflow.inputs import input_context


class TensorFlowCluster:
    """The replicas and processes of a `tf.distribute` strategy; see `lars_keras.training.cluster.Cluster`.

    Args:
        strategy: any strategy with synchronous replicas.

    Attributes:
        strategy: as passed.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        self.hosts, self.is_chief = 1, True
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.cluster_resolver is not None:
            resolver = strategy.cluster_resolver
            tasks = resolver.cluster_spec().as_dict()
            self.hosts = sum(len(tasks.get(kind, [])) for kind in ("chief", "worker"))
            self.is_chief = resolver.task_type == "chief" if "chief" in tasks else resolver.task_id == 0
        self.remote_input = isinstance(strategy, tf.distribute.TPUStrategy) and any(
            "localhost" not in device for device in strategy.extended.worker_devices
        )
        self.description = type(strategy).__name__

    def scope(self) -> AbstractContextManager[Any]:
        """Return the context in which models and variables are made."""
        return self.strategy.scope()

    def input_context(self) -> tf.distribute.InputContext:
        """Return the place of this process among the readers of the input."""
        return input_context(self.strategy)

    def any_across_hosts(self, *flags: bool) -> list[bool]:
        """Return the logical OR of each flag over the hosts, by one message. Collective: call it on every host."""
        if not self._votes():
            return list(flags)
        votes = self.strategy.run(lambda: tf.constant(flags, tf.float32))
        return (self.strategy.reduce(tf.distribute.ReduceOp.SUM, votes, axis=None).numpy() > 0).tolist()

    def same_on_all_hosts(self, number: int) -> bool:
        """Return True if every host has the same number. Collective: call it on every host."""
        if not self._votes():
            return True
        numbers = self.strategy.run(lambda: tf.constant(number, tf.int64))
        total = self.strategy.reduce(tf.distribute.ReduceOp.SUM, numbers, axis=None)
        return not any(self.any_across_hosts(int(total) != number * self.replicas))

    def _votes(self) -> bool:
        return isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy)

    @staticmethod
    def is_host_lost(error: Exception) -> bool:
        """Return True if `error` comes from the loss of another process of the run."""
        lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
        return isinstance(error, lost) and len(tf_config.workers()) > 1


def make_tensorflow_cluster(
    name: str, replicas: int | None, tpu: str | None, shard_optimizer_state: bool
) -> TensorFlowCluster:
    """Make the cluster called `name`; see `lars_keras.training.cluster.make_cluster`."""
    if shard_optimizer_state:
        raise ValueError(
            "`shard_optimizer_state` needs the JAX engine: set KERAS_BACKEND=jax. Received: KERAS_BACKEND=tensorflow"
        )
    gpus = tf.config.list_physical_devices("GPU")
    if name == "auto":
        name = _choose(len(gpus), replicas, tpu)
    if name == "tpu":
        return TensorFlowCluster(_tpu(tpu))
    if name == "multi_worker":
        return TensorFlowCluster(_multi_worker())
    if name == "mirrored":
        return TensorFlowCluster(_mirrored(gpus, replicas))
    return TensorFlowCluster(tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0"))


def _choose(gpus: int, replicas: int | None, tpu: str | None) -> str:
    if tpu:
        return "tpu"
    if len(tf_config.workers()) > 1:
        return "multi_worker"
    return "mirrored" if (replicas or gpus) > 1 else "single"


def _mirrored(gpus: list[Any], replicas: int | None) -> tf.distribute.Strategy:
    if not gpus:
        if replicas is None:
            raise ValueError(
                '`strategy="mirrored"` found no GPU. Use `strategy="single"`, or give `replicas` to try it with as '
                "many logical CPU devices."
            )
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        # Logical devices share memory: one addition on one of them is the shortest way.
        return tf.distribute.MirroredStrategy(
            [f"/cpu:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    if replicas is not None and replicas > len(gpus):
        raise ValueError(f"`replicas` must be at most the {len(gpus)} GPUs found. Received: replicas={replicas}")
    return tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(replicas or len(gpus))])


def _multi_worker() -> tf.distribute.Strategy:
    if not tf_config.workers():
        raise ValueError(f"{tf_config.unset_message()} Received: TF_CONFIG unset")
    return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu(tpu: str | None) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu or "local")
        _probe(resolver.master())
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].split(": No OpKernel")[0]
        raise ValueError(f'`strategy="tpu"` found no TPU: {reason}. Received: tpu={tpu or "local"}') from e
    return tf.distribute.TPUStrategy(resolver)


def _probe(master: str) -> None:
    """Raise OSError if nothing listens at an address: TensorFlow itself would wait forever."""
    address = urllib.parse.urlsplit(master)
    if address.hostname and address.port:
        socket.create_connection((address.hostname, address.port), timeout=30).close()
