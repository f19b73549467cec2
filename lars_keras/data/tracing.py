"""Functions of tensors that a process traces once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of tensors, so that all graphs that use it share one trace for each signature.

    Arguments other than tensors, arrays and bytes are part of the signature. AutoGraph converts nothing in it.
    """

    @functools.cache
    def traced() -> Callable[..., Any]:
        import tensorflow as tf

        return tf.function(function, autograph=False)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        import tensorflow as tf

        return traced()(*(tf.constant(a) if isinstance(a, bytes) else a for a in arguments))

    return call
