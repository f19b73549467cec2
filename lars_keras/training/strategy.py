"""`tf.distribute` strategies by name."""

import json
import os
import socket
import urllib.parse
from typing import Any

import tensorflow as tf

from lars_keras.training.errors import UsageError


def make_strategy(name: str = "auto", *, replicas: int | None = None, tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy called `name`. Call it before anything else touches TensorFlow's devices.

    Args:
        name: `"one"`: one GPU, or else the CPU. `"mirrored"`: all GPUs, the first `replicas` of them, or, where there
            is none, `replicas` logical CPU devices, to try it anywhere. `"multi_worker"`: the processes that the
            environment variable TF_CONFIG lists. `"tpu"`: the TPU slice `tpu`. `"auto"`: the first of tpu (if
            given), multi_worker (if TF_CONFIG lists several workers), mirrored (several GPUs, or `replicas`), one.
        replicas: number of replicas of `"mirrored"`.
        tpu: name or address of a TPU; `"local"` on a TPU VM.

    Raises:
        UsageError: if the devices asked for are not there.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if name == "auto":
        name = _choose(len(gpus), replicas, tpu)
    if name == "tpu":
        return _tpu(tpu)
    if name == "multi_worker":
        return _multi_worker()
    if name == "mirrored":
        return _mirrored(gpus, replicas)
    return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one, of all workers, that prints and writes."""
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" if has_chief else resolver.task_id == 0


def hosts_are_remote(strategy: tf.distribute.Strategy) -> bool:
    """Whether the input of some replica is made on another host, which runs no Python of this program: a TPU pod."""
    return isinstance(strategy, tf.distribute.TPUStrategy) and any(
        "localhost" not in device for device in strategy.extended.worker_devices
    )


def _choose(gpus: int, replicas: int | None, tpu: str | None) -> str:
    if tpu:
        return "tpu"
    if len(_workers()) > 1:
        return "multi_worker"
    return "mirrored" if (replicas or gpus) > 1 else "one"


def _mirrored(gpus: list[Any], replicas: int | None) -> tf.distribute.Strategy:
    if not gpus:
        if replicas is None:
            raise UsageError(
                "--strategy=mirrored found no GPU. Use --strategy=one, or --replicas=N to try it with N logical CPU "
                "devices."
            )
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        # Logical devices share memory: one addition on one of them is the shortest way.
        return tf.distribute.MirroredStrategy(
            [f"/cpu:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    if replicas is not None and replicas > len(gpus):
        raise UsageError(f"--replicas={replicas} asks for more GPUs than the {len(gpus)} found.")
    return tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(replicas or len(gpus))])


def _workers() -> list[str]:
    """Addresses of the chief and workers in TF_CONFIG."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return [*cluster.get("chief", []), *cluster.get("worker", [])]
    except (ValueError, AttributeError, TypeError) as e:
        raise UsageError(f"TF_CONFIG is not the JSON of a cluster ({e}). Received: {os.environ['TF_CONFIG']!r}") from e


def _multi_worker() -> tf.distribute.Strategy:
    if not _workers():
        raise UsageError(
            "--strategy=multi_worker needs the environment variable TF_CONFIG with the cluster's workers and this "
            "task's type and index. Received: TF_CONFIG unset"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu(tpu: str | None) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu or "local")
        _probe(resolver.master())
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].split(": No OpKernel")[0]
        raise UsageError(f"--strategy=tpu found no TPU at --tpu={tpu or 'local'}: {reason}") from e
    return tf.distribute.TPUStrategy(resolver)


def _probe(master: str) -> None:
    """Raises OSError where nothing listens: TensorFlow itself would wait for ever."""
    address = urllib.parse.urlsplit(master)
    if address.hostname and address.port:
        socket.create_connection((address.hostname, address.port), timeout=30).close()
