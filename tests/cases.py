"""The random problem on which `LARS` and its oracle are compared, and the arguments they are compared with."""

import dataclasses

import keras
import numpy as np

from lars_keras import LARS, schedules
from lars_keras._keras_internals import learning_rate_of
from tests.reference import ReferenceLARS, round_to

VARIANTS = ("paper", "norm_of_sum", "lr_outside_momentum", "ratio_on_momentum")

# Path, shape, scale of the weights, scale of the gradients. The scales differ, so that a norm over
# all variables shows; gradients are comparable with b*w, so that the place of the decay shows.
VARIABLES = (
    ("conv/kernel", (3, 3, 2, 4), 0.3, 0.02),
    ("attention/bias", (2, 3), 1.0, 0.05),
    ("temperature", (), 2.0, 0.1),
    ("table/embeddings", (11, 3), 0.1, 0.002),
)
KERNELS = (True, False, False, True)  # what the default exclusions leave to LARS
ALL, NONE = (True,) * 4, (False,) * 4


@dataclasses.dataclass(frozen=True)
class Rate:
    """Linear warm-up, then polynomial decay of power 2 to 0: the rate of update 0, 1, ..."""

    peak: float
    warmup_updates: int = 5
    total_updates: int = 18

    def __call__(self, update):
        if update < self.warmup_updates:
            return self.peak * (update + 1) / self.warmup_updates
        left = (self.total_updates - update) / (self.total_updates - self.warmup_updates)
        return self.peak * max(left, 0.0) ** 2


# Arguments of `LARS`, then what the exclusions among them must mean: adapt? and decay? by variable.
# The rate changes at every update: under a constant one "paper" and "lr_outside_momentum" are equal.
CASES = {
    "plain": ({}, KERNELS, KERNELS),
    "constant_rate": ({"learning_rate": 4}, KERNELS, KERNELS),
    "nesterov": ({"nesterov": True}, KERNELS, KERNELS),
    "epsilon": ({"epsilon": 0.1}, KERNELS, KERNELS),
    "no_decay": ({"weight_decay": 0}, KERNELS, NONE),
    "no_momentum": ({"momentum": 0}, KERNELS, KERNELS),
    "clip": (
        {"learning_rate": Rate(0.1), "trust_coefficient": 0.005, "trust_clip": True},
        KERNELS,
        KERNELS,
    ),
    "nothing_excluded": ({"exclude": ()}, ALL, ALL),
    "all_excluded": ({"learning_rate": Rate(0.2), "exclude": (".",)}, NONE, NONE),
    "decay_all": ({"exclude_from_weight_decay": ()}, KERNELS, ALL),
    "adapt_all": ({"exclude_from_layer_adaptation": ()}, ALL, KERNELS),
    "excluded_rate": (
        {"exclude": ("conv", "^model"), "exclude_from_weight_decay": (), "excluded_lr_scale": 0.01},
        (False, True, False, True),
        ALL,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of arguments, from which the optimizer and its oracle are made."""

    arguments: dict
    adapt: tuple = KERNELS
    decay: tuple = KERNELS

    def lars(self):
        arguments = dict(self.arguments)
        if isinstance(arguments["learning_rate"], Rate):
            rate = dataclasses.asdict(arguments["learning_rate"])
            arguments["learning_rate"] = schedules.WarmupPolynomial(**rate)
        return LARS(**arguments)

    def reference(self, weights, dtype="float64"):
        arguments = {k: a for k, a in self.arguments.items() if not k.startswith("exclude_from")}
        arguments.pop("exclude", None)
        return ReferenceLARS(weights, self.adapt, self.decay, dtype=dtype, **arguments)


def make_case(variant, name="plain", **more):
    """Return a row of `CASES` for one variant, with `more` arguments of `LARS`."""
    arguments, adapt, decay = CASES[name]
    common = {"variant": variant, "learning_rate": Rate(8.0), "weight_decay": 0.05}
    return Case(common | arguments | more, adapt, decay)


def all_cases(variant):
    """Return every row of `CASES` that exists for the variant."""
    without = {"nesterov"} if variant == "ratio_on_momentum" else set()
    return [make_case(variant, name) for name in CASES if name not in without]


def problem(dtype="float32", updates=20):
    """Return weights and `updates` lists of gradients that `dtype` can hold, in float64."""
    rng = np.random.default_rng(0)
    weights = [round_to(dtype, rng.normal(0, scale, shape)) for _, shape, scale, _ in VARIABLES]
    gradients = [
        [round_to(dtype, rng.normal(0.3, 1.0, shape) * scale) for _, shape, _, scale in VARIABLES]
        for _ in range(updates)
    ]
    return weights, gradients


def problem_with_zeros():
    """`problem` with a variable of zeros more, whose gradient is 0 in every third update."""
    weights, gradients = problem()
    weights = [*weights, np.zeros((2, 2))]
    return weights, [[*g, np.full((2, 2), 0.25 * (i % 3))] for i, g in enumerate(gradients)]


def make_variables(weights, dtype="float32"):
    """Return Keras variables with the paths of `VARIABLES`."""
    variables = []
    for (path, *_), w in zip(VARIABLES, weights, strict=True):
        scope, _, name = path.rpartition("/")
        with keras.name_scope(scope or "model"):
            variables.append(keras.Variable(w, dtype=dtype, name=name))
    return variables


def slots(optimizer):
    """Return the momentum variables of a built optimizer, in the order of the weights."""
    return [v for v in optimizer.variables if v.path.endswith("momentum")]


def relative_error(actual, expected):
    """Return the largest difference over the largest magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30)


def follow_rule(optimizer, weights, gradients, dtype="float32"):
    """Return weights and slots after the pure rule of a built optimizer has been applied to all gradients.

    The slots come as the oracle's do: those of the first kind of every variable, then those of the second.
    """
    plan, kinds = optimizer.layer_plan(), len(optimizer.slots)
    weights = [keras.ops.convert_to_tensor(w, dtype) for w in weights]
    slots = [[keras.ops.zeros_like(w)] * kinds for w in weights]
    rate = learning_rate_of(optimizer)
    for t, of_update in enumerate(gradients):
        lr = rate(t) if callable(rate) else keras.ops.convert_to_tensor(rate)
        for i, (g, role) in enumerate(zip(of_update, plan, strict=True)):
            scalars = keras.ops.cast(lr, dtype) * role.lr_scale, keras.ops.cast(t + 1, dtype)
            g = keras.ops.convert_to_tensor(g, dtype)
            weights[i], slots[i], _ = optimizer.rule(weights[i], g, slots[i], *scalars, role)
    return weights + [of_variable[k] for k in range(kinds) for of_variable in slots]


def step_plainly(optimizer, gradients, variables):
    """Apply an update operation by operation, without a compiled program."""
    optimizer.build(variables)
    for gradient, variable in zip(gradients, variables, strict=True):
        optimizer.update_step(gradient, variable, optimizer.learning_rate)
    optimizer.iterations.assign_add(1)
