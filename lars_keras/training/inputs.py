"""The input of `Trainer`: batches of any size, cut into the micro-batches that replicas take.

Here batches are NumPy arrays, and nothing needs TensorFlow. `lars_keras.training.tensorflow.inputs` does the same with
a `tf.data.Dataset`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

Batch: TypeAlias = Any
"""`(x,)`, `(x, y)` or `(x, y, sample_weight)`, each an array, a structure of arrays, or None."""

Data: TypeAlias = Any
"""The examples of a run, in one of two forms; `lars_keras.training.sources` makes them of all others.

- Batches of any size, read by every host, which keeps its own part: a `tf.data.Dataset`, or an iterable of NumPy
  batches that gives the same batches each time it is iterated.
- A function of `InputContext` that returns such batches of one host's own examples. For training it also takes the
  number of an update, and returns endless batches that begin with the examples of that update.
"""


_ALIGNMENT = 64  # bytes; XLA and TensorFlow copy other memory


class DataEnded(ValueError):
    """The data ended within an update, which is not taken."""

    def __init__(self) -> None:
        super().__init__(
            "The data have ended before the last update. Data for training must have no end, or be readable again."
        )


@dataclasses.dataclass(frozen=True)
class InputContext:
    """The place of a host among the readers of the input, with the attributes of `tf.distribute.InputContext`.

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


def element_spec(data: Data, context: Any, *first_update: int) -> Any:
    """Return a `TensorSpec` for each array of a batch, None for None.

    Sizes that a `tf.data.Dataset` does not know are taken from its first batch. Of other data, the first batch is read.

    Args:
        data: for training or evaluation.
        context: passed to a function of data; see `lars_keras.training.cluster.Cluster.input_context`.
        *first_update: 0 if `data` is for training; left out for an evaluation.

    Raises:
        ValueError: if `data` is empty or can be read only once.
    """
    batches = data
    if callable(data) and not hasattr(data, "element_spec"):
        function: Any = getattr(data, "look", data)
        batches = function(context, *first_update)
    if hasattr(batches, "element_spec"):
        spec = spec_of(batches.element_spec)
        if not is_dataset(batches) or is_known(spec):
            return spec
    elif not callable(data):
        check_readable_again(data)
    for batch in first_batches(batches, 1):
        return spec_of(batch)
    raise ValueError(f"The data must have at least one batch. Received: {type(data).__name__} without any")


def known_structure(data: Data) -> Any:
    """Return the structure of a batch as `element_spec` does; None if the data must be read or opened for that."""
    if hasattr(data, "element_spec"):
        return spec_of(data.element_spec)
    return spec_of(arrays_of(data[0])) if isinstance(data, list) and data else None


def first_batches(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Return copies of the first batches, to look at their shapes."""
    found = batches.without_hooks() if hasattr(batches, "without_hooks") else batches
    return [copied(arrays_of(batch)) for batch in itertools.islice(found, count)]


def is_known(spec: Any) -> bool:
    """Return True if all sizes in a structure of `TensorSpec` are known, but for the number of examples."""
    return all(s is None or None not in s.shape[1:] for s in keras.tree.flatten(spec))


def spec_of(batch: Batch) -> Any:
    """Return a `TensorSpec` for each array, or other description of an array, in a batch.

    Raises:
        ValueError: for sparse and ragged tensors, and for types that no model takes.
    """
    return keras.tree.map_structure(_spec, batch)


def _spec(a: Any) -> TensorSpec | None:
    kind = type(a).__name__
    if a is None or kind == "NoneTensorSpec":
        return None
    if not hasattr(a, "shape") or not hasattr(a, "dtype") or kind.startswith(("Ragged", "Sparse")):
        raise ValueError(
            "Batches must hold dense arrays. Convert ragged tensors by `to_tensor()`, sparse ones by "
            "`tf.sparse.to_dense`. "
            f"Received: {kind}"
        )
    rank = a.shape.rank if hasattr(a.shape, "rank") else len(a.shape)
    if rank is None:
        return TensorSpec((None, None), _dtype(a.dtype))  # not `is_known`
    if rank == 0:
        raise ValueError(
            "The first dimension of every array of a batch must be its examples. Received: a single value; "
            "`batch(size)` makes batches of a tf.data.Dataset"
        )
    return TensorSpec((None, *tuple(a.shape)[1:]), _dtype(a.dtype))


def _dtype(dtype: Any) -> str:
    """Return the name of an array's dtype, "string" for text of any kind."""
    if getattr(dtype, "kind", "") in ("U", "S", "O"):
        return "string"
    return keras.backend.standardize_dtype(dtype)


def is_dataset(batches: Any) -> bool:
    """Return True for a `tf.data.Dataset`; does not import TensorFlow."""
    tf: Any = sys.modules.get("tensorflow")
    return tf is not None and isinstance(batches, tf.data.Dataset)


def check_readable_again(data: Any) -> None:
    """Raise ValueError for data that can be read only once, and for other objects."""
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise ValueError(
            "The data must be a tf.data.Dataset, an iterable of batches that can be read again and again, or a "
            f"function that returns one. Received: {type(data).__name__}"
        )


def arrays_of(batch: Batch) -> Batch:
    """Return a batch as a tuple of NumPy arrays and None, without None at its end.

    Raises:
        ValueError: if it has more than three parts, no example, arrays with different numbers of examples, or
            anything but arrays of numbers or text.
    """
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 3 or parts[0] is None:
        raise ValueError(
            "A batch must be `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`. Received: "
            f"{type(batch).__name__} of length {len(parts)}"
        )
    while parts[-1] is None:
        parts = parts[:-1]
    arrays = keras.tree.lists_to_tuples(tuple(keras.tree.map_structure(to_array, part) for part in parts))
    sizes = {len(a) for a in keras.tree.flatten(arrays) if a is not None}
    if len(sizes) > 1:
        raise ValueError(
            "Inputs, targets and weights must have the same number of examples. Received: arrays of length "
            + ", ".join(map(str, sorted(sizes)))
        )
    return arrays


def to_array(a: Any) -> Any:
    """Return an array or tensor of any library, on any device, as a NumPy array; None for None.

    Raises:
        ValueError: if its first dimension does not count the examples.
    """
    if a is None:
        return None
    if hasattr(a, "detach"):  # torch
        a = a.detach().cpu()
    kind = type(a)
    array = None if kind.__module__.startswith("scipy.sparse") else np.asarray(a)
    if array is not None and array.dtype.kind == "O" and not all(isinstance(v, str | bytes) for v in array.flat[:1]):
        array = None
    if array is None or array.ndim == 0:
        raise ValueError(
            "Batches must hold arrays of numbers or text, whose first dimension is the examples. Received: "
            f"{a!r:.60} of type {kind.__name__}"
        )
    return array[:, np.newaxis] if kind.__name__ == "Series" and array.ndim == 1 else array  # of pandas, as Keras does


# -- finite data -------------------------------------------------------------------------------


def count_examples(data: Data) -> int:
    """Return the number of examples in finite data, by reading them once unless all batches have one known size.

    Raises:
        ValueError: if the data may be endless: neither a `tf.data.Dataset` of known cardinality nor a sequence of NumPy
            batches.
    """
    if getattr(data, "examples", None) is not None:
        return data.examples
    if is_dataset(data):
        spec_of(data.element_spec)  # refuses what cannot be counted
        finite = int(data.cardinality()) >= 0
        size = next(s.shape[0] if s.shape.rank else None for s in keras.tree.flatten(data.element_spec) if _spec(s))
        if finite and size is not None:  # batched with `drop_remainder`
            return int(data.cardinality()) * size
    else:
        finite = not callable(data) and hasattr(data, "__len__")
    if not finite:
        raise ValueError(
            "`steps_per_epoch` is needed where the size of the data is not known. Received: steps_per_epoch=None"
        )
    return sum(count_in(batch if is_dataset(data) else arrays_of(batch)) for batch in data)


def take_updates(data: Data, microbatch_size: int, count: int) -> Data:
    """Return the first `count` micro-batches of data that can be read again, never as one global batch."""
    if hasattr(data, "first"):
        return data.first(count * microbatch_size)
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
    """Return one host's endless batches, of a micro-batch for each of its replicas, from an update on."""
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

    Every example comes once. On a single host the last batch may have fewer examples. On several hosts batches are
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
        yield sliced(padded, first, first + size)


def rebatch(batches: Iterable[Batch], size: int, *, drop_remainder: bool) -> Iterator[Batch]:
    """Yield the same examples in batches of `size`. Only without `drop_remainder`, the last batch may be smaller.

    A batch holds until the next one is asked for: it may be memory of `batches`, and a generator may use the same
    memory for all of its batches.
    """
    parts: list[Batch] = []
    missing = size
    for batch in map(arrays_of, batches):
        start, stop = 0, count_in(batch)
        while stop - start >= missing:
            yield joined([*parts, sliced(batch, start, start + missing)])
            start, parts, missing = start + missing, [], size
        if start < stop:
            parts.append(copied(sliced(batch, start, stop)))
            missing -= stop - start
    if parts and not drop_remainder:
        yield joined(parts)


def _repeated(data: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in data:
            yield batch
        if batch is None:
            raise ValueError(f"The data have no batches when they are read again. Received: {type(data).__name__}")


def count_in(batch: Batch) -> int:
    """Return the number of examples in a batch of arrays."""
    return next(len(a) for a in keras.tree.flatten(batch) if a is not None)


def sliced(batch: Batch, start: int, stop: int | None) -> Batch:
    """Return the examples of a batch from `start` to `stop`, or to the end if `stop` is None."""
    return keras.tree.map_structure(lambda a: None if a is None else a[start:stop], batch)


def copied(batch: Batch) -> Batch:
    """Return the arrays of a batch in memory of their own, aligned so that a CPU can compute on it directly."""
    return keras.tree.map_structure(_copied, batch)


def _copied(a: Any) -> Any:
    if a is None or a.dtype.hasobject or not a.nbytes:
        return None if a is None else np.array(a)
    copy = aligned(a.nbytes).view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def aligned(size: int) -> np.ndarray:
    """Return `size` bytes of memory, uint8, that a CPU can compute on directly."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def joined(parts: Iterable[Batch]) -> Batch:
    """Return the examples of several batches as one.

    Raises:
        ValueError: if their shapes differ.
    """
    first, *rest = parts
    try:
        return keras.tree.map_structure(_concatenated, first, *rest) if rest else first
    except ValueError as e:
        raise ValueError(different_shapes(str(e))) from e


def _concatenated(*arrays: Any) -> Any:
    return None if arrays[0] is None else np.concatenate(arrays)


def different_shapes(cause: str) -> str:
    """Return the message for batches of different shapes that would have to share a micro-batch."""
    return (
        "Batches of different shapes cannot be joined to a micro-batch. Pad all examples to one shape, or give batches "
        f"of exactly one micro-batch: `microbatch_size` examples for each replica of a host. {cause}"
    )


def _padded(batch: Batch, size: int) -> Batch:
    """Return `(x, y, weight)` with exactly `size` places; the weight of padding is 0."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    have = count_in(batch)
    weight = np.ones(have, np.float32) if weight is None else weight

    def fill(a: Any) -> Any:
        return a if a is None or have == size else np.concatenate([a, np.repeat(a[:1], size - have, axis=0)])

    def fill_weight(a: Any) -> Any:
        if a is None:
            return None
        return np.concatenate([a, np.zeros((size - have, *a.shape[1:]))]).astype(np.float32)

    x, y = keras.tree.map_structure(fill, (x, y))
    return x, y, keras.tree.map_structure(fill_weight, weight)
