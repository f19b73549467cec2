"""Convert every form of data that `model.fit` takes to the data of `Trainer`.

Keras's own adapters are not used. They begin with the first example and shuffle by a global random state, but a resumed
run must find the examples of any update by its number.
"""

import os
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from lars_keras.checks import check_count
from lars_keras.training.array_data import ArrayBatches, ArrayFeed, checked_arrays, is_array, is_arrays
from lars_keras.training.batch_data import (
    GeneratorFeed,
    Indexed,
    IndexedFeed,
    PyDatasetBatches,
    Reread,
    SizedBatches,
    TorchBatches,
    feed_of_pydataset,
    warn_of_processes,
)
from lars_keras.training.function_data import FunctionData, check_called
from lars_keras.training.inputs import Data, count_in, is_dataset

_ENDLESS = 2**40  # Grain gives `sys.maxsize` as the length of repeated data, and a batch size divides it


def training_data(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    *,
    batch_size: int,
    microbatch_size: int,
    hosts: int = 1,
    shuffle: bool = True,
    seed: int = 0,
) -> Data:
    """Return the data of `Trainer.fit` in the form that engines take for training.

    Args:
        x: as for `Trainer.fit`; so are `y`, `sample_weight`, `class_weight`, `shuffle` and `seed`.
        y: targets.
        sample_weight: weights.
        class_weight: weight of each class.
        batch_size: global batch size.
        microbatch_size: examples that a replica takes through the model at once.
        hosts: number of hosts.
        shuffle: order examples, or the batches of a `keras.utils.PyDataset`, anew in each epoch.
        seed: seed of that order.

    Raises:
        ValueError: if an argument does not work with the form of `x`, or `x` has none of the known forms.
    """
    seed = check_count("seed", seed)
    order = seed if shuffle else None
    if y is not None or is_arrays(x):
        arrays = checked_arrays(x, y, sample_weight, class_weight)
        return ArrayFeed(arrays, count_in(arrays), order, batch_size, microbatch_size)
    _refuse_targets(x, sample_weight=sample_weight)
    if isinstance(x, keras.utils.PyDataset):
        return feed_of_pydataset(x, class_weight, order, batch_size, microbatch_size)
    if is_dataset(x) and class_weight is not None:
        from lars_keras.training.tensorflow.inputs import weighted_by_class

        return weighted_by_class(x, class_weight)
    _refuse_targets(x, class_weight=class_weight)
    if is_dataset(x):
        return x
    if _is_function(x):
        check_called(x, "Call it: `fit({})`", None, 0)
        return _of_function(x)
    if is_grain(x) and hasattr(x, "__getitem__"):
        count = len(x) if len(x) < _ENDLESS else None
        threads = min(8, os.cpu_count() or 1)  # each reads batches ahead
        return IndexedFeed(Indexed(x, count, "Grain"), None, batch_size, microbatch_size, workers=threads)
    if isinstance(x, types.GeneratorType):
        _refuse_hosts(x, hosts)
        return GeneratorFeed(x, batch_size)
    return scoring_data(x, hosts=hosts)


def scoring_data(
    x: Any, y: Any = None, sample_weight: Any = None, *, batch_size: int = 1, hosts: int = 1, once: bool = False
) -> Data:
    """Return the data of `Trainer.evaluate` in the form that engines take for evaluation.

    Args:
        x: as for `Trainer.evaluate`; so are `y` and `sample_weight`.
        y: targets.
        sample_weight: weights.
        batch_size: examples in a batch that is cut from arrays.
        hosts: number of hosts.
        once: True if the data will be read only once, so that a generator is accepted.

    Raises:
        ValueError: as `training_data` does; also for endless data.
    """
    if y is not None or is_arrays(x):
        return ArrayBatches(checked_arrays(x, y, sample_weight), batch_size)
    _refuse_targets(x, sample_weight=sample_weight)
    if is_dataset(x):
        refuse_endless(int(x.cardinality()) == -1)
        return x
    if isinstance(x, keras.utils.PyDataset):
        refuse_endless(x.num_batches is None)
        warn_of_processes(x)
        return PyDatasetBatches(x)
    if is_torch_loader(x):
        _refuse_hosts(x, hosts)
        return TorchBatches(x)
    if is_grain(x):
        refuse_endless(hasattr(x, "__getitem__") and len(x) >= _ENDLESS)
        return Reread(x)
    if isinstance(x, types.GeneratorType) and once:
        _refuse_hosts(x, hosts)
        return FunctionData(lambda context: x, given=x)
    if isinstance(x, Iterator) or not (isinstance(x, Iterable) or callable(x)) or isinstance(x, str | bytes | type):
        raise ValueError(
            "The data must be arrays, a tf.data.Dataset, a keras.utils.PyDataset, a torch or Grain loader, an iterable "
            "of batches that can be read again and again, or a function that returns one; for training, and once for "
            f"`evaluate`, also a generator. Received: {x!r:.100} of type {type(x).__name__}"
        )
    if callable(x):
        check_called(x, "Call it: `evaluate({})`" if once else "Give a list of its batches: `list({})`", None)
        return _of_function(x)
    if isinstance(x, list | tuple):
        return x
    return SizedBatches(x) if hasattr(x, "__len__") else Reread(x)


def validation_data_of(data: Any, *, batch_size: int, hosts: int = 1) -> Data:
    """Return `scoring_data` of the argument `validation_data`, which may be `(x, y)` or `(x, y, sample_weight)`."""
    separate = isinstance(data, tuple) or (isinstance(data, list) and any(map(is_array, data)))
    parts = data if separate else (data,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "`validation_data` must be `(x, y)`, `(x, y, sample_weight)`, or data as for `evaluate`. Received: "
            f"{type(data).__name__} of length {len(parts)}"
        )
    return scoring_data(*parts, batch_size=batch_size, hosts=hosts)


def refuse_endless(endless: bool) -> None:
    """Raise ValueError if data for an evaluation are known to have no end."""
    if endless:
        raise ValueError(
            "The data of an evaluation must be finite, and these have no end. Leave out `repeat()`, or keep the first "
            "batches with `take(count)`."
        )


# -- forms ---------------------------------------------------------------------------------------


def is_torch_loader(x: Any) -> bool:
    """Return True for a `torch.utils.data.DataLoader`; does not import torch."""
    return _has_base(x, ("DataLoader",), "torch.utils.data")


def is_grain(x: Any) -> bool:
    """Return True for a Grain dataset or loader; does not import Grain."""
    return _has_base(x, ("MapDataset", "IterDataset", "DataLoader"), "grain")


def _has_base(x: Any, names: tuple[str, ...], module: str) -> bool:
    return any(base.__name__ in names and module in str(base.__module__) for base in type(x).__mro__)


def _is_function(x: Any) -> bool:
    return callable(x) and not isinstance(x, type)


def _of_function(x: Any) -> Data:
    return x if hasattr(x, "element_spec") or isinstance(x, FunctionData) else FunctionData(x)


def _refuse_targets(x: Any, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` needs arrays{', a PyDataset or tf.data' * (name == 'class_weight')}. Other data hold "
                f"weights in their batches, `(x, y, sample_weight)`. Received: `{name}` and x of type "
                f"{type(x).__name__}"
            )


def _refuse_hosts(x: Any, hosts: int) -> None:
    if hosts > 1:
        raise ValueError(
            f"Each of the {hosts} hosts would read a {type(x).__name__} in an order of its own. Give a function of "
            "`InputContext` that returns the batches of one host's own examples."
        )
