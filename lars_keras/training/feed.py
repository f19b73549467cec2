"""Cuts any batched dataset into the ghost batches that replicas take."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

# A tf.data.Dataset, or a function from tf.distribute.InputContext to one worker's own.
Feed: TypeAlias = Any | Callable[[Any], Any]


def training_iterator(feed: Feed, strategy: tf.distribute.Strategy, microbatch_size: int) -> Any:
    """An iterator whose `next` gives each replica its next ghost batch.

    Args:
        feed: a dataset of `(x, y)` or `(x, y, sample_weight)` batches of any size, read by every worker, which
            keeps its own part; or a function of `tf.distribute.InputContext` that returns the
            dataset of one worker's own examples, in order.
        strategy: the strategy of the model.
        microbatch_size: examples in a ghost batch.
    """

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        dataset = _own_part(feed, context, microbatch_size).repeat()
        return dataset.rebatch(microbatch_size, drop_remainder=True).prefetch(2)

    return iter(strategy.distribute_datasets_from_function(per_replica, _FETCH))


def scoring_batches(feed: Feed, strategy: tf.distribute.Strategy, batch_size: int) -> Any:
    """An iterable of padded batches `(x, y, weight)` of `batch_size` for each replica: every example once.

    The last batches are filled up with examples of weight 0, so that all have one static shape and every replica has
    one in each step.
    """

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        whole = batch_size * context.num_replicas_in_sync
        if isinstance(feed, tf.data.Dataset):
            own = _own_part(_padded(feed, whole), context, batch_size)
        else:
            own = _padded(feed(context), whole // context.num_input_pipelines)
        return own.rebatch(batch_size, drop_remainder=True)

    return strategy.distribute_datasets_from_function(per_replica, _FETCH)


# Replicas take consecutive ghost batches, so the order of examples is that of the dataset.
_FETCH = tf.distribute.InputOptions(experimental_fetch_to_device=False)


def _own_part(feed: Feed, context: tf.distribute.InputContext, size: int) -> tf.data.Dataset:
    """The examples of this worker, in blocks of one ghost batch for each of its replicas."""
    if not isinstance(feed, tf.data.Dataset):
        return feed(context)
    workers = context.num_input_pipelines
    if workers == 1:
        return feed
    block = size * (context.num_replicas_in_sync // workers)
    return feed.rebatch(block, drop_remainder=True).shard(workers, context.input_pipeline_id)


def _padded(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Batches of exactly `size`, with a weight for each example, 0 where it is padding."""

    def pad(*data: Any) -> tuple[Any, Any, tf.Tensor]:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data if len(data) > 1 else data[0])
        have = tf.shape(tf.nest.flatten(x)[0])[0]
        if weight is None:
            weight = tf.ones([have], tf.float32)

        def fill(t: tf.Tensor) -> tf.Tensor:
            t = tf.pad(t, [[0, size - have]] + [[0, 0]] * (t.shape.rank - 1))
            return tf.ensure_shape(t, [size, *t.shape[1:]])

        return tf.nest.map_structure(fill, (x, y, tf.cast(weight, tf.float32)))

    return dataset.rebatch(size).map(pad, num_parallel_calls=2)
