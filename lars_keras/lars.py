"""Layer-wise adaptive rate scaling (LARS)."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lars_keras.roles import DEFAULT_EXCLUDE, VariableRole, check_patterns, resolve_roles
from lars_keras.trust import Tensor, l2_norm, trust_ratio

VARIANTS = ("paper", "norm_of_sum", "lr_outside_momentum", "ratio_on_momentum")


@keras.saving.register_keras_serializable(package="lars_keras")
class LARS(keras.optimizers.Optimizer):
    """SGD with momentum whose step in each variable is scaled by that variable's own trust ratio.

    With weights `w`, gradient `g`, weight decay `b`, `d = g + b w`, momentum `m` and L2 norms over one variable:

    - `"paper"`: `v = m v + lr * eta ||w|| / (||g|| + b ||w|| + epsilon) * d`, then `w -= v`.
      You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1; also the TPU and MLPerf reference code.
    - `"norm_of_sum"`: the same with `||d||` as denominator. optax, tensorflow/models, SimCLR.
    - `"lr_outside_momentum"`: `v = m v + eta ||w|| / (||g|| + b ||w|| + epsilon) * d`, then `w -= lr * v`.
      apex LARC, torchlars, timm. It differs from `"paper"` while the learning rate changes.
    - `"ratio_on_momentum"`: `v = m v + d`, then `w -= lr * eta ||w|| / (||v|| + epsilon) * v`.

    The ratio is 1 where `||w||` is 0, or where the norm of the gradient in the rule is 0. Arithmetic and norms are
    float32 whatever the variable's dtype (float64 for float64 variables); what is stored has the variable's dtype.

    Args:
        learning_rate: the global rate, a number or a `LearningRateSchedule`. Rates of LARS recipes are large (2 to
            40) because the ratio holds the small factor.
        momentum: `m`, in [0, 1).
        nesterov: look ahead along the momentum. Not defined for `"ratio_on_momentum"`.
        weight_decay: `b`. It acts inside the rule only, never as the base class's decoupled decay; 0 does not
            switch adaptation off.
        trust_coefficient: `eta`.
        epsilon: added to the denominator of the ratio.
        variant: which of the rules above.
        trust_clip: apply `min(ratio, lr)` in place of `lr * ratio` (the clip of LARC), so that the
            learning rate is a ceiling. Choose a larger `trust_coefficient` with it (LARC: 0.02).
        exclude: regular expressions searched in `keras.Variable.path`; matching variables are neither adapted nor
            decayed. The default is `lars_keras.DEFAULT_EXCLUDE`, which matches bias and normalisation variables and
            everything of rank 0 or 1. `()` excludes nothing, as the paper does.
        exclude_from_layer_adaptation: takes the place of `exclude` for the adaptation.
        exclude_from_weight_decay: takes the place of `exclude` for the decay.
        excluded_lr_scale: factor on the learning rate of variables that are not adapted: they take the raw
            global rate, which is meant for ratios of about 1e-3.
        **kwargs: arguments of `keras.optimizers.Optimizer` (`name`, `clipnorm`, `global_clipnorm`, `use_ema`, ...).

    Raises:
        ValueError: for an argument out of range; at `build` for an exclusion pattern that matches no variable.
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 1e-3,
        epsilon: float = 0.0,
        variant: str = "paper",
        trust_clip: bool = False,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        exclude_from_layer_adaptation: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        excluded_lr_scale: float = 1.0,
        name: str = "lars",
        **kwargs: Any,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {VARIANTS}. Received: variant={variant!r}")
        if nesterov and variant == "ratio_on_momentum":
            raise ValueError(
                'Nesterov momentum is not defined for variant="ratio_on_momentum". Received: nesterov=True'
            )
        super().__init__(
            learning_rate=_check_learning_rate(learning_rate),
            weight_decay=_check_number("weight_decay", weight_decay),
            name=name,
            **kwargs,
        )
        self.momentum = _check_number("momentum", momentum, below=1.0)
        self.nesterov = bool(nesterov)
        self.trust_coefficient = _check_number("trust_coefficient", trust_coefficient)
        if self.trust_coefficient == 0.0:
            raise ValueError("`trust_coefficient` must be above 0. Received: trust_coefficient=0.0")
        self.epsilon = _check_number("epsilon", epsilon)
        self.variant = variant
        self.trust_clip = bool(trust_clip)
        self.excluded_lr_scale = _check_number("excluded_lr_scale", excluded_lr_scale)
        self._patterns: dict[str, Any] = {
            "exclude": check_patterns("exclude", exclude) or (),
            "exclude_from_layer_adaptation": check_patterns(
                "exclude_from_layer_adaptation", exclude_from_layer_adaptation
            ),
            "exclude_from_weight_decay": check_patterns("exclude_from_weight_decay", exclude_from_weight_decay),
        }

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates one momentum slot per variable and resolves the exclusions.

        Raises:
            ValueError: if a pattern given by the user matches no variable.
        """
        if self.built:
            return
        self._roles = resolve_roles(variables, **self._patterns, excluded_lr_scale=self.excluded_lr_scale)
        super().build(variables)
        self._momentums = self.add_optimizer_variables(variables, "momentum")

    def layer_plan(self) -> list[VariableRole]:
        """One row per trainable variable: path, shape, whether it is adapted and decayed, its rate's factor.

        Raises:
            ValueError: before the optimizer is built.
        """
        if not self.built:
            raise ValueError("`layer_plan()` needs variables: call `build(model.trainable_variables)` first.")
        return list(self._roles)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Applies the rule to one variable and its momentum slot."""
        index = self._get_variable_index(variable)
        slot = self._momentums[index]
        dtype = "float64" if keras.backend.standardize_dtype(variable.dtype) == "float64" else "float32"
        w, v = self._rule(
            ops.cast(variable, dtype),
            ops.cast(_dense(gradient, variable), dtype),
            ops.cast(slot, dtype),
            ops.cast(learning_rate, dtype),
            self._roles[index],
        )
        self.assign(slot, ops.cast(v, slot.dtype))
        self.assign(variable, ops.cast(w, variable.dtype))

    def _rule(self, w: Tensor, g: Tensor, v: Tensor, lr: Tensor, role: VariableRole) -> tuple[Tensor, Tensor]:
        """The new weights and momentum of one variable."""
        m = self.momentum
        b = self.weight_decay if role.decay else 0.0
        d = g + b * w
        lr = lr * role.lr_scale

        if self.variant == "ratio_on_momentum":
            v = m * v + d
            return w - self._rate(lr, w, v, 0.0, role) * v, v

        if self.variant == "norm_of_sum":
            rate = self._rate(lr, w, d, 0.0, role)
        else:
            rate = self._rate(lr, w, g, b, role)

        if self.variant == "lr_outside_momentum":
            step = rate * d
            v = m * v + step
            return w - lr * (m * v + step if self.nesterov else v), v

        step = rate * d
        v = m * v + step
        return w - (m * v + step if self.nesterov else v), v

    def _rate(self, lr: Tensor, w: Tensor, x: Tensor, b: float, role: VariableRole) -> Tensor:
        """The scalar in front of the step; `"lr_outside_momentum"` multiplies by `lr` later."""
        outside = self.variant == "lr_outside_momentum"
        if not role.adapt:
            return ops.ones_like(lr) if outside else lr
        w_norm = l2_norm(w)
        ratio = trust_ratio(w_norm, l2_norm(x), self.trust_coefficient, self.epsilon, b * w_norm)
        if self.trust_clip:
            # ratio / 0 would be right as well (the clip holds), but only where infinities are allowed.
            return ops.minimum(ratio / ops.maximum(lr, 1e-30), 1.0) if outside else ops.minimum(ratio, lr)
        return ratio if outside else lr * ratio

    # The base class would subtract `lr * b * w` outside the ratio.
    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        pass

    def _use_weight_decay(self, variable: Any) -> bool:
        return False

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
        config = super().get_config()
        config.update(
            {
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "trust_coefficient": self.trust_coefficient,
                "epsilon": self.epsilon,
                "variant": self.variant,
                "trust_clip": self.trust_clip,
                "excluded_lr_scale": self.excluded_lr_scale,
                **{k: None if p is None else list(p) for k, p in self._patterns.items()},
            }
        )
        return config


def _dense(gradient: Tensor, variable: Any) -> Tensor:
    """A sparse gradient (of an Embedding) made dense: momentum and decay move every row anyway.

    The sum adds up repeated rows, which a conversion or a norm over the slices would not.
    """
    if hasattr(gradient, "dense_shape"):
        return ops.add(ops.zeros(variable.shape, gradient.dtype), gradient)
    return gradient


def _check_number(argument: str, value: Any, below: float = float("inf")) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < below:
        bound = "" if below == float("inf") else f" and below {below:g}"
        raise ValueError(f"`{argument}` must be a number of at least 0{bound}. Received: {argument}={value!r}")
    return float(value)


def _check_learning_rate(value: Any) -> Any:
    """An int becomes a float, which the base class insists on; schedules, callables and saved configs pass."""
    if callable(value) or isinstance(value, dict):
        return value
    return _check_number("learning_rate", value)
