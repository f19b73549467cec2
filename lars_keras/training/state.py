"""What both engines save, put back and swap: variables of a model and its optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from lars_keras import _keras_internals as keras_internals


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def shared_state(model: keras.Model) -> dict[str, keras.Variable]:
    """The variables that are the same on every replica, of a compiled model and its optimizer."""
    # By number: the paths have the names of model and optimizer, which count the models of a process.
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {f"{group}/{i}": v for group, variables in groups.items() for i, v in enumerate(variables)}


def restore_shared(model: keras.Model, state: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Puts back the values of `shared_state`.

    Args:
        model: compiled and built.
        state: a snapshot of either engine.

    Returns:
        The parts of the metrics that are in the snapshot, each with a first dimension for the replica.

    Raises:
        ValueError: if the model or optimizer has other variables; nothing is changed then.
    """
    shared = shared_state(model)
    known = {name: value for name, value in state.items() if not name.startswith("metric/")}
    for name, variable in shared.items():
        if name not in known or known[name].shape != tuple(variable.shape) or len(known) != len(shared):
            raise ValueError(
                f"The saved state is that of another model or optimizer: {len(known)} variables, not "
                f"{len(shared)}, or not of the shape of {variable.path}."
            )
    for name, variable in shared.items():
        value = known[name]
        if value.dtype.kind == "V":  # NumPy's files know no bfloat16; the bytes are there
            value = value.view(variable.dtype)
        variable.assign(value.astype(variable.dtype))
    return [state[f"metric/{i}"] for i in range(len(state) - len(known))]


@contextlib.contextmanager
def ema_weights(optimizer: keras.optimizers.Optimizer, copy_of: Callable[[keras.Variable], Any]) -> Iterator[None]:
    """Meanwhile the model has the moving average of its weights, where the optimizer keeps one.

    Args:
        optimizer: possibly a `LossScaleOptimizer`.
        copy_of: the value of a variable, which does not change with it.
    """
    optimizer = inner_optimizer(optimizer)
    if not optimizer.use_ema or optimizer.ema_overwrite_frequency:
        yield
        return
    variables = keras_internals.optimized_variables(optimizer)
    current = [copy_of(v) for v in variables]
    for variable, average in zip(variables, keras_internals.ema_variables(optimizer), strict=True):
        variable.assign(average)
    try:
        yield
    finally:
        for variable, value in zip(variables, current, strict=True):
            variable.assign(value)
