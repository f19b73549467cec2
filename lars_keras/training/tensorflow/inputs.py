"""The micro-batches of a `tf.data.Dataset`, for the replicas of a `tf.distribute` strategy or as NumPy arrays."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lars_keras.training.inputs import Batch, Data, InputContext, arrays_of, check_readable_again, spec_of

# Replicas take consecutive ghost batches, so the order of examples is that of the dataset.
_FETCH = tf.distribute.InputOptions(experimental_fetch_to_device=False)


# -- for tf.distribute -------------------------------------------------------------------------


def training_iterator(
    data: Data, strategy: tf.distribute.Strategy, microbatch_size: int, accumulation_steps: int, first_update: int
) -> Any:
    """Return an iterator whose `next` gives each replica of the strategy its next ghost batch."""

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return ghost_batches(data, context, microbatch_size, accumulation_steps, first_update)

    return iter(strategy.distribute_datasets_from_function(per_replica, _FETCH))


def scoring_batches(data: Data, strategy: tf.distribute.Strategy, batch_size: int) -> Iterable[Any]:
    """Return an iterable that gives each replica of the strategy its batches of `scoring_examples`."""

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        if pads(strategy):
            return scoring_examples(data, context, batch_size).rebatch(batch_size, drop_remainder=True)
        return as_dataset(data(context) if callable(data) else data).rebatch(batch_size)

    return strategy.distribute_datasets_from_function(per_replica, _FETCH)


def pads(strategy: tf.distribute.Strategy) -> bool:
    """Return True if the last batches of an evaluation are filled up, because hosts or TPU cores must keep step."""
    return isinstance(strategy, tf.distribute.TPUStrategy | tf.distribute.MultiWorkerMirroredStrategy)


# -- as NumPy arrays, for the JAX engine -------------------------------------------------------


def numpy_training_batches(
    data: Data, context: InputContext, microbatch_size: int, accumulation_steps: int, first_update: int
) -> Iterator[Batch]:
    """Return what `lars_keras.training.inputs.training_batches` does, of a `tf.data.Dataset`."""
    ghosts = ghost_batches(data, context, microbatch_size, accumulation_steps, first_update).as_numpy_iterator()
    while True:
        own = list(itertools.islice(ghosts, context.local_replicas))
        if len(own) < context.local_replicas:
            return
        yield keras.tree.map_structure(lambda *a: np.concatenate(a), *own)


def numpy_scoring_batches(data: Data, context: InputContext, batch_size: int) -> Iterator[Batch]:
    """Return what `lars_keras.training.inputs.scoring_batches` does, of a `tf.data.Dataset`."""
    if context.num_input_pipelines > 1:
        return scoring_examples(data, context, batch_size).as_numpy_iterator()
    size = batch_size * context.num_replicas_in_sync
    return as_dataset(data(context) if callable(data) else data).rebatch(size).as_numpy_iterator()


# -- of one host, in order ---------------------------------------------------------------------


def ghost_batches(
    data: Data, context: Any, microbatch_size: int, accumulation_steps: int, first_update: int
) -> tf.data.Dataset:
    """Return the ghost batches of one host: for each micro-batch one for each of its replicas, in their order.

    Args:
        data: see `lars_keras.training.inputs.Data`.
        context: `InputContext` or `tf.distribute.InputContext`: which host of how many, and how many replicas in all.
        microbatch_size: examples in a ghost batch.
        accumulation_steps: ghost batches that a replica takes in an update.
        first_update: number of the update to begin with.
    """
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    if callable(data):
        dataset = as_dataset(data(context, first_update)).rebatch(microbatch_size, drop_remainder=True)
    else:
        dataset = _own_part(as_dataset(data).repeat(), context, microbatch_size)  # an epoch may end within a block
        dataset = dataset.rebatch(microbatch_size, drop_remainder=True)
        dataset = dataset.skip(first_update * accumulation_steps * replicas)
    return dataset.prefetch(2)


def scoring_examples(data: Data, context: Any, batch_size: int) -> tf.data.Dataset:
    """Return padded batches `(x, y, weight)` of one host, `batch_size` places for each of its replicas.

    Every example comes once. The last batches are filled up with copies of a real example, of weight 0, so that all
    have one static shape and every replica has one in each step.
    """
    size = batch_size * context.num_replicas_in_sync
    if callable(data):  # evaluation always starts at example 0, so the function takes the context only
        return _padded(as_dataset(data(context)), size // context.num_input_pipelines)
    return _own_part(_padded(as_dataset(data), size), context, batch_size)


def as_dataset(batches: Any) -> tf.data.Dataset:
    """Return a dataset of the same batches, if they are NumPy arrays.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(batches, tf.data.Dataset):
        return batches
    if isinstance(batches, Iterator):  # opened by a function, and read once
        first = next(batches, None)
        source: Iterable[Batch] = itertools.chain([first], batches)
    else:
        check_readable_again(batches)
        first, source = next(iter(batches), None), batches
    if first is None:
        raise ValueError("`data` must have at least one batch.")
    signature = keras.tree.map_structure(lambda s: tf.TensorSpec(s.shape, s.dtype), spec_of(arrays_of(first)))
    return tf.data.Dataset.from_generator(lambda: map(arrays_of, source), output_signature=signature)


def _own_part(dataset: tf.data.Dataset, context: Any, size: int) -> tf.data.Dataset:
    """Keep the examples of this host, in blocks of one ghost batch for each of its replicas."""
    hosts = context.num_input_pipelines
    if hosts == 1:
        return dataset
    block = size * (context.num_replicas_in_sync // hosts)
    return dataset.rebatch(block, drop_remainder=True).shard(hosts, context.input_pipeline_id)


def _padded(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Return batches of exactly `size`, with a weight for each example, 0 where it is padding."""

    def pad(*data: Any) -> tuple[Any, Any, tf.Tensor]:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data if len(data) > 1 else data[0])
        have = tf.shape(tf.nest.flatten(x)[0])[0]
        if weight is None:
            weight = tf.ones([have], tf.float32)

        def fill(t: tf.Tensor) -> tf.Tensor:
            t = tf.concat([t, tf.repeat(t[:1], size - have, axis=0)], axis=0)
            return tf.ensure_shape(t, [size, *t.shape[1:]])

        def fill_weight(t: tf.Tensor) -> tf.Tensor:
            t = fill(tf.cast(t, tf.float32))
            real = tf.reshape(tf.range(size) < have, [size] + [1] * (t.shape.rank - 1))
            return tf.where(real, t, 0.0)

        x, y = tf.nest.map_structure(fill, (x, y))
        return x, y, tf.nest.map_structure(fill_weight, weight)

    return dataset.rebatch(size).map(pad, num_parallel_calls=2)
