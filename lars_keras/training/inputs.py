"""The input of `Trainer`: batches of any size, cut into the micro-batches that replicas take.

Here batches are NumPy arrays, and nothing needs TensorFlow. `lars_keras.training.tensorflow.inputs` does the same with
a `tf.data.Dataset`.
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

Batch: TypeAlias = Any
"""`(x, y)` or `(x, y, sample_weight)`, each an array or a structure of arrays."""

Data: TypeAlias = Any
"""The examples of a run, in one of two forms.

- Batches of any size, read by every host, which keeps its own part: a `tf.data.Dataset`, or an iterable of NumPy
  batches that gives the same batches each time it is iterated.
- A function of `InputContext` that returns such batches of one host's own examples. For training it also takes the
  number of an update, and returns endless batches that begin with the examples of that update.
"""


@dataclasses.dataclass(frozen=True)
class InputContext:
    """The place of a host among those that read the input, with the attributes of `tf.distribute.InputContext`.

    Attributes:
        num_input_pipelines: number of hosts.
        input_pipeline_id: number of this host, from 0.
        num_replicas_in_sync: number of replicas of all hosts.
    """

    num_input_pipelines: int = 1
    input_pipeline_id: int = 0
    num_replicas_in_sync: int = 1

    @property
    def local_replicas(self) -> int:
        """Number of replicas of this host."""
        return self.num_replicas_in_sync // self.num_input_pipelines


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an array, without TensorFlow.

    Attributes:
        shape: None for the number of examples, then the dimensions of one example.
        dtype: its name.
    """

    shape: tuple[int | None, ...]
    dtype: str


def element_spec(data: Data, *first_update: int) -> Any:
    """Return a `TensorSpec` for each array of a batch. NumPy batches are opened and the first of them is looked at.

    Args:
        data: for training or evaluation.
        *first_update: 0 where `data` is for training.

    Raises:
        ValueError: if `data` is empty or can be read only once.
    """
    batches = data(InputContext(), *first_update) if callable(data) else data
    if is_dataset(batches):
        return spec_of(batches.element_spec)
    if not callable(data):
        check_readable_again(data)
    for batch in batches:
        return spec_of(arrays_of(batch))
    raise ValueError(f"`data` must have at least one batch. Received: {type(data).__name__} without any")


def spec_of(batch: Batch) -> Any:
    """Return a `TensorSpec` for each array, or other description of an array, in a batch."""
    return keras.tree.map_structure(
        lambda a: TensorSpec((None, *tuple(a.shape)[1:]), keras.backend.standardize_dtype(a.dtype)), batch
    )


def is_dataset(batches: Any) -> bool:
    """Return True for a `tf.data.Dataset`; does not import TensorFlow."""
    tf: Any = sys.modules.get("tensorflow")
    return tf is not None and isinstance(batches, tf.data.Dataset)


def check_readable_again(data: Any) -> None:
    """Raise ValueError for what can be read only once, or is no data."""
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise ValueError(
            "`data` must be a tf.data.Dataset, an iterable of batches that can be read again and again, or a function "
            f"that returns one. Received: {type(data).__name__}"
        )


def arrays_of(batch: Batch) -> Batch:
    """Return a batch as a tuple of NumPy arrays."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    return tuple(keras.tree.map_structure(np.asarray, part) for part in parts if part is not None)


# -- finite data -------------------------------------------------------------------------------


def count_examples(data: Data) -> int:
    """Return the number of examples in finite data, by reading them once.

    Raises:
        ValueError: if it is not known that they are finite: they are none of a `tf.data.Dataset` with a cardinality and
            a sequence of NumPy batches.
    """
    if is_dataset(data):
        finite = int(data.cardinality()) >= 0
    else:
        finite = not callable(data) and hasattr(data, "__len__")
    if not finite:
        raise ValueError(
            "`steps_per_epoch` is needed where the size of the data is not known. Received: steps_per_epoch=None"
        )
    return sum(_examples(batch) for batch in data)


def take_updates(data: Data, microbatch_size: int, count: int) -> Data:
    """Return the first `count` micro-batches of data that can be read again; never a global batch in one piece."""
    if is_dataset(data):
        return data.rebatch(microbatch_size, drop_remainder=True).take(count)
    return _FirstMicrobatches(data, microbatch_size, count)


@dataclasses.dataclass(frozen=True)
class _FirstMicrobatches:
    """An iterable of the first `count` micro-batches of `data`, which can be read again."""

    data: Iterable[Batch]
    microbatch_size: int
    count: int

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(rebatch(self.data, self.microbatch_size, drop_remainder=True), self.count)


# -- batches of a host, in order ---------------------------------------------------------------


def training_batches(
    data: Data, context: InputContext, microbatch_size: int, accumulation_steps: int, first_update: int
) -> Iterator[Batch]:
    """Return one host's batches of one micro-batch for each of its replicas, from an update on, without an end."""
    size = microbatch_size * context.local_replicas
    if callable(data):
        return rebatch(data(context, first_update), size, drop_remainder=True)
    own = itertools.islice(
        rebatch(_repeated(data), size, drop_remainder=True),  # the end of an epoch may lie within a batch
        context.input_pipeline_id,
        None,
        context.num_input_pipelines,
    )
    return itertools.islice(own, first_update * accumulation_steps, None)


def scoring_batches(data: Data, context: InputContext, batch_size: int) -> Iterator[Batch]:
    """Return one host's batches for evaluation, of `batch_size` examples for each of its replicas.

    Every example comes once. One host's last batch may have fewer examples. With several hosts batches are
    `(x, y, weight)`, and the last one is filled up with copies of a real example, of weight 0.
    """
    size = batch_size * context.local_replicas
    if context.num_input_pipelines == 1:
        yield from rebatch(data(context) if callable(data) else data, size, drop_remainder=False)
        return
    if callable(data):
        yield from (_padded(batch, size) for batch in rebatch(data(context), size, drop_remainder=False))
        return
    first = context.input_pipeline_id * size
    for batch in rebatch(data, batch_size * context.num_replicas_in_sync, drop_remainder=False):
        padded = _padded(batch, batch_size * context.num_replicas_in_sync)
        yield _sliced(padded, first, first + size)


def rebatch(batches: Iterable[Batch], size: int, *, drop_remainder: bool) -> Iterator[Batch]:
    """Yield the same examples in batches of exactly `size`; a last one with fewer only without `drop_remainder`."""
    parts: collections.deque[Batch] = collections.deque()
    missing = size
    for batch in map(arrays_of, batches):
        start, stop = 0, _examples(batch)
        while stop - start >= missing:
            parts.append(_sliced(batch, start, start + missing))
            start += missing
            yield _joined(parts)
            parts.clear()
            missing = size
        if start < stop:
            parts.append(_sliced(batch, start, stop))
            missing -= stop - start
    if parts and not drop_remainder:
        yield _joined(parts)


def _repeated(data: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from data


def _examples(batch: Batch) -> int:
    return len(keras.tree.flatten(batch)[0])


def _sliced(batch: Batch, start: int, stop: int) -> Batch:
    return keras.tree.map_structure(lambda a: a[start:stop], batch)


def _joined(parts: Iterable[Batch]) -> Batch:
    first, *rest = parts
    return keras.tree.map_structure(lambda *a: np.concatenate(a), first, *rest) if rest else first


def _padded(batch: Batch, size: int) -> Batch:
    """Return `(x, y, weight)` with exactly `size` places; the weight of padding is 0."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    have = _examples(batch)
    weight = np.ones(have, np.float32) if weight is None else weight

    def fill(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a, np.repeat(a[:1], size - have, axis=0)]) if have < size else a

    def fill_weight(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a, np.zeros((size - have, *a.shape[1:]))]).astype(np.float32)

    x, y = keras.tree.map_structure(fill, (x, y))
    return x, y, keras.tree.map_structure(fill_weight, weight)
