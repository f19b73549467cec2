"""Parallel maps over the rows of tensors, made of TensorFlow operations only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


def map_rows(
    function: Callable[..., Any],
    arguments: tuple[tf.Tensor, ...],
    threads: int | None,
    fallback: Callable[..., Any] | None = None,
) -> Any:
    """Apply a function to each row of the arguments, and stack the results.

    Args:
        function: maps one row of each argument to a structure of tensors with static shapes.
        arguments: tensors whose first dimension is the same and static.
        threads: number of rows in flight; None lets tf.data decide.
        fallback: replaces `function` for the rows where it fails. If any row fails, all rows are mapped again, to find
            those rows.
    """
    import tensorflow as tf

    function = tf.function(function, autograph=False)  # traced once for both uses

    def row_or_fallback(*row: tf.Tensor) -> tf.data.Dataset:
        one = tf.data.Dataset.from_tensors(row)
        return one.map(function).ignore_errors().concatenate(one.map(fallback)).take(1)

    count = arguments[0].shape[0]
    rows = tf.data.Dataset.from_tensor_slices(arguments)
    parallel = rows.map(function, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
    mapped = parallel.batch(count, drop_remainder=True)
    if fallback:
        again = rows.interleave(
            row_or_fallback, threads, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True
        )
        mapped = mapped.ignore_errors().concatenate(again.batch(count, drop_remainder=True)).take(1)
    return mapped.get_single_element()
