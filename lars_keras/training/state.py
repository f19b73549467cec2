"""Save, restore and swap the state that both engines share: the variables of a model and its optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from absl import logging

from lars_keras import _keras_internals as keras_internals


def sum_dtype(dtype: str) -> str:
    """Return the dtype in which values of a dtype are summed: float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


def variables_by_name(model: keras.Model) -> dict[str, keras.Variable]:
    """Return the variables of a compiled model and its optimizer: the state that all replicas share."""
    # By number: the paths have the names of model and optimizer, which count the models of a process.
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {f"{group}/{i}": v for group, variables in groups.items() for i, v in enumerate(variables)}


def identity_of(model: keras.Model) -> dict[str, Any]:
    """Return the identity of a compiled, built model and its optimizer, which tells apart models of the same shapes.

    Returns:
        "optimizer": the class; "model" and "metrics": the path of each variable. Keras numbers the layers of a process.
        A number at the end of a name is therefore replaced by its rank among the layers of that name. Metrics lose it.
    """
    kind = type(keras_internals.inner_optimizer(model.optimizer)).__name__
    paths = [v.path.removeprefix(f"{model.name}/") for v in model.variables]
    metrics = [f"{_given_name(m)}/{v.name}" for m in keras_internals.single_metrics(model) for v in m.variables]
    return {"optimizer": kind, "model": _ranked(paths), "metrics": metrics}


def _given_name(metric: keras.metrics.Metric) -> str:
    """Return the name of a metric, without the number that Keras adds to the name of a class."""
    base, kind = _numbered(metric.name)[0], type(metric).__name__.lower()
    return base if base.replace("_", "") == kind else metric.name


def _ranked(names: list[str]) -> list[str]:
    paths = [name.split("/") for name in names]
    numbers: dict[str, set[int]] = {}
    for name in (name for path in paths for name in path):
        base, number = _numbered(name)
        numbers.setdefault(base, set()).add(number)

    def ranked(name: str) -> str:
        base, number = _numbered(name)
        rank = sorted(numbers[base]).index(number)
        return f"{base}_{rank}" if rank else base

    return ["/".join(map(ranked, path)) for path in paths]


def _numbered(name: str) -> tuple[str, int]:
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, -1)


def check_identity(model: keras.Model, saved: Mapping[str, Any] | None) -> None:
    """Refuse the state of another model or optimizer.

    Args:
        model: compiled and built.
        saved: from `identity_of`; None if an earlier version wrote the state.

    Raises:
        ValueError: if the class or a path differs.
    """
    if saved is None:
        return
    own = identity_of(model)
    if saved["optimizer"] != own["optimizer"]:
        raise ValueError(
            "The saved state belongs to another model or optimizer: the optimizer is of class "
            f"{saved['optimizer']}, not {own['optimizer']}."
        )
    for there, here in zip(saved["model"], own["model"], strict=False):
        if there != here:
            raise ValueError(
                f"The saved state belongs to another model or optimizer: it has the variable {there} where the model "
                f"has {here}."
            )


def without_other_metrics(
    model: keras.Model, state: Mapping[str, np.ndarray], saved: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """Return a snapshot without its metrics, if those of the model are others.

    Args:
        model: compiled and built.
        state: the snapshot.
        saved: from `identity_of`; None if an earlier version wrote the state.
    """
    own = identity_of(model)["metrics"]
    same = (saved or {}).get("metrics", own) == own
    return {name: value for name, value in state.items() if same or not name.startswith("metric/")}


def restore_variables(
    model: keras.Model,
    state: Mapping[str, np.ndarray],
    assign: Callable[[keras.Variable, np.ndarray], Any] = lambda variable, value: variable.assign(value),
) -> list[np.ndarray] | None:
    """Restore the values of `variables_by_name`.

    Args:
        model: compiled and built.
        state: a snapshot of either engine.
        assign: sets a variable to a value of its dtype.

    Returns:
        The values of the model's metrics in the snapshot, each with a first dimension for the replica. None, with a
        warning, if the model has other metrics: then they are reset.

    Raises:
        ValueError: if the model or optimizer has other variables; nothing is changed then.
    """
    variables = variables_by_name(model)
    saved = {name: value for name, value in state.items() if not name.startswith("metric/")}
    if saved.keys() != variables.keys():
        counts = [
            f"{len(names)} ({sum(n.startswith('model/') for n in names)} of the model)" for names in (saved, variables)
        ]
        raise ValueError(
            f"The saved state belongs to another model or optimizer: it has {counts[0]} variables, not {counts[1]}."
        )
    for name, variable in variables.items():
        there, here = saved[name].shape, tuple(variable.shape)
        if there != here:
            raise ValueError(
                f"The saved state belongs to another model or optimizer: it has {variable.path} in the shape {there}, "
                f"and the model has it in the shape {here}."
            )
    for name, variable in variables.items():
        value = saved[name]
        if value.dtype.kind == "V":  # NumPy's files know no bfloat16; the bytes are there
            value = value.view(variable.dtype)
        assign(variable, value.astype(variable.dtype))
    metrics = [state[f"metric/{i}"] for i in range(len(state) - len(saved))]
    if [v.shape[1:] for v in metrics] != [tuple(v.shape) for metric in model.metrics for v in metric.variables]:
        logging.warning("The saved run had other metrics. Those of the model begin anew within the epoch.")
        model.reset_metrics()
        return None
    return metrics


@contextlib.contextmanager
def kept_random_state(model: keras.Model) -> Iterator[None]:
    """Set the seed generators of a model back at the end of the context.

    The number of draws in a validation depends on the number of replicas, and the training must not.
    """
    seeds = [v for v in model.non_trainable_variables if keras_internals.is_seed_state(v)]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in seeds]
    try:
        yield
    finally:
        for variable, value in zip(seeds, before, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def kept_rate(model: keras.Model) -> Iterator[None]:
    """Leave the optimizer's learning rate as it was. A schedule stays anyway."""
    rate = keras_internals.learning_rate_of(keras_internals.inner_optimizer(model.optimizer))
    if not isinstance(rate, keras.Variable):
        yield
        return
    before = keras.ops.convert_to_numpy(rate).copy()
    yield
    rate.assign(before)


def finalize(model: keras.Model) -> None:
    """Give a model the EMA of its weights at the end of a training, as Keras does, if the optimizer keeps it.

    Before the first update there is no EMA: Keras's averages start at 0. If an optimizer overrides Keras's method for
    the end of a training, for example to keep its own average, that method is called.
    """
    optimizer = keras_internals.inner_optimizer(model.optimizer)
    if type(optimizer).finalize_variable_values is not keras.optimizers.Optimizer.finalize_variable_values:
        optimizer.finalize_variable_values(model.trainable_variables)
        return
    if not optimizer.use_ema or not _has_updated(optimizer):
        return
    pairs = zip(keras_internals.optimized_variables(optimizer), keras_internals.ema_variables(optimizer), strict=True)
    for variable, average in pairs:
        if average is not None:  # the scales of float8 layers have none
            variable.assign(keras.ops.copy(average))  # or both would share memory on JAX, which `fit` donates twice


def _has_updated(optimizer: keras.optimizers.Optimizer) -> bool:
    return bool(keras.ops.convert_to_numpy(optimizer.iterations) > 0)


class EmaWeights:
    """Context in which the model has the EMA of its weights, if the optimizer keeps it.

    Weights that are set within the context stay.

    Args:
        optimizer: possibly a `LossScaleOptimizer`.
        copy_of: returns the value of a variable, which does not change with it.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, copy_of: Callable[[keras.Variable], Any]):
        self._optimizer, self._copy_of = keras_internals.inner_optimizer(optimizer), copy_of
        self._swapped: list[tuple[keras.Variable, Any, Any, keras.Variable]] = []

    @property
    def in_force(self) -> bool:
        """True if the model has EMA weights by this context."""
        return bool(self._swapped)

    def __enter__(self) -> "EmaWeights":
        optimizer = self._optimizer
        if optimizer.use_ema and _has_updated(optimizer):
            variables = keras_internals.optimized_variables(optimizer)
            for variable, average in zip(variables, keras_internals.ema_variables(optimizer), strict=True):
                if average is None:
                    continue
                current = self._copy_of(variable)
                # A copy: on JAX `model.evaluate`, called by a callback, donates the arrays of the weights.
                variable.assign(keras.ops.copy(average))
                self._swapped.append((variable, current, self._copy_of(variable), average))
        return self

    def __exit__(self, *error: Any) -> None:
        for variable, current, placed, average in self._swapped:
            now = self._copy_of(variable)
            if now is placed or bool(keras.ops.all(keras.ops.equal(now, average))):
                variable.assign(current)
        self._swapped = []

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Temporarily swap the weights back, if the context is in force."""
        if not self._swapped:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
