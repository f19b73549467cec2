"""Base class of LARS and LAMB: roles of the variables, the update as one program, exclusions that are saved."""

import abc
import contextlib
import contextvars
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from lars_keras._keras_internals import WholeUpdateOptimizer, is_overwritten, variable_index
from lars_keras.checks import as_number, check_number
from lars_keras.compiled import CompiledUpdate, being_traced, distributed
from lars_keras.exclude import (
    DEFAULT_EXCLUDE,
    Matches,
    VariableRole,
    check_patterns,
    match_patterns,
    plain,
    resolve_roles,
)
from lars_keras.trust_ratio import Tensor, l2_norm

MEASURES = ("weight_norm", "gradient_norm", "ratio", "rate")

CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")

EXCLUSIONS = ("exclude", "exclude_from_layer_adaptation", "exclude_from_weight_decay")

MAX_RAW_RATE = 5.0
"""The highest rate of biases without normalization of which `build` does not warn. See `raw_rate_warning`."""

_measured: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("measured", default=None)


@contextlib.contextmanager
def measuring() -> Iterator[list[Tensor]]:
    """Measure the updates that Keras itself applies: the results of `update` are added to the list."""
    measures: list[Tensor] = []
    token = _measured.set(measures)
    try:
        yield measures
    finally:
        _measured.reset(token)


class LayerwiseOptimizer(WholeUpdateOptimizer):
    """Base class of optimizers that scale the step of each variable by a ratio of norms over that variable.

    A subclass names its `slots`, names its `hyperparameters` with the check of each, and states its `rule`. The rule is
    called for one variable, in float32 (float64 for float64 variables) whatever the variable's dtype. Weights and slots
    are stored in the variable's dtype, except `float32_slots`.

    Args:
        learning_rate: the global rate, a number or a `LearningRateSchedule`.
        weight_decay: acts inside the rule; never the base class's decoupled decay. None is 0.
        exclude: see `LARS`.
        exclude_from_layer_adaptation: overrides `exclude` for layer-wise scaling; by default as `exclude`.
        exclude_from_weight_decay: overrides `exclude` for weight decay; by default as `exclude`.
        excluded_lr_scale: factor on the learning rate of variables that are not adapted.
        matches: what the patterns matched at the first build, as `get_config` returns it.
        **kwargs: arguments of `keras.optimizers.Optimizer`.
    """

    slots: tuple[str, ...]
    hyperparameters: dict[str, Callable[[str, Any], Any]]

    def __init__(
        self,
        learning_rate: Any,
        weight_decay: float | None,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        exclude_from_layer_adaptation: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        excluded_lr_scale: float = 1.0,
        matches: Matches | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate=_check_learning_rate(learning_rate),
            weight_decay=weight_decay,
            **kwargs,
        )
        if self.use_ema and self.ema_overwrite_frequency and self.gradient_accumulation_steps:
            raise ValueError(
                "`ema_overwrite_frequency` is not supported with `gradient_accumulation_steps`: Keras would overwrite "
                "the weights between the micro-batches of an update. Use `lars_keras.training.Trainer` with its "
                f"`microbatch_size`. Received: ema_overwrite_frequency={self.ema_overwrite_frequency}, "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        self._peak_rate = _peak_of(learning_rate)
        self.excluded_lr_scale = excluded_lr_scale
        overrides = {
            "exclude_from_layer_adaptation": exclude_from_layer_adaptation,
            "exclude_from_weight_decay": exclude_from_weight_decay,
        }
        self._patterns: dict[str, Any] = {"exclude": check_patterns("exclude", exclude)} | {
            name: None if given is None else check_patterns(name, given) for name, given in overrides.items()
        }
        self._matches = matches

    @property
    def exclude(self) -> tuple[str, ...]:
        """Return the patterns of `exclude`."""
        return tuple(self._patterns["exclude"])

    @property
    def exclude_from_layer_adaptation(self) -> tuple[str, ...] | None:
        """Return the patterns of `exclude_from_layer_adaptation`; None where `exclude` holds."""
        patterns = self._patterns["exclude_from_layer_adaptation"]
        return None if patterns is None else tuple(patterns)

    @abc.abstractmethod
    def rule(
        self, w: Tensor, g: Tensor, slots: Sequence[Tensor], lr: Tensor, t: Tensor, role: VariableRole
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Compute the update of one variable, as a pure function.

        Args:
            w: weights.
            g: gradient, of the shape of the weights.
            slots: slots of the same shape, in the order of the class's `slots`.
            lr: scalar, the global rate times the factor of the role.
            t: scalar, the number of this update, from 1.
            role: whether the variable is adapted and decayed, and the dtype to which new slots are `rounded`.

        Returns:
            The new weights, the new slots, and the ratio, a scalar.
        """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the slots of each variable and resolve the exclusions. Do nothing without variables.

        Raises:
            ValueError: if a pattern that the user gave matches no variable; if a variable is complex.
        """
        if self.built or not variables:  # Keras builds with none when it loads a legacy .h5 file
            return
        _check_dtypes(variables)
        patterns = [p for of_argument in self._patterns.values() for p in of_argument or ()]
        found, self._matches = match_patterns(variables, patterns, saved=self._matches)
        roles = resolve_roles(variables, found, **self._patterns)
        self._roles = [
            dataclasses.replace(role, adapt=False, decay=False, lr_scale=0.0) if is_overwritten(v) else role
            for role, v in zip(roles, variables, strict=True)
        ]
        super().build(variables)
        by_name = self.add_optimizer_variables(variables, self.slots)
        self._slots = [list(of_variable) for of_variable in zip(*by_name, strict=True)]
        self._program = CompiledUpdate(self._step)
        if warning := raw_rate_warning(self._roles, self._peak_rate, self.excluded_lr_scale):
            warnings.warn(warning, stacklevel=2)

    def layer_plan(self) -> list[VariableRole]:
        """Return a row per trainable variable: path, shape, dtype, whether adapted and decayed, learning rate factor.

        The factor is 0 for the scales and histories of float8 layers: Keras overwrites them, and no rule moves them.

        Raises:
            ValueError: before the optimizer is built.
        """
        if not self.built:
            raise ValueError("`layer_plan()` needs variables: call `build(model.trainable_variables)` first.")
        return [dataclasses.replace(role, lr_scale=self._lr_scale(role)) for role in self._roles]

    def update(
        self, gradients: Sequence[Tensor], variables: Sequence[Any], learning_rate: Tensor, measure: bool = False
    ) -> list[Tensor]:
        """Apply the rule to all `variables`, as one compiled program where possible.

        Args:
            gradients: gradients of each variable; under `tf.distribute` already summed over the replicas.
            variables: the optimizer's variables, or the backend variables behind them.
            learning_rate: scalar, the global rate.
            measure: return the values that `MEASURES` names.

        Returns:
            If measured, a float32 vector for each variable: norms of the weights before the update and of the gradient,
            trust ratio, and effective rate (the ratio times the rate of that variable). Else an empty list.
        """
        self._is_traced = being_traced(gradients) or getattr(self, "_is_traced", False)
        indices = [variable_index(self, v) for v in variables]
        return self._program(
            gradients,
            variables,
            [self._slots[i] for i in indices],
            [self._roles[i] for i in indices],
            [learning_rate, self.iterations + 1],
            measure,
            constants=tuple(getattr(self, name) for name in self._checks()),
        )

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Apply the rule to one variable and its slots, operation by operation."""
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
        w, g = ops.cast(variable, dtype), ops.cast(gradient, dtype)
        lr, t = (ops.cast(x, dtype) for x in scalars)
        lr = lr * self._lr_scale(role)
        new, new_slots, ratio = self.rule(w, g, [ops.cast(s, dtype) for s in slots], lr, t, role)
        # Norms that the rule takes as well cost nothing: the compiler finds them to be the same.
        measures = [l2_norm(w), l2_norm(g), ratio, lr * ratio] if measure else []
        for slot, value in zip(slots, new_slots, strict=True):
            self.assign(slot, ops.cast(value, slot.dtype))
        self.assign(variable, ops.cast(new, variable.dtype))
        return [ops.stack([ops.cast(x, "float32") for x in measures])] if measure else []

    def _lr_scale(self, role: VariableRole) -> float:
        return 1.0 if role.adapt else role.lr_scale * self.excluded_lr_scale

    def prepared(self, gradient: Tensor, variable: Any) -> Tensor:
        """Return a dense gradient of known shape.

        TensorFlow's gradient of an Embedding and JAX's BCOO are sparse; the gradient of a `tf.numpy_function` has no
        shape. Momentum and decay move every row anyway. Repeated rows are added up, because Keras's clipping would
        treat them as different rows. The sum is in float32 (or float64): in bfloat16 a sum of ones stays at 256.
        """
        of_jax = hasattr(gradient, "todense")
        if not of_jax and not hasattr(gradient, "dense_shape"):
            shape = getattr(gradient, "shape", None)
            is_known = getattr(shape, "is_fully_defined", None)  # of TensorFlow's shapes
            if is_known is not None and not is_known():
                return ops.reshape(gradient, variable.shape)
            if shape is not None and tuple(shape) != tuple(variable.shape):
                raise ValueError(
                    f"A gradient must have the shape of its variable. Received: a gradient of shape {tuple(shape)} "
                    f"for {getattr(variable, 'path', variable.name)} of shape {tuple(variable.shape)}"
                )
            return gradient
        dtype = keras.backend.standardize_dtype(gradient.dtype)
        wide = "float64" if dtype == "float64" else "float32"
        if of_jax:
            return ops.cast(gradient.astype(wide).todense(), dtype)
        return ops.cast(ops.add(ops.zeros(variable.shape, wide), ops.cast(gradient, wide)), dtype)

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
        """Refuse, because the base class's list is lost when the optimizer is saved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Give the exclusions to the constructor, which saves them: "
            f"{type(self).__name__}(exclude_from_weight_decay=[...]). "
            f"Received: var_list={var_list}, var_names={var_names}"
        )

    def _checks(self) -> dict[str, Callable[[str, Any], Any]]:
        return {"weight_decay": _check_weight_decay, "excluded_lr_scale": check_number, **self.hyperparameters}

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks().get(name)
        if name in EXCLUSIONS:  # without effect once built, and the last of them is a method
            raise AttributeError(f"Give `{name}` to the constructor. Received: {name}={value!r}")
        if name == "learning_rate":
            _check_new_learning_rate(value)
        value = check(name, value) if check else value
        is_compiled = check is not None or name in CLIPPING
        old = getattr(self, name, value) if is_compiled else value
        super().__setattr__(name, value)
        if name == "learning_rate":
            self._peak_rate = _peak_of(value)
        if is_compiled and old != value and getattr(self, "_is_traced", False):
            warnings.warn(
                f"A compiled training step has `{name}`={old!r} in it. Compile the model again, or it goes on with "
                f"that. Received: {name}={value!r}",
                stacklevel=2,
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {name: getattr(self, name) for name in self._checks()}
        config |= {name: None if p is None else list(p) for name, p in self._patterns.items()}
        return config if self._matches is None else config | {"matches": plain(self._matches)}


def raw_rate_warning(roles: Sequence[VariableRole], peak_rate: float, excluded_lr_scale: float) -> str | None:
    """Return a warning if biases of a network without normalization take a high rate; None if they do not.

    No trust ratio makes this rate smaller. Variables that are not adapted move by the global rate, which is meant for a
    trust coefficient of 1e-3. With normalization layers that trains well: the published recipes for ResNet-50 do so at
    rates of 10 to 25. Without normalization layers, a small convolutional network on digits stays at chance at peak
    rates of 8 and 14. It reaches 92 % at 4, and at 14 with a factor of 0.05.
    """
    raw_rate = peak_rate * excluded_lr_scale
    excluded = [role.path for role in roles if not role.adapt and role.lr_scale]
    if raw_rate <= MAX_RAW_RATE or not excluded or any(role.normalizes for role in roles):
        return None
    return (
        f"Variables that are not adapted take a learning rate of up to {raw_rate:g}, and the model has no "
        f"normalization layer: {', '.join(excluded[:3])}{', ...' if len(excluded) > 3 else ''}. Such models usually "
        f"diverge above {MAX_RAW_RATE:g}. Set `excluded_lr_scale=0.05`, for a rate of up to {0.05 * peak_rate:g}, or "
        f"adapt them by `exclude=()`. Received: excluded_lr_scale={excluded_lr_scale:g}"
    )


def _check_dtypes(variables: Sequence[Any]) -> None:
    for v in variables:
        if keras.backend.standardize_dtype(v.dtype).startswith("complex"):
            raise ValueError(
                "LARS and LAMB are for real variables: keep the real and the imaginary part in one each. Received: "
                f"{getattr(v, 'path', v.name)} of dtype {keras.backend.standardize_dtype(v.dtype)}"
            )


def _check_weight_decay(argument: str, value: Any) -> float:
    return 0.0 if value is None else check_number(argument, value)  # None is Keras's word for no decay


def _check_learning_rate(value: Any) -> Any:
    """Return a number as a float, on which the base class insists; schedules, callables and saved configs pass."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule | dict):
        return value
    if not callable(value):
        return check_number("learning_rate", value)
    with contextlib.suppress(ValueError):  # not every callable tells its parameters
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(value).parameters.values()
        if any(p.kind in kinds and p.default is p.empty for p in parameters):
            raise TypeError(
                "A callable `learning_rate` takes no argument. Make a function of the update a "
                f"`keras.optimizers.schedules.LearningRateSchedule`. Received: learning_rate={value!r}"
            )
    return value


def _check_new_learning_rate(value: Any) -> None:
    """Check a rate that is set later as the constructor does; a tensor that is being traced has no value to check."""
    number = as_number(value)
    if not ops.is_tensor(number) and not isinstance(number, keras.Variable):
        _check_learning_rate(number)


def _peak_of(learning_rate: Any) -> float:
    """Return the highest rate of a number, or of a schedule that tells it, else 0."""
    names = ("peak", "warmup_target", "initial_learning_rate")
    given = [as_number(learning_rate), *(getattr(learning_rate, name, None) for name in names)]
    steps = getattr(learning_rate, "values", ())  # of PiecewiseConstantDecay; a dict, a saved config, has a method
    given += steps if isinstance(steps, list | tuple) else ()
    return max((float(x) for x in given if isinstance(x, int | float)), default=0.0)
