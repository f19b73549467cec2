"""Keras's own tests of its optimizers, of the installed version, with LARS and LAMB in the place of SGD and Adam.

With every variable excluded, and without decay, the rule of LARS is that of SGD, and that of LAMB is Adam's, so the
numbers in Keras's tests hold for ours. `tests/jax/test_on_jax.py` runs this file on JAX, as a slow test.
"""

import importlib.util
import re
import types
import warnings

import keras
import pytest

from lars_keras import LAMB, LARS

ALL = ("",)  # is found in every path
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:Variables that are not adapted take a learning rate"),
]


@keras.saving.register_keras_serializable(package="tests")
class SGD(LARS):
    """LARS with the arguments and defaults of Keras's SGD."""

    def __init__(self, learning_rate=0.01, momentum=0.0, nesterov=False, weight_decay=0.0, **kwargs):
        super().__init__(learning_rate, momentum, nesterov, weight_decay, **{"exclude": ALL, **kwargs})


@keras.saving.register_keras_serializable(package="tests")
class Adam(LAMB):
    """LAMB with the arguments and defaults of Keras's Adam."""

    def __init__(self, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0, **kwargs):
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay, **{"exclude": ALL, **kwargs})


def get(name):
    """Return LARS or LAMB, which adapt and decay, for "sgd" or "adam"; takes a configuration, too."""
    config = name if isinstance(name, dict) else {"class_name": name, "config": {}}
    return {"sgd": LARS, "adam": LAMB}[config["class_name"]](**config["config"])


def keras_tests(name, case, *left_out):
    """Return a class of Keras's tests with ours in the place of its optimizers, without the tests that are left out.

    None if the installed version has no such file.
    """
    if importlib.util.find_spec(f"keras.src.optimizers.{name}") is None:
        return None
    with warnings.catch_warnings(action="ignore"):  # their marks are not in our configuration
        module = importlib.import_module(f"keras.src.optimizers.{name}")
    ours = {"SGD": SGD, "Adam": Adam, "get": get}
    if hasattr(module, "optimizers"):
        module.optimizers = types.SimpleNamespace(**vars(keras.src.optimizers) | ours)
    vars(module).update({name: value for name, value in ours.items() if hasattr(module, name)})
    theirs = getattr(module, case)
    # Tables of all optimizers, of which the first two rows are Adam and SGD.
    of_others = [test for test in dir(theirs) if re.fullmatch(r"test_.*\D([2-9]|\d\d)", test)]
    return type(case, (theirs,), dict.fromkeys([*left_out, *of_others]) | {"__module__": __name__})


OptimizerTest = keras_tests(
    "optimizer_test",
    "OptimizerTest",
    "test_get_method",  # of Keras's own names
)
SGDTest = keras_tests(
    "sgd_test",
    "SGDTest",
    "test_invalid_momentum",  # has another message: test_lars.py
    "test_single_step",  # counts the variables of SGD without momentum, which has no slots
    "test_weight_decay",  # exclude_from_weight_decay() is refused, because Keras does not save it: test_in_fit.py
)
AdamTest = keras_tests(
    "adam_test",
    "AdamTest",
    "test_config",  # AMSGrad
    "test_correctness_with_golden",  # AMSGrad
    "test_weight_decay",  # as for SGD
)
LossScaleOptimizerTest = keras_tests("loss_scale_optimizer_test", "LossScaleOptimizerTest")
MultiOptimizerTest = keras_tests("multi_optimizer_test", "MultiOptimizerTest")
