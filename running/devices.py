"""The devices of a run."""

import keras

from flags.config import RunConfig
from lars_keras.runtime.errors import UsageError
from lars_keras.training.cluster import Cluster, make_cluster


def start_devices(config: RunConfig) -> Cluster:
    """Find the devices, and set the seed, the dtype policy and the image format of the process.

    Call it first of all, because a TPU must be initialized before any tensor exists.

    Raises:
        UsageError: if there are several hosts, and each would make a run folder of its own.
    """
    cluster = make_cluster(
        config.strategy,
        replicas=config.replicas,
        tpu=config.tpu,
        shard_optimizer_state=config.shard_optimizer_state,
    )
    if cluster.hosts > 1 and not (config.run_dir or config.dry_run):
        raise UsageError(f"The {cluster.hosts} hosts need --run_dir, a folder that they share. Received: no --run_dir")
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    keras.config.set_image_data_format("channels_last")  # keras.json may have another
    return cluster
