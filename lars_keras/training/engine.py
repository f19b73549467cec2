"""Define the contract between `Trainer` and the engines of the two backends."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import keras
import numpy as np

from lars_keras._keras_internals import inner_optimizer
from lars_keras.training.inputs import Data
from lars_keras.training.loss_terms import LossTerms
from lars_keras.training.metric_terms import MetricTerms
from lars_keras.training.state import EmaWeights

Scores: TypeAlias = Callable[[], dict[str, Any]]
"""Fetches the result of an evaluation so far: loss, metrics and `n`."""


def as_log(value: Any) -> float | np.ndarray:
    """Return the value of a metric as Keras logs it: a number, or an array for several values, as of `F1Score`."""
    array = np.array(value)
    return float(array.item()) if array.size == 1 else array


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Holds the options of a step, the same for both engines. `Trainer` documents each of them.

    Attributes:
        microbatch_size: examples that one replica takes through the model at once.
        accumulation_steps: micro-batches of a replica in an update.
        jit_compile: compile the gradient computation with XLA: True, False or "auto".
        reduce_dtype: dtype of the gradients on their way between devices.
        variable_norms: measure the norms of gradients and weights.
        trust_ratios: measure the trust ratios and effective rates of a `LayerwiseOptimizer`.
        noise_scale: measure the norms of the ghost-batch gradients; needs `variable_norms`.
    """

    microbatch_size: int
    accumulation_steps: int = 1
    jit_compile: bool | str = "auto"
    reduce_dtype: str = "float32"
    variable_norms: bool = False
    trust_ratios: bool = False
    noise_scale: bool = False


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of the updates of one call of `Engine.train`.

    Attributes:
        losses: loss of each update.
        learning_rates: learning rate of each update.
        metrics: the compiled metrics since their last reset, as `as_log` returns them.
        measures: the requested measures by name, float32 of shape `(updates, variables)`: "gradient", "weight",
            "ghost_gradient", and the names in `lars_keras.layerwise.MEASURES`.
        data_wait: seconds that the devices stood idle for want of data.
    """

    losses: list[float]
    learning_rates: list[float]
    metrics: dict[str, Any]
    measures: dict[str, np.ndarray]
    data_wait: float


class Engine(Protocol):
    """The compiled functions of a model on the replicas of a cluster.

    Args:
        model: compiled.
        cluster: cluster on which the model was made, of the engine's backend.
        options: how to take a step.
        element_spec: a `TensorSpec` for each array of a batch of the data.

    Attributes:
        loss_terms: the terms of the loss.
        metric_terms: which metrics may be split.
    """

    loss_terms: LossTerms
    metric_terms: MetricTerms

    def __init__(self, model: keras.Model, cluster: Any, options: EngineOptions, element_spec: Any): ...

    @classmethod
    def check(cls, model: keras.Model, cluster: Any, options: EngineOptions) -> None:
        """Raise ValueError if this engine does not support the model or an option, before anything is built."""

    def prepare_training(self) -> None:
        """Prepare what updates need and evaluations do not; work only the first time.

        Raises:
            ValueError: if the loss depends on no trainable variable. The engine of TensorFlow finds that in an update.
        """

    def training_iterator(self, data: Data, first_update: int, updates: int) -> Any:
        """Return an iterator over the data of `updates` updates from `first_update` on, for `train`."""

    def train(self, iterator: Any, updates: int) -> StepResult:
        """Take `updates` updates without returning to Python between them.

        Raises:
            DataEnded: if the data end too early. It is then unknown how many of several updates were taken.
        """

    def check_scoring(self, examples: int | None = None) -> None:
        """Check that the model can be scored over batches, before any is.

        Args:
            examples: number of examples to score; None if not known, for the smallest number.

        Raises:
            ValueError: if the model would count the padding of batches; if a masked loss or a metric cannot be put
                together from several batches.
        """

    def evaluate(
        self, data: Data, before_batch: Callable[[int], None], after_batch: Callable[[int, Scores], None]
    ) -> dict[str, Any]:
        """Return loss, metrics and the number of examples `n`, each example scored once.

        Args:
            data: for evaluation.
            before_batch: called before each batch, with its index.
            after_batch: called after each batch, with its index and a function that returns the result so far. That
                function is collective: call it on every host or on none.
        """

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return a copy of all state that the next update depends on. Collective: call it on every host."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a snapshot from either engine.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """

    def kept_metrics(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that sets the metrics back at its end. Collective: call it on every host."""

    def save_model(self, path: str | os.PathLike, write: bool) -> None:
        """Write a `.keras` file if `write` is true. Collective: call it on every host."""

    def ema_weights(self) -> EmaWeights:
        """Return a context in which the model has the EMA weights, if the optimizer keeps them."""


def check_supported(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuse `gradient_accumulation_steps` and `MultiOptimizer`, which have no meaning on either engine.

    Raises:
        ValueError: for such an optimizer.
    """
    multi = getattr(keras.optimizers, "MultiOptimizer", None)  # not in Keras 3.10
    if multi is not None and isinstance(inner_optimizer(optimizer), multi):
        raise ValueError(
            "`Trainer` needs an optimizer with one learning rate. Use `excluded_lr_scale` to give variables that are "
            "not adapted their own rate, or train with `model.fit`. Received: an optimizer of type MultiOptimizer"
        )
    steps = inner_optimizer(optimizer).gradient_accumulation_steps
    if steps:
        raise ValueError(
            "Accumulate with `Trainer(microbatch_size=...)`, which updates once per global batch: "
            "`gradient_accumulation_steps` fails under tf.distribute, and Keras's own optimizers call schedules with "
            "the count of micro-batches then. "
            f"Received: gradient_accumulation_steps={steps}"
        )
