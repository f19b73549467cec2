"""Feed arrays of examples to `Trainer`, in an order that is a function of seed and epoch."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from lars_keras.data.keyed import keys
from lars_keras.data.shuffle import permute
from lars_keras.training.inputs import Batch, arrays_of, count_in, sliced, spec_of


def is_array(x: Any) -> bool:
    """Return True for an array or tensor of any library, and for a table of pandas."""
    return (hasattr(x, "shape") and hasattr(x, "dtype")) or type(x).__name__ == "DataFrame"


def is_arrays(x: Any) -> bool:
    """Return True for an array of examples, a dictionary of them, or a list or tuple of them: several inputs."""
    if isinstance(x, Mapping):
        return bool(x) and all(map(is_array, keras.tree.flatten(dict(x))))
    return is_array(x) or (isinstance(x, list | tuple) and bool(x) and all(map(is_array, x)))


def checked_arrays(
    x: Any, y: Any = None, sample_weight: Any = None, class_weight: Mapping[int, float] | None = None
) -> Batch:
    """Return `(x, y, sample_weight)` as NumPy arrays, without None at the end.

    Raises:
        ValueError: if a value is not an array, or the numbers of examples differ.
    """
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        if part is not None and not is_arrays(part) and not all(map(_is_array_or_none, keras.tree.flatten(part))):
            raise ValueError(
                "If `y` or `sample_weight` is given, they and `x` must be arrays or structures of arrays; convert "
                "lists of numbers by `numpy.array`. Data of any other form must hold their own targets. Received: "
                f"{name} of type {type(part).__name__}"
            )
    if sample_weight is not None and class_weight is not None:
        raise ValueError("Give one of `sample_weight` and `class_weight`.")
    arrays = arrays_of((x, y, sample_weight))
    if class_weight is not None:
        arrays = (*arrays, weights_of_classes(arrays[1] if len(arrays) > 1 else None, class_weight))
    if count_in(arrays) == 0:
        raise ValueError("The arrays must have at least one example. Received: arrays of length 0")
    return arrays


def _is_array_or_none(x: Any) -> bool:
    return x is None or is_array(x)


def weights_of_classes(y: Any, class_weight: Mapping[int, float]) -> np.ndarray:
    """Return the weight of each example: the weight of its class, or 1 if the class has none.

    Args:
        y: classes, or one-hot rows; one array.
        class_weight: weight by class.

    Raises:
        ValueError: if `y` is not one array, or `class_weight` is not a dictionary.
    """
    if not isinstance(class_weight, Mapping):
        raise ValueError(f"`class_weight` must be a dictionary. Received: class_weight={class_weight!r:.100}")
    if y is None or keras.tree.is_nested(y):
        raise ValueError("`class_weight` needs targets of one output.")
    if y.ndim > 1:
        y = y.argmax(-1) if y.shape[-1] != 1 else y[..., 0]
    if y.ndim != 1:
        raise ValueError(f"`class_weight` needs a class for each example. Received: targets of rank {y.ndim + 1}")
    classes, places = np.unique(np.round(y).astype("int64"), return_inverse=True)
    return np.array([class_weight.get(int(c), 1.0) for c in classes], "float32")[places]


@dataclasses.dataclass(frozen=True)
class ArrayBatches:
    """Yields batches of arrays, in their order.

    Attributes:
        arrays: see `checked_arrays`.
        batch_size: examples in a batch; the last one may have fewer.
    """

    arrays: Batch
    batch_size: int

    @property
    def element_spec(self) -> Any:
        return spec_of(keras.tree.map_structure(_as_floatx, sliced(self.arrays, 0, 1)))

    @property
    def examples(self) -> int:
        """Number of examples."""
        return count_in(self.arrays)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.examples, self.batch_size):
            yield keras.tree.map_structure(_as_floatx, sliced(self.arrays, start, start + self.batch_size))


@dataclasses.dataclass(frozen=True)
class ArrayFeed:
    """Returns a host's batches of arrays for training, from any update on.

    Attributes:
        arrays: see `checked_arrays`.
        per_epoch: examples that an epoch uses.
        seed: seed of the order, which changes with each epoch; None for the arrays' own order.
        batch_size: global batch size.
        microbatch_size: examples that a replica takes through the model at once.
    """

    arrays: Batch
    per_epoch: int
    seed: int | None
    batch_size: int
    microbatch_size: int

    @property
    def element_spec(self) -> Any:
        return ArrayBatches(self.arrays, 1).element_spec

    @property
    def examples(self) -> int:
        """Number of examples."""
        return count_in(self.arrays)

    @property
    def order(self) -> list[Any]:
        """The values on which the order depends, for a checkpoint."""
        return [self.seed, self.examples, self.per_epoch]

    def first(self, count: int) -> "ArrayFeed":
        """Return the same feed with this many examples in an epoch."""
        return dataclasses.replace(self, per_epoch=count)

    def __call__(self, context: Any, first_update: int) -> Iterator[Batch]:
        for start, stop in _own_blocks(context, self.batch_size, self.microbatch_size, first_update):
            ids = self._ids(np.arange(start, stop, dtype=np.uint64))
            yield keras.tree.map_structure(lambda a, ids=ids: None if a is None else _as_floatx(a[ids]), self.arrays)

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, np.uint64(self.per_epoch))
        return places if self.seed is None else permute(places, keys(self.seed, epochs), self.examples)


def _own_blocks(context: Any, batch_size: int, microbatch_size: int, first_update: int) -> Iterator[tuple[int, int]]:
    """Yield the positions in the stream of examples where a host's part of each micro-batch begins and ends."""
    block = microbatch_size * context.num_replicas_in_sync
    own = block // context.num_input_pipelines
    for start in itertools.count(first_update * batch_size + context.input_pipeline_id * own, block):
        yield start, start + own


def _as_floatx(a: Any) -> Any:
    """Return an array as Keras gives it to a model: other floating-point types become `floatx`."""
    if a is None or a.dtype.kind in "biuSUO" or not keras.backend.is_float_dtype(a.dtype.name):
        return a
    return a.astype(keras.config.floatx(), copy=False)
