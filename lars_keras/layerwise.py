"""What LARS and LAMB share: roles of the variables, the update as one program, exclusions that survive saving."""

import abc
import contextlib
import contextvars
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from lars_keras._keras_internals import WholeUpdateOptimizer, variable_index
from lars_keras.compiled import CompiledUpdate, distributed
from lars_keras.exclude import DEFAULT_EXCLUDE, VariableRole, check_patterns, resolve_roles
from lars_keras.trust_ratio import Tensor, l2_norm

MEASURES = ("weight_norm", "gradient_norm", "ratio", "rate")

_measured: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("measured", default=None)


@contextlib.contextmanager
def measuring() -> Iterator[list[Tensor]]:
    """Meanwhile updates that Keras itself applies are measured, too; the list gets what `update` returns of them."""
    measures: list[Tensor] = []
    token = _measured.set(measures)
    try:
        yield measures
    finally:
        _measured.reset(token)


class LayerwiseOptimizer(WholeUpdateOptimizer):
    """Base of optimizers that scale the step in each variable by a ratio of norms over that variable.

    A subclass names its `slots` and states its `rule`; it is called for one variable, in float32 (float64 for float64
    variables) whatever the variable's dtype. What is stored has the variable's dtype.

    Args:
        learning_rate: the global rate, a number or a `LearningRateSchedule`.
        weight_decay: as the rule uses it; never the base class's decoupled decay.
        exclude, exclude_from_layer_adaptation, exclude_from_weight_decay, excluded_lr_scale: see `LARS`.
        **kwargs: arguments of `keras.optimizers.Optimizer`.
    """

    slots: tuple[str, ...]

    def __init__(
        self,
        learning_rate: Any,
        weight_decay: float,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        exclude_from_layer_adaptation: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        excluded_lr_scale: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate=_check_learning_rate(learning_rate),
            weight_decay=check_number("weight_decay", weight_decay),
            **kwargs,
        )
        self.excluded_lr_scale = check_number("excluded_lr_scale", excluded_lr_scale)
        self._patterns: dict[str, Any] = {
            "exclude": check_patterns("exclude", exclude) or (),
            "exclude_from_layer_adaptation": check_patterns(
                "exclude_from_layer_adaptation", exclude_from_layer_adaptation
            ),
            "exclude_from_weight_decay": check_patterns("exclude_from_weight_decay", exclude_from_weight_decay),
        }

    @abc.abstractmethod
    def rule(
        self, w: Tensor, g: Tensor, slots: Sequence[Tensor], lr: Tensor, t: Tensor, role: VariableRole
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """The update of one variable, a pure function.

        Args:
            w, g: weights and gradient, of the variable's shape.
            slots: of the same shape, in the order of the class's `slots`.
            lr: scalar, the global rate times the factor of the role.
            t: scalar, the number of this update, from 1.
            role: whether the variable is adapted and decayed, and the dtype to which new slots are `rounded`.

        Returns:
            The new weights, the new slots, and the ratio, a scalar.
        """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the slots of each variable and resolves the exclusions.

        Raises:
            ValueError: if a pattern given by the user matches no variable.
        """
        if self.built:
            return
        self._roles = resolve_roles(variables, **self._patterns, excluded_lr_scale=self.excluded_lr_scale)
        super().build(variables)
        by_name = self.add_optimizer_variables(variables, self.slots)
        self._slots = [list(of_variable) for of_variable in zip(*by_name, strict=True)]
        self._program = CompiledUpdate(self._step)

    def layer_plan(self) -> list[VariableRole]:
        """One row per trainable variable: path, shape, dtype, whether it is adapted and decayed, its rate's factor.

        Raises:
            ValueError: before the optimizer is built.
        """
        if not self.built:
            raise ValueError("`layer_plan()` needs variables: call `build(model.trainable_variables)` first.")
        return list(self._roles)

    def update(
        self, gradients: Sequence[Tensor], variables: Sequence[Any], learning_rate: Tensor, measure: bool = False
    ) -> list[Tensor]:
        """Applies the rule to all `variables`, as one compiled program where that can be.

        Args:
            gradients: of each variable; under `tf.distribute` already summed over the replicas.
            variables: the optimizer's, or the backend's own that belong to them.
            learning_rate: scalar, the global rate.
            measure: return what `MEASURES` names.

        Returns:
            If measured, of each variable a float32 vector: norms of the weights before the update and of the gradient,
            trust ratio, and effective rate, which is the ratio times the rate of that variable. Else an empty list.
        """
        indices = [variable_index(self, v) for v in variables]
        return self._program(
            gradients,
            variables,
            [self._slots[i] for i in indices],
            [self._roles[i] for i in indices],
            [learning_rate, self.iterations + 1],
            measure,
        )

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Applies the rule to one variable and its slots, operation by operation."""
        i = variable_index(self, variable)
        self._step(gradient, variable, self._slots[i], self._roles[i], [learning_rate, self.iterations + 1], False)

    def _step(
        self,
        gradient: Tensor,
        variable: Any,
        slots: Sequence[Any],
        role: VariableRole,
        scalars: Sequence[Tensor],
        measure: bool,
    ) -> list[Tensor]:
        dtype = "float64" if keras.backend.standardize_dtype(variable.dtype) == "float64" else "float32"
        w, g = ops.cast(variable, dtype), ops.cast(_dense(gradient, variable), dtype)
        lr, t = (ops.cast(x, dtype) for x in scalars)
        lr = lr * role.lr_scale
        new, new_slots, ratio = self.rule(w, g, [ops.cast(s, dtype) for s in slots], lr, t, role)
        # Norms that the rule takes as well cost nothing: the compiler finds them to be the same.
        measures = [l2_norm(w), l2_norm(g), ratio, lr * ratio] if measure else []
        for slot, value in zip(slots, new_slots, strict=True):
            self.assign(slot, ops.cast(value, slot.dtype))
        self.assign(variable, ops.cast(new, variable.dtype))
        return [ops.stack([ops.cast(x, "float32") for x in measures])] if measure else []

    # One program takes the place of a call of `update_step` for each variable. Under `tf.distribute`, Keras reduces the
    # gradients and comes back through `update_step`; `lars_keras.training` reduces them itself and calls `update`.
    def update_variables(self, gradients: Sequence[Tensor], variables: Sequence[Any], learning_rate: Tensor) -> None:
        if distributed():
            super().update_variables(gradients, variables, learning_rate)
        else:
            measures = _measured.get()
            found = self.update(gradients, variables, learning_rate, measure=measures is not None)
            if measures is not None:
                measures.extend(found)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Refused, because the base class's list is lost when the optimizer is saved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Give the exclusions to the constructor, which saves them: "
            f"{type(self).__name__}(exclude_from_weight_decay=[...]). "
            f"Received: var_list={var_list}, var_names={var_names}"
        )

    def get_config(self) -> dict[str, Any]:
        patterns = {name: None if p is None else list(p) for name, p in self._patterns.items()}
        return super().get_config() | {"excluded_lr_scale": self.excluded_lr_scale, **patterns}


def _dense(gradient: Tensor, variable: Any) -> Tensor:
    """A sparse gradient (of an Embedding) made dense: momentum and decay move every row anyway.

    The sum adds up repeated rows, which a conversion or a norm over the slices would not.
    """
    if hasattr(gradient, "dense_shape"):
        return ops.add(ops.zeros(variable.shape, gradient.dtype), gradient)
    return gradient


def check_number(argument: str, value: Any, below: float = float("inf")) -> float:
    """Returns `value` as a float.

    Raises:
        ValueError: if it is no number, is negative, or is not below `below`.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < below:
        bound = "" if below == float("inf") else f" and below {below:g}"
        raise ValueError(f"`{argument}` must be a number of at least 0{bound}. Received: {argument}={value!r}")
    return float(value)


def _check_learning_rate(value: Any) -> Any:
    """An int becomes a float, which the base class insists on; schedules, callables and saved configs pass."""
    if callable(value) or isinstance(value, dict):
        return value
    return check_number("learning_rate", value)
