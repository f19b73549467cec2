"""LARS in float64 NumPy, written from the published rules and sharing no line with `lars_keras`.

w weights, g gradient, b weight decay, d = g + b*w, eta trust coefficient, m momentum, lr the global
rate, v the momentum slot; norms are L2 over one variable.
"""

import math

import ml_dtypes
import numpy as np


def round_to(dtype, value):
    """Round to float16, bfloat16, float32 or float64, and returns the result in float64."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(value, "float64").astype(kind).astype("float64")


def norm(x):
    return math.sqrt(np.sum(np.square(x)))


class ReferenceLARS:
    """Weights and slots in float64, rounded to `dtype` when stored, slots before the weights move by them.

    `adapt` and `decay` say for each variable what exclusions say by pattern. A learning rate that
    is a function gives the rate of update 0, 1, ...
    """

    def __init__(
        self,
        weights,
        adapt,
        decay,
        *,
        variant="paper",
        learning_rate=1.0,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        trust_coefficient=1e-3,
        epsilon=0.0,
        trust_clip=False,
        excluded_lr_scale=1.0,
        dtype="float64",
    ):
        self.weights = [np.array(w, "float64") for w in weights]
        self.slots = [np.zeros_like(w) for w in self.weights]
        self.adapt, self.decay = adapt, decay
        self.variant, self.learning_rate, self.m = variant, learning_rate, momentum
        self.nesterov, self.weight_decay, self.eta = nesterov, weight_decay, trust_coefficient
        self.epsilon, self.clip, self.excluded = epsilon, trust_clip, excluded_lr_scale
        self.dtype, self.updates = dtype, 0

    def step(self, gradients):
        """Update every weight and slot once."""
        lr = self.learning_rate
        lr = lr(self.updates) if callable(lr) else lr
        rule = getattr(self, self.variant)
        for i, g in enumerate(gradients):
            b = self.weight_decay if self.decay[i] else 0.0
            w, v = rule(self.weights[i], self.slots[i], g, b, lr, self.adapt[i])
            self.weights[i], self.slots[i] = round_to(self.dtype, w), v
        self.updates += 1

    def paper(self, w, v, g, b, lr, adapt):
        ratio = self.ratio(norm(w), norm(g), norm(g) + b * norm(w))
        return self.lr_inside(w, v, self.rate(lr, ratio, adapt) * (g + b * w))

    def norm_of_sum(self, w, v, g, b, lr, adapt):
        d = g + b * w
        ratio = self.ratio(norm(w), norm(d), norm(d))
        return self.lr_inside(w, v, self.rate(lr, ratio, adapt) * d)

    def lr_inside(self, w, v, step):
        v = round_to(self.dtype, self.m * v + step)
        return w - (self.m * v + step if self.nesterov else v), v

    def lr_outside_momentum(self, w, v, g, b, lr, adapt):
        ratio = self.ratio(norm(w), norm(g), norm(g) + b * norm(w))
        if not adapt:
            ratio, lr = 1.0, lr * self.excluded
        elif self.clip:  # lr * min(ratio / lr, 1) is min(ratio, lr)
            ratio = min(ratio / lr, 1.0) if lr > 0 else 1.0
        u = ratio * (g + b * w)
        v = round_to(self.dtype, self.m * v + u)
        return w - lr * (self.m * v + u if self.nesterov else v), v

    def ratio_on_momentum(self, w, v, g, b, lr, adapt):
        v = round_to(self.dtype, self.m * v + g + b * w)
        return w - self.rate(lr, self.ratio(norm(w), norm(v), norm(v)), adapt) * v, v

    def ratio(self, weight_norm, rule_norm, denominator):
        if weight_norm == 0 or rule_norm == 0:
            return 1.0
        return self.eta * weight_norm / (denominator + self.epsilon)

    def rate(self, lr, ratio, adapt):
        if not adapt:
            return lr * self.excluded
        return min(ratio, lr) if self.clip else lr * ratio


class ReferenceLAMB:
    """LAMB with the same conventions; `slots` holds first moments, then second moments."""

    def __init__(
        self,
        weights,
        adapt,
        decay,
        *,
        learning_rate=1e-3,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        trust_clip=False,
        excluded_lr_scale=1.0,
        dtype="float64",
    ):
        self.weights = [np.array(w, "float64") for w in weights]
        self.first, self.second = ([np.zeros_like(w) for w in self.weights] for _ in range(2))
        self.adapt, self.decay, self.learning_rate = adapt, decay, learning_rate
        self.beta_1, self.beta_2, self.epsilon, self.weight_decay = beta_1, beta_2, epsilon, weight_decay
        self.corrected, self.clip, self.excluded = bias_correction, trust_clip, excluded_lr_scale
        self.dtype, self.updates = dtype, 0

    @property
    def slots(self):
        return self.first + self.second

    def step(self, gradients):
        lr = self.learning_rate
        lr = lr(self.updates) if callable(lr) else lr
        self.updates += 1
        wide = "float64" if self.dtype == "float64" else "float32"
        for i, g in enumerate(gradients):
            w = self.weights[i]
            mean = round_to(self.dtype, self.first[i] + (1 - self.beta_1) * (g - self.first[i]))
            square = round_to(wide, self.second[i] + (1 - self.beta_2) * (g * g - self.second[i]))
            unbiased, spread = mean, square
            if self.corrected:
                unbiased = mean / (1 - math.pow(self.beta_1, self.updates))
                spread = square / (1 - math.pow(self.beta_2, self.updates))
            r = unbiased / (np.sqrt(spread) + self.epsilon)
            if self.decay[i]:
                r = r + self.weight_decay * w
            rate = lr * self.excluded
            if self.adapt[i]:
                ratio = norm(w) / norm(r) if norm(w) > 0 and norm(r) > 0 else 1.0
                rate = lr * (min(ratio, 1.0) if self.clip else ratio)
            self.weights[i] = round_to(self.dtype, w - rate * r)
            self.first[i], self.second[i] = mean, square
