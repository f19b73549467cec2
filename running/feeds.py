"""Feed the examples of a data set to `Trainer`."""

import zlib
from collections.abc import Callable

import tensorflow as tf

from lars_keras.data import ImageData
from lars_keras.runtime.errors import UsageError
from lars_keras.training import Trainer
from lars_keras.training.cluster import Cluster

Feed = Callable[..., tf.data.Dataset]


def require_same_data(cluster: Cluster, data: ImageData) -> None:
    """Refuse hosts with different data, because each takes its own rows of a batch. Collective: call it on every host.

    Raises:
        UsageError: if the fingerprints of the data differ.
    """
    if not cluster.same_on_all_hosts(zlib.crc32(data.fingerprint.encode()) >> 1):
        raise UsageError(
            "The hosts found different data. Give each the same images, in a folder that they share or in copies. "
            f"Found by this host: {data.fingerprint}"
        )


def make_feeds(data: ImageData, trainer: Trainer, seed: int) -> tuple[Feed, Feed]:
    """Make functions that return the training and test examples of one host, with one-hot labels.

    An element of either stream has one ghost batch for each replica.
    """
    element = trainer.replicas * trainer.microbatch_size

    def shard(host: tf.distribute.InputContext) -> tuple[int, int]:
        return host.input_pipeline_id, host.num_input_pipelines

    def one_hot(x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return x, y if y.shape.rank == 2 else tf.one_hot(y, data.num_classes), mask

    def train_feed(host: tf.distribute.InputContext, first_update: int) -> tf.data.Dataset:
        first = first_update * trainer.accumulation_steps
        return data.train_batches(element, first=first, seed=seed, shard=shard(host)).map(one_hot)

    def test_feed(host: tf.distribute.InputContext) -> tf.data.Dataset:
        return data.test_batches(element, shard=shard(host)).map(one_hot)

    return train_feed, test_feed
