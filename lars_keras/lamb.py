"""Layer-wise adaptive moments for large batches (LAMB)."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lars_keras.checks import check_flag, check_number
from lars_keras.compiled import recomputed, rounded
from lars_keras.exclude import DEFAULT_EXCLUDE, VariableRole
from lars_keras.layerwise import LayerwiseOptimizer
from lars_keras.trust_ratio import Tensor, l2_norm, trust_ratio


@keras.saving.register_keras_serializable(package="lars_keras")
class LAMB(LayerwiseOptimizer):
    """Adam that scales the step of each variable, weight decay included, to the norm of the variable.

    With weights `w`, gradient `g`, weight decay `b`, update `t` = 1, 2, ... and L2 norms over one variable:

        m = beta_1 m + (1 - beta_1) g
        v = beta_2 v + (1 - beta_2) g^2
        r = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon) + b w
        w -= lr ||w|| / ||r|| * r

    The ratio is 1 where either norm is 0. Arithmetic and norms are float32 whatever the variable's dtype (float64 for
    float64 variables), and so is the second moment. The first moment has the variable's dtype. The weights move by the
    moments as they are stored.

    Source: You et al. 2019, arXiv 1904.00962, algorithm 2, with the identity as its function phi; equal to
    `optax.lamb`. `keras.optimizers.Lamb` subtracts the decay outside the ratio.

    Args:
        learning_rate: the global rate, a number or a `LearningRateSchedule`.
        beta_1: decay rate of the first moment, in [0, 1).
        beta_2: decay rate of the second moment, in [0, 1).
        epsilon: added to the root of the second moment; above 0.
        weight_decay: `b`; None is 0. It acts inside the rule only; 0 does not switch adaptation off.
        bias_correction: divide the moments by `1 - beta^t`, as published; the authors' code for BERT did not.
        trust_clip: limit the ratio to 1, so that the learning rate is a ceiling.
        exclude: regular expressions searched in `keras.Variable.path`; matching variables are neither adapted nor
            decayed, and take Adam's step. The default is `lars_keras.DEFAULT_EXCLUDE`, which matches bias and
            normalization variables and everything of rank 0 or 1. `()` excludes nothing, as in `optax.lamb`.
        exclude_from_layer_adaptation: overrides `exclude` for layer-wise scaling; by default as `exclude`.
        exclude_from_weight_decay: overrides `exclude` for weight decay; by default as `exclude`.
        excluded_lr_scale: factor on the learning rate of variables that are not adapted.
        name: name of the optimizer, `lamb`, `lamb_1`, ... by default.
        **kwargs: arguments of `keras.optimizers.Optimizer` (`clipnorm`, `global_clipnorm`, `use_ema`, ...).

    Raises:
        ValueError: for an argument out of range; at `build` for an exclusion pattern that matches no variable.
    """

    slots = ("momentum", "velocity")
    float32_slots = (*LayerwiseOptimizer.float32_slots, "velocity")  # 0.999 of a number of bfloat16 rounds to itself
    hyperparameters = {
        "beta_1": functools.partial(check_number, below=1.0),
        "beta_2": functools.partial(check_number, below=1.0),
        "epsilon": functools.partial(check_number, above=1e-38),  # 0 in float32 would give 0 / 0 without a gradient
        "bias_correction": check_flag,
        "trust_clip": check_flag,
    }

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float | None = 0.01,
        bias_correction: bool = True,
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
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.bias_correction = bias_correction
        self.trust_clip = trust_clip

    def rule(
        self, w: Tensor, g: Tensor, slots: Sequence[Tensor], lr: Tensor, t: Tensor, role: VariableRole
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Return the new weights and moments of one variable, and its trust ratio."""
        m, v = slots
        b = self.weight_decay if role.decay else 0.0
        m = rounded(self.beta_1 * m + (1 - self.beta_1) * g, role.dtype)
        v = self.beta_2 * v + (1 - self.beta_2) * ops.square(g)
        c1, c2 = self._correction(self.beta_1, t), self._correction(self.beta_2, t)

        def r(m: Tensor, v: Tensor, w: Tensor) -> Tensor:
            return m / c1 / (ops.sqrt(v / c2) + self.epsilon) + b * w

        ratio = ops.ones_like(lr)
        if role.adapt:
            ratio = trust_ratio(l2_norm(w), l2_norm(r(*recomputed(m, v, w)), expensive_input=True))
            ratio = ops.minimum(ratio, 1.0) if self.trust_clip else ratio
        return w - lr * ratio * r(m, v, w), (m, v), ratio

    def _correction(self, beta: float, t: Tensor) -> Tensor | float:
        """Return `1 - beta^t`. A subtraction in float32 would leave four digits of it for beta_2 at first."""
        return -ops.expm1(t * math.log(beta)) if self.bias_correction and beta else 1.0
