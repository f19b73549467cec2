"""Works on the rows of tensors in parallel, in TensorFlow operations only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_row(
    load: Callable[..., Any],
    arguments: tuple[tf.Tensor, ...],
    threads: int | None,
    instead: Callable[..., Any] | None = None,
) -> Any:
    """`load` of each row of `arguments`, stacked.

    Args:
        load: from a row of each argument to a structure of tensors of static shapes.
        arguments: tensors whose first dimension is the same and static.
        threads: how many rows at a time; `None`: tf.data decides.
        instead: takes the place of `load` for rows where that fails. All rows are then loaded once more, one by one,
            to see which these are.
    """
    import tensorflow as tf

    def row_or_instead(*row: tf.Tensor) -> tf.data.Dataset:
        one = tf.data.Dataset.from_tensors(row)
        return one.map(load).ignore_errors().concatenate(one.map(instead)).take(1)

    count = arguments[0].shape[0]
    rows = tf.data.Dataset.from_tensor_slices(arguments)
    parallel = rows.map(load, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
    loaded = parallel.batch(count, drop_remainder=True)
    if instead:
        one_by_one = rows.flat_map(row_or_instead).batch(count, drop_remainder=True)
        loaded = loaded.ignore_errors().concatenate(one_by_one).take(1)
    return loaded.get_single_element()
