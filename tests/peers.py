"""The rules of other libraries in NumPy, written from their sources with their names.

docs/migrating.md has our optimizer for each, docs/optimizers.md the list.

Each follows one variable after the other: index 0 is a kernel, index 1 a bias.
"""

import math

import numpy as np


def _norm(x):
    return math.sqrt(np.sum(np.square(x)))


class Peer:
    """Weights and slots in float64."""

    def __init__(self, weights):
        self.weights = [np.array(w, "float64") for w in weights]
        self.first, self.second = ([np.zeros_like(w) for w in self.weights] for _ in range(2))
        self.updates = 0

    def step(self, gradients, lr):
        """Take an update at a rate."""
        self.updates += 1
        for i, g in enumerate(gradients):
            self.update(i, self.weights[i], g, lr)


class Addons(Peer):
    """tfa.optimizers.LAMB(1e-3, weight_decay=0.01, exclude_from_weight_decay=["bias"])."""

    def update(self, i, w, g, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-6):
        self.first[i] = beta_1 * self.first[i] + (1 - beta_1) * g
        self.second[i] = beta_2 * self.second[i] + (1 - beta_2) * g * g
        m_hat = self.first[i] / (1 - beta_1**self.updates)
        v_hat = self.second[i] / (1 - beta_2**self.updates)
        update = m_hat / (np.sqrt(v_hat) + epsilon)
        ratio = 1.0
        if i == 0:
            update = update + 0.01 * w
            w_norm, g_norm = _norm(w), _norm(update)
            ratio = w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        self.weights[i] = w - ratio * 1e-3 * update


class Models(Peer):
    """LARS of tensorflow/models, with exclude_from_weight_decay=["bias"]."""

    classic_momentum = True

    def update(self, i, w, g, lr, momentum=0.9, eeta=0.001):
        grad = g + 1e-4 * w if i == 0 else g
        if self.classic_momentum:
            ratio = eeta * _norm(w) / _norm(grad) if i == 0 else 1.0
            self.first[i] = momentum * self.first[i] + lr * ratio * grad
            self.weights[i] = w - self.first[i]
        else:
            self.first[i] = momentum * self.first[i] + grad
            ratio = eeta * _norm(w) / _norm(self.first[i]) if i == 0 else 1.0
            self.weights[i] = w - lr * ratio * self.first[i]


class PopularModels(Models):
    """The same with classic_momentum=False."""

    classic_momentum = False


class Mlperf(Peer):
    """LARS of the MLPerf reference for ResNet-50, whose rule is that of the paper."""

    def update(self, i, w, g, lr, momentum=0.9, eeta=0.001, epsilon=0.0):
        ratio, decay = 1.0, 0.0
        if i == 0:
            decay = 1e-4
            ratio = eeta * _norm(w) / (_norm(g) + decay * _norm(w) + epsilon)
        self.first[i] = momentum * self.first[i] + lr * ratio * (g + decay * w)
        self.weights[i] = w - self.first[i]


class Torch(Peer):
    """SGD of PyTorch on gradients that the subclass has scaled."""

    def update(self, i, w, g, lr):
        self.first[i] = 0.9 * self.first[i] + self.scaled(i, w, g, lr)
        self.weights[i] = w - lr * self.first[i]

    def ratio(self, w, g, trust_coefficient):
        return trust_coefficient * _norm(w) / (_norm(g) + _norm(w) * 1e-4 + 1e-8)


class Larc(Torch):
    """LARC(SGD(weight_decay=1e-4), trust_coefficient=0.02, clip=True)."""

    def scaled(self, i, w, g, lr):
        return min(self.ratio(w, g, 0.02) / lr, 1) * (g + 1e-4 * w)


class Timm(Torch):
    """timm.optim.Lars(weight_decay=1e-4), rank 1 in a group without decay, which is not adapted."""

    def scaled(self, i, w, g, lr):
        return self.ratio(w, g, 0.001) * (g + 1e-4 * w) if i == 0 else g


class Torchlars(Torch):
    """torchlars.LARS(SGD(weight_decay=1e-4)): everything is adapted."""

    def scaled(self, i, w, g, lr):
        return self.ratio(w, g, 0.001) * (g + 1e-4 * w)


# By the name of the optimizer in docs/migrating.md; MLPerf's is our default.
PEERS = {
    "mlperf": Mlperf,
    "tfa": Addons,
    "classic": Models,
    "popular": PopularModels,
    "clipped": Larc,
    "timm": Timm,
    "torchlars": Torchlars,
}
