"""The micro-batches of a `tf.data.Dataset`, for the replicas of a `tf.distribute` strategy or as NumPy arrays."""

import collections
import contextlib
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lars_keras.training.array_data import weights_of_classes
from lars_keras.training.batch_data import GeneratorFeed, IndexedFeed
from lars_keras.training.inputs import (
    Batch,
    Data,
    DataEnded,
    InputContext,
    arrays_of,
    check_readable_again,
    copied,
    different_shapes,
    first_batches,
    joined,
    spec_of,
)
from lars_keras.training.sources import refuse_endless

# Replicas take consecutive ghost batches, so examples keep the order of the dataset.
_FETCH = tf.distribute.InputOptions(experimental_fetch_to_device=False)


# -- for tf.distribute -------------------------------------------------------------------------


def training_iterator(
    data: Data,
    strategy: tf.distribute.Strategy,
    microbatch_size: int,
    accumulation_steps: int,
    first_update: int,
    updates: int,
) -> Any:
    """Return an iterator whose `next` gives each replica of the strategy its next ghost batch."""

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return ghost_batches(data, context, microbatch_size, accumulation_steps, first_update, updates)

    return iter(strategy.distribute_datasets_from_function(per_replica, _FETCH))


def scoring_batches(data: Data, strategy: tf.distribute.Strategy, batch_size: int) -> Iterator[Any]:
    """Yield the batches of `scoring_examples` for each replica of the strategy."""
    spec: Any = None

    def of_any_size(t: tf.Tensor) -> tf.Tensor:
        # Where the number of examples is static, `tf.distribute` drops a last step that has none for some replicas.
        return t if pads(strategy) else tf.compat.v1.placeholder_with_default(t, [None, *t.shape[1:]])

    def per_replica(context: tf.distribute.InputContext) -> tf.data.Dataset:
        nonlocal spec
        if pads(strategy):
            dataset = scoring_examples(data, context, batch_size).rebatch(batch_size, drop_remainder=True)
        else:
            dataset = _finite(data(context) if callable(data) else data).rebatch(batch_size)
        spec = spec_of(dataset.element_spec)
        # `tf.distribute` makes no None for a replica without examples.
        return dataset.map(lambda *batch: tuple(of_any_size(t) for t in keras.tree.flatten(batch) if t is not None))

    for arrays in strategy.distribute_datasets_from_function(per_replica, _FETCH):
        yield _structured(spec, arrays)


def weighted_by_class(dataset: tf.data.Dataset, class_weight: Mapping[int, float]) -> tf.data.Dataset:
    """Return a dataset of `(x, y, sample_weight)`; see `lars_keras.training.array_data.weights_of_classes`.

    Raises:
        ValueError: as it does; also if the batches are not `(x, y)`.
    """
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise ValueError(f"`class_weight` needs batches of `(x, y)`. Received: batches of {spec!r:.100}")
    shape = getattr(spec[1], "shape", None)
    if shape is None or shape.rank:  # try one, because errors of the function below come late and wrapped
        weights_of_classes(None if shape is None else np.zeros([1, *(s or 1 for s in shape[1:])]), class_weight)

    def weighted(x: Any, y: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor]:
        weight = tf.numpy_function(lambda y: weights_of_classes(y, class_weight), [y], tf.float32)
        return x, y, tf.ensure_shape(weight, y.shape[:1])

    return dataset.map(weighted)


def input_context(strategy: tf.distribute.Strategy) -> tf.distribute.InputContext:
    """Return the first context that the strategy gives to a function of data. Only such a function gets one."""
    contexts = []

    def nothing(context: tf.distribute.InputContext) -> tf.data.Dataset:
        contexts.append(context)
        return tf.data.Dataset.range(0)

    strategy.distribute_datasets_from_function(nothing, _FETCH)
    return contexts[0]


def pads(strategy: tf.distribute.Strategy) -> bool:
    """Return True if an evaluation pads its last batches, because hosts or TPU cores must take equally many."""
    return isinstance(strategy, tf.distribute.TPUStrategy | tf.distribute.MultiWorkerMirroredStrategy)


# -- as NumPy arrays, for the JAX engine -------------------------------------------------------


def numpy_training_batches(
    data: Data, context: InputContext, microbatch_size: int, accumulation_steps: int, first_update: int, updates: int
) -> Iterator[Batch]:
    """Return the batches of `lars_keras.training.inputs.training_batches` for a `tf.data.Dataset`."""
    ghosts = ghost_batches(data, context, microbatch_size, accumulation_steps, first_update, updates)
    ghosts = ghosts.as_numpy_iterator()
    while True:
        with errors_of_data():
            own = list(itertools.islice(ghosts, context.local_replicas))
        if len(own) < context.local_replicas:
            return
        yield joined(map(arrays_of, own))


def numpy_scoring_batches(data: Data, context: InputContext, batch_size: int) -> Iterator[Batch]:
    """Return the batches of `lars_keras.training.inputs.scoring_batches` for a `tf.data.Dataset`."""
    if context.num_input_pipelines > 1:
        batches = scoring_examples(data, context, batch_size)
    else:
        size = batch_size * context.num_replicas_in_sync
        batches = _finite(data(context) if callable(data) else data).rebatch(size)
    with errors_of_data():
        yield from map(arrays_of, batches.as_numpy_iterator())


# -- of one host, in order ---------------------------------------------------------------------


def ghost_batches(
    data: Data, context: Any, microbatch_size: int, accumulation_steps: int, first_update: int, updates: int
) -> tf.data.Dataset:
    """Return the ghost batches of one host: for each micro-batch, one for each of its replicas, in their order.

    Args:
        data: see `lars_keras.training.inputs.Data`.
        context: `InputContext` or `tf.distribute.InputContext`: which host of how many, and how many replicas in all.
        microbatch_size: examples in a ghost batch.
        accumulation_steps: ghost batches that a replica takes in an update.
        first_update: number of the update to begin with.
        updates: number of updates to feed. No example after them is read.
    """
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    if callable(data):
        first = data.ahead(2) if isinstance(data, GeneratorFeed) else None
        dataset = as_dataset(data(context, first_update), first, close=isinstance(data, IndexedFeed))
        dataset = dataset.rebatch(microbatch_size, drop_remainder=True)
    else:
        dataset = _own_part(as_dataset(data).repeat(), context, microbatch_size)  # an epoch may end within a block
        dataset = dataset.rebatch(microbatch_size, drop_remainder=True)
        dataset = dataset.skip(first_update * accumulation_steps * replicas)
    return dataset.take(updates * accumulation_steps * replicas).prefetch(2)


def scoring_examples(data: Data, context: Any, batch_size: int) -> tf.data.Dataset:
    """Return padded batches `(x, y, weight)` of one host, `batch_size` places for each of its replicas.

    Every example comes once. The last batches are filled up with copies of a real example, of weight 0, so that all
    have one static shape and every replica has one in each step.
    """
    size = batch_size * context.num_replicas_in_sync
    if callable(data):  # evaluation always starts at example 0, so the function takes the context only
        return _padded(_finite(data(context)), size // context.num_input_pipelines)
    return _own_part(_padded(_finite(data), size), context, batch_size)


def as_dataset(batches: Any, first: list[Batch] | None = None, close: bool = False) -> tf.data.Dataset:
    """Return a dataset of NumPy batches, or a dataset with known ranks.

    A size that differs between the first two batches is assumed to differ in each batch.

    Args:
        batches: a dataset, or NumPy batches.
        first: the first two batches, if they are known.
        close: close the generator `batches` at the end, because threads of it may read ahead.

    Raises:
        ValueError: if there are no batches.
    """
    if isinstance(batches, tf.data.Dataset):
        return _of_known_ranks(batches)
    source: Iterable[Batch] = batches
    if first is None and isinstance(batches, Iterator):  # opened by a function, and read once
        first = first_batches(batches, 2)
        source = itertools.chain(first, batches)
    elif first is None:
        check_readable_again(batches)
        first = first_batches(batches, 2)
    if not first:
        raise ValueError("The data must have at least one batch.")
    spec = _common_spec(first)
    # A generator of TensorFlow gives no None, so the arrays come without them.
    places = [i for i, s in enumerate(keras.tree.flatten(spec)) if s is not None]
    signature = tuple(keras.tree.flatten(spec)[i] for i in places)

    def read() -> Iterator[Any]:
        # TensorFlow writes into the memory of arrays that it is given.
        for batch in map(copied, map(arrays_of, source)):
            flat = keras.tree.flatten(batch)
            keras.tree.assert_same_structure(spec, batch)
            arrays = tuple(flat[i] for i in places)
            for array, expected in zip(arrays, signature, strict=True):
                if not expected.shape.is_compatible_with(array.shape):
                    raise ValueError(
                        f"A batch has an array of shape {array.shape}, the first two batches have {expected.shape}. "
                        "Sizes that vary must differ between the first two batches."
                    )
            yield arrays

    arrays = tf.data.Dataset.from_generator(
        lambda: map(_raised, _with_error(read(), batches.close if close else lambda: None)), output_signature=signature
    )
    options = tf.data.Options()
    options.autotune.enabled = False  # as in lars_keras.data: the end of an epoch would wait
    return arrays.with_options(options).map(lambda *flat: _structured(spec, flat))


def _structured(spec: Any, arrays: Iterable[Any]) -> Any:
    """Return arrays in the structure of a spec, and None where it has None."""
    given = iter(arrays)
    leaves = [None if s is None else next(given) for s in keras.tree.flatten(spec)]
    return keras.tree.pack_sequence_as(spec, leaves)


def _common_spec(batches: list[Batch]) -> Any:
    """Return a `tf.TensorSpec` for each array, with None for sizes that differ between batches; None for None."""

    def common(*specs: Any) -> tf.TensorSpec | None:
        if specs[0] is None:
            return None
        if len({len(s.shape) for s in specs}) > 1:
            raise ValueError(f"Arrays of all batches must have the same rank. Received: {', '.join(map(str, specs))}")
        sizes = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(s.shape for s in specs), strict=True)]
        return tf.TensorSpec(sizes, specs[0].dtype)

    return keras.tree.map_structure(common, *map(spec_of, batches))


def _of_known_ranks(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the dataset with the ranks and sizes that its first two batches have in common, if it knows no ranks."""
    if all(spec.shape.rank is not None for spec in tf.nest.flatten(dataset.element_spec) if hasattr(spec, "shape")):
        return dataset
    common = _common_spec([arrays_of(batch) for batch in dataset.take(2)])

    def known(*parts: Any) -> Any:
        batch = tuple(part for part in parts if part is not None)
        return tf.nest.map_structure(lambda t, spec: tf.ensure_shape(t, spec.shape), batch, common)

    return dataset.map(known)


_errors: collections.deque[Exception] = collections.deque(maxlen=8)  # also of data that nobody reads any more


def _name(error: Exception) -> str:
    return f"data error <{id(error)}>"


def _with_error(batches: Iterator[Any], close: Callable[[], None]) -> Iterator[Any]:
    """Yield the batches and call `close`; keep the error that ends them, and yield it instead of an end.

    Replicas read in turn. If the next one found an end, that might be what TensorFlow reports.
    """
    try:
        yield from batches
    except Exception as e:
        _errors.append(e)
        while True:
            yield e
    finally:
        close()


def _raised(batch: Any) -> Any:
    """Return a batch; raise what is an error, by its name, because TensorFlow makes another one of it."""
    if isinstance(batch, Exception):
        raise RuntimeError(_name(batch)) from batch
    return batch


@contextlib.contextmanager
def errors_of_data() -> Iterator[None]:
    """Raise the original error in the data or the model, which TensorFlow replaces by another one."""
    try:
        yield
    except ValueError as e:
        stack, _, message = str(e).rpartition("    ValueError: ")
        if stack.startswith("in user code:"):  # AutoGraph's; the traceback has it, too
            raise ValueError(textwrap.dedent(message).strip()) from e
        raise
    except tf.errors.OpError as e:
        for error in [error for error in _errors if _name(error) in str(e)]:
            _errors.remove(error)
            raise error from e
        if isinstance(e, tf.errors.OutOfRangeError):
            raise DataEnded from e
        if "MaybeMoveContiguousSlices" in str(e):  # of `rebatch`
            raise ValueError(different_shapes(e.message.splitlines()[0])) from e
        raise


def _finite(batches: Any) -> tf.data.Dataset:
    """Return the result of `as_dataset` for data that are not known to be endless."""
    if isinstance(batches, tf.data.Dataset):
        refuse_endless(int(batches.cardinality()) == tf.data.INFINITE_CARDINALITY)
    return as_dataset(batches)


def _own_part(dataset: tf.data.Dataset, context: Any, size: int) -> tf.data.Dataset:
    """Keep the examples of this host, in blocks of one ghost batch for each of its replicas."""
    hosts = context.num_input_pipelines
    if hosts == 1:
        return dataset
    block = size * (context.num_replicas_in_sync // hosts)
    return dataset.rebatch(block, drop_remainder=True).shard(hosts, context.input_pipeline_id)


def first_input(x: Any) -> tf.Tensor:
    """Return the first input that is there; optional inputs may be None."""
    return next(t for t in tf.nest.flatten(x) if t is not None)


def _padded(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Return batches of exactly `size`, with a weight for each example; padding has weight 0."""

    def pad(*data: Any) -> tuple[Any, Any, tf.Tensor]:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data if len(data) > 1 else data[0])
        have = tf.shape(first_input(x))[0]
        if weight is None:
            weight = tf.ones([have], tf.float32)

        def fill(t: Any) -> Any:
            if t is None:
                return None
            t = tf.concat([t, tf.repeat(t[:1], size - have, axis=0)], axis=0)
            return tf.ensure_shape(t, [size, *t.shape[1:]])

        def fill_weight(t: Any) -> Any:
            if t is None:
                return None
            t = fill(tf.cast(t, tf.float32))
            real = tf.reshape(tf.range(size) < have, [size] + [1] * (t.shape.rank - 1))
            return tf.where(real, t, 0.0)

        x, y = keras.tree.map_structure(fill, (x, y))
        return x, y, keras.tree.map_structure(fill_weight, weight)

    return dataset.rebatch(size).map(pad, num_parallel_calls=2)
