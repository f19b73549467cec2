"""The forward computation of one ghost batch as a pure function.

A *ghost batch* (Hoffer et al. 2017, arXiv 1705.08741) is the `microbatch_size` examples that one replica
takes through the model at once. A global batch is an ordered list of ghost batches, and an update is
defined by that list alone:

- The loss is the mean over the ghost batches. With a mask, each ghost batch is weighted by its valid entries.
- Every ghost batch starts from the same state. Floating-point state (moving statistics of batch normalization) becomes
  the mean of the new values that the ghost batches give it, so it moves once per update.
- Ghost batch `j` draws its random numbers (dropout) from a stream keyed by `j`.
- State that no layer assigns is unchanged, bit for bit. Frozen weights are not even summed.
- The scales and histories of float8 layers, whose "gradient" is their new value, become the largest of the new values.
  Their entries are largest absolute values, so the whole batch would have given the same.

So the update is the same whether ghost batches run one after the other on one device or in parallel on replicas.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from lars_keras._keras_internals import (
    compute_loss,
    is_overwritten,
    is_seed_state,
    layer_losses,
    layers_of,
    losses_of_one_replica,
    own_trainable_variables,
    recorded_masks,
    training_mode,
)
from lars_keras.training.batch_stats import one_pass_moments
from lars_keras.training.inputs import TensorSpec, spec_of
from lars_keras.training.loss_terms import LossTerms, valid_entries
from lars_keras.training.recording import RecordingScope

Tensor = Any

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive j over the key space
_KEYS = 2**31


class StatelessForward:
    """Compute the loss of a built model as a pure function of its variables and a ghost batch.

    Args:
        model: built.
        compiled: True if XLA compiles `loss`. Batch normalization then takes its moments as `one_pass_moments` does.
        over_replicas: see `one_pass_moments`.

    Attributes:
        trainable: trainable variables.
        overwritten: for each trainable variable, True if its gradient is its new value.
        batch_stats: floating-point state, with the frozen weights.
        averaged: the part of `batch_stats` that is averaged over the ghost batches: all but the frozen weights.
        rng_state: integer state, the same after every ghost batch: seed generators and counters.
        assigned: for each of `averaged`, True if a layer assigns it; known once `loss` is traced.
        unreached: for each of `trainable`, True if the loss does not depend on it; set by `leave_alone`.
        loss_dtype: dtype in which the loss is summed: float64 if a weight has it, else float32.
        metrics: variables of all metrics, which a loss, layer or `compute_loss` may update.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        compiled: bool,
        over_replicas: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.model = model
        self._moments = (lambda: one_pass_moments(model, over_replicas)) if compiled else contextlib.nullcontext
        self.trainable = list(model.trainable_variables)
        self.overwritten = [is_overwritten(v) for v in self.trainable]
        self.unreached = [False] * len(self.trainable)
        self.loss_dtype = "float64" if any(v.dtype == "float64" for v in self.trainable) else "float32"
        state = list(model.non_trainable_variables)
        self.batch_stats = [v for v in state if keras.backend.is_float_dtype(v.dtype)]
        self.rng_state = [v for v in state if not keras.backend.is_float_dtype(v.dtype)]
        weights = {id(v) for layer in layers_of(model) for v in own_trainable_variables(layer)}
        self.averaged = [v for v in self.batch_stats if id(v) not in weights]
        self.assigned = [True] * len(self.averaged)
        self.metrics = [v for metric in model.metrics for v in metric.variables]
        self._is_seed = [is_seed_state(v) for v in self.rng_state]
        self._unknown: set[int] = set()  # variables that a warning has named

    def leave_alone(self, unreached: list[bool]) -> None:
        """Set `unreached`, and name these variables once in a warning: an update leaves them alone.

        Raises:
            ValueError: if the loss depends on no variable.
        """
        if all(unreached):
            raise ValueError("The loss depends on no trainable variable.")
        if unreached != self.unreached:
            logging.warning(
                "The loss does not depend on these trainable variables, so they keep their values: %s. Set "
                "`trainable = False` on their layers if that is meant.",
                ", ".join(v.path for v, left in zip(self.trainable, unreached, strict=True) if left),
            )
        self.unreached = unreached

    def loss(
        self,
        trainable: list[Tensor],
        batch_stats: list[Tensor],
        rng_state: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        index: Tensor,
        metrics: list[Tensor],
        others: Sequence[tuple[keras.Variable, Tensor]] = (),
    ) -> tuple[Tensor, Any, list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Compute the loss of ghost batch number `index` of its update, in training mode.

        Args:
            trainable: values of the variables of that name, as are `batch_stats`, `rng_state` and `metrics`.
            batch_stats: see `trainable`.
            rng_state: see `trainable`.
            x: inputs of the ghost batch.
            y: its targets.
            sample_weight: its weights, or None.
            index: number of the ghost batch.
            metrics: see `trainable`.
            others: other variables that the loss may read, with their values.

        Returns:
            The loss (mean over the ghost batch, plus the model's own losses), the predictions, the new values of
            `averaged`, `rng_state` and `metrics`, and the number of valid entries of an example, float32, which is the
            weight of the ghost batch in the update.

        Raises:
            ValueError: if a layer assigns a variable whose new value an update would not keep.
        """
        keyed = [
            _with_key(value, index, +1) if seed else value for value, seed in zip(rng_state, self._is_seed, strict=True)
        ]
        variables = self.trainable + self.batch_stats + self.rng_state + self.metrics
        mapping = [*zip(variables, trainable + batch_stats + keyed + metrics, strict=True), *others]
        with self._moments(), losses_of_one_replica(), RecordingScope(mapping) as scope:
            y_pred = self.model(x, **training_mode(self.model))
            with recorded_masks() as masks:
                loss = compute_loss(self.model, x, y, y_pred, sample_weight, training=True)
            new_batch_stats = [scope.get_current_value(v) for v in self.averaged]
            new_rng_state = [scope.get_current_value(v) for v in self.rng_state]
            metrics = [scope.get_current_value(v) for v in self.metrics]
        self._check_assigned(scope)
        self._check_read(scope)
        self.assigned = [id(v) in scope.assigned for v in self.averaged]
        new_rng_state = [
            _with_key(value, index, -1) if seed else value
            for value, seed in zip(new_rng_state, self._is_seed, strict=True)
        ]
        return loss, y_pred, new_batch_stats, new_rng_state, metrics, valid_entries(masks)

    def _check_assigned(self, scope: RecordingScope) -> None:
        kept = {id(v) for v in (*self.averaged, *self.rng_state, *self.metrics)}
        lost = dict.fromkeys(variable.path for key, variable in scope.assigned.items() if key not in kept)
        if lost:
            raise ValueError(
                "Layers assign weights, trained or frozen, or variables that are not the model's, and `Trainer` would "
                "lose the new values. Give layers that draw random numbers a `keras.random.SeedGenerator` as an "
                "attribute, and train the others, such as a stateful RNN, with `model.fit`. Received: "
                f"{', '.join(lost)}"
            )

    def _check_read(self, scope: RecordingScope) -> None:
        """Warn once of variables whose value becomes a constant of the program. TensorFlow's programs read them."""
        if keras.backend.backend() == "jax" and not self._unknown.issuperset(scope.unknown):
            paths = [v.path for v in scope.unknown.values()]
            logging.warning(
                "The loss reads variables that are neither the model's nor numbers of the optimizer. On JAX it goes on "
                "with their values of now, as in `model.fit`. If they change, make them attributes of a layer or of "
                "the model: %s",
                ", ".join(paths[:5]) + ", ..." * (len(paths) > 5),
            )
            self._unknown |= set(scope.unknown)


def _with_key(seed_state: Tensor, index: Tensor, sign: int) -> Tensor:
    """Shift the key of a `[key, counter]` seed state, int64 or uint32, to the key of ghost batch `index`, or back."""
    dtype = keras.backend.standardize_dtype(seed_state.dtype)
    golden, keys = (ops.convert_to_tensor(np.array(n, dtype)) for n in (_GOLDEN, _KEYS))
    shift = ops.cast(index, dtype) * golden % keys  # in uint32 the product wraps, which leaves this rest as it is
    step = ops.stack([shift, ops.zeros_like(shift)])
    return seed_state + step if sign > 0 else seed_state - step


def build_model(model: keras.Model, element_spec: Any, examples: int) -> LossTerms:
    """Create the variables that Keras creates on the first batch, without drawing a batch from the data.

    Args:
        model: compiled.
        element_spec: shape and dtype of each array of a batch: `TensorSpec`s of this package or of TensorFlow.
        examples: examples in a batch, for models that take no other number. Other models see one example.

    Returns:
        The terms of its loss.
    """
    try:
        return _built_on(model, element_spec, 1)
    except Exception as error:
        if not model.built:
            raise
        try:
            return _built_on(model, element_spec, examples)
        except Exception:
            raise error from None


def _built_on(model: keras.Model, element_spec: Any, examples: int) -> LossTerms:
    zeros = keras.tree.map_structure(lambda spec: _zeros(spec, examples), spec_of(element_spec))
    x, y, weight = keras.utils.unpack_x_y_sample_weight(zeros)
    if not model.built and isinstance(model, keras.Sequential):
        model.build(keras.tree.map_structure(lambda a: (None, *a.shape[1:]), x))
    elif not model.built:
        try:
            with keras.StatelessScope():  # so that nothing is drawn or counted
                model(x)  # computed: a layer may keep what it makes as it is built
        except Exception:  # a layer makes variables that a scope does not allow
            model(x)
    found: dict[str, Any] = {}

    def score(x: Any, y: Any, weight: Any) -> None:
        y_pred = model(x)
        with recorded_masks() as masks:
            compute_loss(model, x, y, y_pred, weight, training=False)  # makes the trackers of several losses
        found["masks"] = tuple(mask is not None for mask in masks)
        found["layers"] = len(layer_losses(model))
        returned = model.compute_metrics(x, y, y_pred, weight)
        found["lost"] = [name for name in returned if name not in {"loss", *model.get_metrics_result()}]
        found["specs"] = spec_of((x, y, y_pred)), spec_of(weight)

    values = [(v, ops.convert_to_tensor(v)) for v in model.variables]  # regularizers ask the scope for them
    with keras.StatelessScope(values, collect_losses=True):  # its end creates the variables of metrics
        _without_computing(score, x, y, weight)
    if lost := found["lost"]:
        logging.warning(
            "`compute_metrics` of the model returns values that no metric of the model has: %s. `Trainer` reports "
            "`model.get_metrics_result()`, so it leaves them out. Make a `keras.metrics.Metric` of each.",
            ", ".join(map(repr, lost)),
        )
    return LossTerms(found["masks"], found["layers"], *found["specs"])


def _without_computing(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function for what it finds. On JAX only trace it, because JAX would compile each of its operations.

    So, as in `model.fit` on JAX, a loss or metric must not keep a tensor of its first call.
    """
    if keras.backend.backend() == "jax":
        import jax

        jax.eval_shape(function, *arguments)
    else:
        function(*arguments)


def _zeros(spec: TensorSpec | None, examples: int) -> Tensor | None:
    """Return examples of zeros, or of empty text."""
    if spec is None:
        return None
    shape = [examples, *(1 if size is None else size for size in spec.shape[1:])]
    if spec.dtype != "string":
        return ops.convert_to_tensor(np.zeros(shape, spec.dtype))
    if keras.backend.backend() != "tensorflow":
        raise ValueError("Text goes into a model with KERAS_BACKEND=tensorflow only. Received: batches with text")
    return ops.convert_to_tensor(np.zeros(shape, "U1").astype(object), "string")
