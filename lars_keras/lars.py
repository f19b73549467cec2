"""Layer-wise adaptive rate scaling (LARS)."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lars_keras.checks import check_flag, check_number
from lars_keras.compiled import rounded
from lars_keras.exclude import DEFAULT_EXCLUDE, VariableRole
from lars_keras.layerwise import LayerwiseOptimizer
from lars_keras.trust_ratio import Tensor, l2_norm, trust_ratio

VARIANTS = ("paper", "norm_of_sum", "lr_outside_momentum", "ratio_on_momentum")


def _check_variant(argument: str, value: Any) -> str:
    if value not in VARIANTS:
        raise ValueError(f"`{argument}` must be one of {VARIANTS}. Received: {argument}={value!r}")
    return value


@keras.saving.register_keras_serializable(package="lars_keras")
class LARS(LayerwiseOptimizer):
    """SGD with momentum that scales the step of each variable by the variable's own trust ratio.

    With weights `w`, gradient `g`, weight decay `b`, `d = g + b w`, momentum `m` and L2 norms over one variable:

    - `"paper"`: `v = m v + lr * eta ||w|| / (||g|| + b ||w|| + epsilon) * d`, then `w -= v`.
      You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1; also the TPU and MLPerf reference code.
    - `"norm_of_sum"`: the same with `||d||` as denominator. optax; tensorflow/models and SimCLR by default.
    - `"lr_outside_momentum"`: `v = m v + eta ||w|| / (||g|| + b ||w|| + epsilon) * d`, then `w -= lr * v`.
      apex LARC, torchlars, timm. It differs from `"paper"` while the learning rate changes.
    - `"ratio_on_momentum"`: `v = m v + d`, then `w -= lr * eta ||w|| / (||v|| + epsilon) * v`.
      tensorflow/models and SimCLR with `classic_momentum=False`.

    The ratio is 1 where `||w||` is 0, or where the norm of the gradient in the rule is 0. Arithmetic and norms are
    float32 whatever the variable's dtype (float64 for float64 variables). The momentum is stored in the variable's
    dtype, and the weights move by the momentum as it is stored.

    Args:
        learning_rate: the global rate, a number or a `LearningRateSchedule`. Most LARS recipes have a large rate (2 to
            59), because `trust_coefficient` makes the steps small.
        momentum: `m`, in [0, 1).
        nesterov: look ahead along the momentum. Not supported for `"ratio_on_momentum"`.
        weight_decay: `b`; None is 0. It acts inside the rule only, never as the base class's decoupled decay. Without
            weight decay the variables are still adapted.
        trust_coefficient: `eta`. The ratio is `eta ||w|| / ||g||` without weight decay.
        epsilon: added to the denominator of the ratio.
        variant: one of the rules above.
        trust_clip: apply `min(ratio, lr)` in place of `lr * ratio` (the clip of LARC), so that the
            learning rate is a ceiling. Choose a larger `trust_coefficient` with it (LARC: 0.02).
        exclude: regular expressions searched in `keras.Variable.path`; matching variables are neither adapted nor
            decayed. The default is `lars_keras.DEFAULT_EXCLUDE`, which matches bias and normalization variables and
            everything of rank 0 or 1. `()` excludes nothing, as the paper does.
        exclude_from_layer_adaptation: overrides `exclude` for layer-wise scaling; by default as `exclude`.
        exclude_from_weight_decay: overrides `exclude` for weight decay; by default as `exclude`.
        excluded_lr_scale: factor on the learning rate of variables that are not adapted. At 1 they take the raw global
            rate, as in the published recipes for ResNet-50, whose convolutions have batch normalization. Biases of
            networks without normalization need 0.05 or lower; `build` warns of a high rate there.
        name: name of the optimizer, `lars`, `lars_1`, ... by default.
        **kwargs: arguments of `keras.optimizers.Optimizer` (`clipnorm`, `global_clipnorm`, `use_ema`, ...).

    Raises:
        ValueError: for an argument out of range; at `build` for an exclusion pattern that matches no variable.
    """

    slots = ("momentum",)
    hyperparameters = {
        "momentum": functools.partial(check_number, below=1.0),
        "nesterov": check_flag,
        "trust_coefficient": functools.partial(check_number, above=0.0),
        "epsilon": check_number,
        "variant": _check_variant,
        "trust_clip": check_flag,
    }

    def __init__(
        self,
        learning_rate: Any = 1.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float | None = 5e-4,
        trust_coefficient: float = 1e-3,
        epsilon: float = 0.0,
        variant: str = "paper",
        trust_clip: bool = False,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        exclude_from_layer_adaptation: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        excluded_lr_scale: float = 1.0,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            weight_decay,
            exclude,
            exclude_from_layer_adaptation,
            exclude_from_weight_decay,
            excluded_lr_scale,
            name=name,
            **kwargs,
        )
        self.momentum = momentum
        self.nesterov = nesterov
        self.trust_coefficient = trust_coefficient
        self.epsilon = epsilon
        self.variant = variant
        self.trust_clip = trust_clip
        self._check_nesterov()

    def rule(
        self, w: Tensor, g: Tensor, slots: Sequence[Tensor], lr: Tensor, t: Tensor, role: VariableRole
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Return the new weights and momentum of one variable, and its trust ratio."""
        m, (v,) = self.momentum, slots
        b = self.weight_decay if role.decay else 0.0
        d = g + b * w

        if self.variant == "ratio_on_momentum":
            self._check_nesterov()  # either may have been set since
            v = rounded(m * v + d, role.dtype)
            ratio = self._ratio(w, v, 0.0, lr, role)
            return w - lr * ratio * v, (v,), ratio

        if self.variant == "norm_of_sum":
            ratio = self._ratio(w, d, 0.0, lr, role)
        else:
            ratio = self._ratio(w, g, b, lr, role)

        if self.variant == "lr_outside_momentum":
            step = ratio * d
            v = rounded(m * v + step, role.dtype)
            return w - lr * (m * v + step if self.nesterov else v), (v,), ratio

        step = lr * ratio * d
        v = rounded(m * v + step, role.dtype)
        return w - (m * v + step if self.nesterov else v), (v,), ratio

    def _check_nesterov(self) -> None:
        if self.nesterov and self.variant == "ratio_on_momentum":
            raise ValueError(
                'Nesterov momentum is not supported for variant="ratio_on_momentum". Received: nesterov=True'
            )

    def _ratio(self, w: Tensor, x: Tensor, b: float, lr: Tensor, role: VariableRole) -> Tensor:
        if not role.adapt:
            return ops.ones_like(lr)
        w_norm = l2_norm(w)
        ratio = trust_ratio(w_norm, l2_norm(x), self.trust_coefficient, self.epsilon, b * w_norm)
        # ratio / 0 would be right as well (the clip holds), but only where infinities are allowed.
        return ops.minimum(ratio / ops.maximum(lr, 1e-30), 1.0) if self.trust_clip else ratio
