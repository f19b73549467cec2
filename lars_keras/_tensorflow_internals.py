"""Private names of TensorFlow, each behind one function.

`tests/optimizers/test_internals.py` reports a name that a new version of TensorFlow has changed.
"""

from collections.abc import Sequence
from typing import Any


def optimization_barrier(tensors: Sequence[Any]) -> Sequence[Any]:
    """Return the same tensors, across which XLA neither merges nor moves operations."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return gen_xla_ops.xla_optimization_barrier(tensors)
