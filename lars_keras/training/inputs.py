"""Cuts any batched dataset into the ghost batches that replicas take."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

# A tf.data.Dataset, or a function of tf.distribute.InputContext (and, for training, of the number of the first update)
# that gives one worker's own. For training it must be endless: what follows the last example, the feed alone can know.
Feed: TypeAlias = Any | Callable[..., Any]


def element_spec(feed: Feed, *first_update: int) -> Any:
    """Shapes and dtypes of the feed's batches."""
    dataset = feed if isinstance(feed, tf.data.Dataset) else feed(tf.distribute.InputContext(), *first_update)
    return dataset.element_spec


def training_iterator(
    feed: Feed, strategy: tf.distribute.Strategy, microbatch_size: int, accumulation_steps: int, first_update: int
) -> Any:
    """An iterator whose `next` gives each replica of a `tf.distribute` strategy its next ghost batch."""

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return ghost_batches(feed, context, microbatch_size, accumulation_steps, first_update)

    return iter(strategy.distribute_datasets_from_function(per_replica, _FETCH))


def ghost_batches(
    feed: Feed, context: tf.distribute.InputContext, microbatch_size: int, accumulation_steps: int, first_update: int
) -> tf.data.Dataset:
    """The ghost batches of one worker's replicas: in each pass one for each of them, in order.

    Args:
        feed: a dataset of `(x, y)` or `(x, y, sample_weight)` batches of any size, read by every worker, which
            keeps its own part; or a function of `tf.distribute.InputContext` that returns the
            endless dataset of one worker's own examples from an update on, in order.
        context: which worker of how many, and how many replicas they all have.
        microbatch_size: examples in a ghost batch.
        accumulation_steps: ghost batches that a replica takes in an update.
        first_update: number of the update to begin with.
    """
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    if isinstance(feed, tf.data.Dataset):
        dataset = _own_part(feed.repeat(), context, microbatch_size)  # the end of an epoch may lie in a block
        dataset = dataset.rebatch(microbatch_size, drop_remainder=True)
        dataset = dataset.skip(first_update * accumulation_steps * replicas)
    else:
        dataset = feed(context, first_update).rebatch(microbatch_size, drop_remainder=True)
    return dataset.prefetch(2)


def scoring_batches(feed: Feed, strategy: tf.distribute.Strategy, batch_size: int) -> Any:
    """An iterable that gives each replica of a `tf.distribute` strategy its batches of `scoring_examples`."""

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return scoring_examples(feed, context, batch_size).rebatch(batch_size, drop_remainder=True)

    return strategy.distribute_datasets_from_function(per_replica, _FETCH)


def scoring_examples(feed: Feed, context: tf.distribute.InputContext, batch_size: int) -> tf.data.Dataset:
    """Padded batches `(x, y, weight)` of one worker, `batch_size` for each of its replicas: every example once.

    The last batches are filled up with examples of weight 0, so that all have one static shape and every replica has
    one in each step.
    """
    whole = batch_size * context.num_replicas_in_sync
    if isinstance(feed, tf.data.Dataset):
        return _own_part(_padded(feed, whole), context, batch_size)
    # Of one argument: it always begins at the start.
    return _padded(feed(context), whole // context.num_input_pipelines)


# Replicas take consecutive ghost batches, so the order of examples is that of the dataset.
_FETCH = tf.distribute.InputOptions(experimental_fetch_to_device=False)


def _own_part(feed: tf.data.Dataset, context: tf.distribute.InputContext, size: int) -> tf.data.Dataset:
    """The examples of this worker, in blocks of one ghost batch for each of its replicas."""
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
