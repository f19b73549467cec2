"""Strategies by name, and what the rest asks of them: `tf.distribute` on TensorFlow, `keras.distribution` on JAX."""

import json
import os
import re
import socket
import urllib.parse
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from lars_keras.runtime.errors import UsageError

Strategy: TypeAlias = tf.distribute.Strategy | keras.distribution.DataParallel | None  # None: JAX, one device


def make_strategy(
    name: str = "auto", *, replicas: int | None = None, tpu: str | None = None, shard_optimizer_state: bool = False
) -> Any:
    """The strategy called `name`. Call it before anything else touches TensorFlow's devices.

    Args:
        name: `"single"`: one GPU, or else the CPU. `"mirrored"`: all GPUs, the first `replicas` of them, or, without
            any, `replicas` logical CPU devices, to try it anywhere. `"multi_worker"`: the processes that the
            environment variable TF_CONFIG lists. `"tpu"`: the TPU slice `tpu`. `"auto"`: the first of tpu (if
            given), multi_worker (if TF_CONFIG lists several workers), mirrored (several GPUs, or `replicas`), one.
            On JAX they mean what `lars_keras.training.jax.distribution.make_distribution` says.
        replicas: number of replicas of `"mirrored"`.
        tpu: name or address of a TPU; `"local"` on a TPU VM.
        shard_optimizer_state: JAX only: each device keeps and updates its share of the weights.

    Returns:
        A `tf.distribute.Strategy`, or a `keras.distribution.DataParallel`; either has a `scope()` for the model.

    Raises:
        UsageError: if the devices asked for are not there.
    """
    backend = keras.backend.backend()
    if name == "auto" and replicas and len(workers_of_cluster()) > 1:
        raise UsageError(
            "TF_CONFIG lists several workers, and --replicas goes with --strategy=mirrored. Received: "
            f"--replicas={replicas}"
        )
    if backend == "jax":
        if tpu not in (None, "local"):
            raise UsageError(
                "On JAX each host of a TPU slice runs this program itself, with --strategy=multi_worker. "
                f"Received: --tpu={tpu}"
            )
        from lars_keras.training.jax.distribution import make_distribution

        return make_distribution(
            "tpu" if tpu and name == "auto" else name, replicas=replicas, shard_optimizer_state=shard_optimizer_state
        )
    if backend != "tensorflow":
        raise UsageError(f"Training runs with KERAS_BACKEND=tensorflow or jax. Received: KERAS_BACKEND={backend}")
    if shard_optimizer_state:
        raise UsageError(
            "--shard_optimizer_state needs the JAX engine: set KERAS_BACKEND=jax. Received: KERAS_BACKEND=tensorflow"
        )
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


def strategy_of(model: keras.Model) -> Strategy:
    """The strategy that a model was made under; on JAX, the current one."""
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else model.distribute_strategy


def replicas_in(strategy: Strategy) -> int:
    """Number of replicas."""
    if isinstance(strategy, tf.distribute.Strategy):
        return strategy.num_replicas_in_sync
    return strategy.device_mesh.devices.size if strategy else 1


def is_chief(strategy: Strategy) -> bool:
    """Whether this process is the one, of all workers, that prints and writes."""
    if not isinstance(strategy, tf.distribute.Strategy):
        import jax

        return jax.process_index() == 0
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" if has_chief else resolver.task_id == 0


def any_across_hosts(strategy: Strategy, mine: bool) -> bool:
    """Whether a thing is so on any worker; all of them must ask."""
    if not isinstance(strategy, tf.distribute.Strategy):
        from lars_keras.training.jax.distribution import on_any_process

        return on_any_process(mine)
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return mine
    votes = strategy.run(lambda: tf.constant(float(mine)))
    return bool(strategy.reduce(tf.distribute.ReduceOp.SUM, votes, axis=None) > 0)


def same_on_all_hosts(strategy: Strategy, mine: int) -> bool:
    """Whether all workers have the same number; all of them must ask."""
    if not isinstance(strategy, tf.distribute.Strategy):
        from lars_keras.training.jax.distribution import same_in_all_processes

        return same_in_all_processes(mine)
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    numbers = strategy.run(lambda: tf.constant(mine, tf.int64))
    total = strategy.reduce(tf.distribute.ReduceOp.SUM, numbers, axis=None)
    return not any_across_hosts(strategy, int(total) != mine * strategy.num_replicas_in_sync)


def says_worker_is_lost(error: Exception) -> bool:
    """Whether an error of TensorFlow or JAX comes from another worker's end."""
    if not _has_other_workers():
        return False
    if isinstance(error, tf.errors.OpError):
        return isinstance(error, tf.errors.UnavailableError | tf.errors.AbortedError | tf.errors.DeadlineExceededError)
    # JAX has no type for it, and raises ValueError where an array is fetched. Gloo joins the CPUs of processes.
    return re.search(r"\b(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b|Gloo \S+ failed", str(error)) is not None


def _has_other_workers() -> bool:
    if len(workers_of_cluster()) > 1:
        return True
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.process_count() > 1


def hosts_are_remote(strategy: Strategy) -> bool:
    """Whether the input of some replica is made on another host, which runs no Python of this program: a TPU pod."""
    return isinstance(strategy, tf.distribute.TPUStrategy) and any(
        "localhost" not in device for device in strategy.extended.worker_devices
    )


def _choose(gpus: int, replicas: int | None, tpu: str | None) -> str:
    if tpu:
        return "tpu"
    if len(workers_of_cluster()) > 1:
        return "multi_worker"
    return "mirrored" if (replicas or gpus) > 1 else "single"


def _mirrored(gpus: list[Any], replicas: int | None) -> tf.distribute.Strategy:
    if not gpus:
        if replicas is None:
            raise UsageError(
                "--strategy=mirrored found no GPU. Use --strategy=single, or --replicas=N to try it with N logical CPU "
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


def workers_of_cluster() -> list[str]:
    """Addresses of the chief and workers in TF_CONFIG."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return [*cluster.get("chief", []), *cluster.get("worker", [])]
    except (ValueError, AttributeError, TypeError) as e:
        raise UsageError(f"TF_CONFIG is not the JSON of a cluster ({e}). Received: {os.environ['TF_CONFIG']!r}") from e


def _multi_worker() -> tf.distribute.Strategy:
    if not workers_of_cluster():
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
