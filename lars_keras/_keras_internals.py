"""Private names of Keras, each behind one function.

`tests/optimizers/test_internals.py` reports a name that a new version of Keras has changed.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

Tensor = Any
Moments = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

# The parts of an update that an optimizer may replace, in the order in which Keras's loop calls them.
APPLY_PARTS = ("apply_gradients", "apply", "_backend_apply_gradients", "_backend_update_step", "_apply_weight_decay")

# The same for `LossScaleOptimizer` on TensorFlow.
LOSS_SCALE_PARTS = (
    "_tf_apply",
    "_common_apply",
    "_stateful_handle_finite_grads",
    "_stateful_handle_non_finite_grads",
    "check_finite",
)


def training_mode(model: keras.Model) -> dict[str, bool]:
    """Return the arguments that Keras's training loop passes to a model besides its inputs.

    A model whose `call` takes no `training` is called without it, so its layers run as in inference.
    """
    return {"training": True} if model._call_has_training_arg else {}


class SelectiveDecaySGD(keras.optimizers.SGD):
    """Base class of an SGD that leaves more variables out of the decay than `exclude_from_weight_decay` names."""

    def decays(self, variable: Any) -> bool:
        """Return whether the decay may act on a variable of Keras or of the backend."""
        return True

    def _use_weight_decay(self, variable: Any) -> bool:
        return self.decays(variable) and super()._use_weight_decay(variable)


class WholeUpdateOptimizer(keras.optimizers.Optimizer):
    """Base class of optimizers that update all variables at once and decay the weights within their own rule."""

    # A sum of many terms needs the digits: in bfloat16 256 + 1 is 256.
    float32_slots: tuple[str, ...] = ("gradient_accumulator",)

    def add_variable(self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any) -> keras.Variable:
        """Add a variable, in float32 if its name ends in one of `float32_slots`."""
        if dtype in ("float16", "bfloat16") and (kwargs.get("name") or "").endswith(self.float32_slots):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def prepared(self, gradient: Tensor, variable: Any) -> Tensor:
        """Return the gradient of a variable in the form that Keras unscales, accumulates, clips and reduces."""
        return gradient

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables; by default, those that the optimizer was built for. A None means no gradient."""
        variables = None if trainable_variables is None else list(trainable_variables)
        grads, known = list(grads), self._trainable_variables if variables is None else variables
        if grads and variables is not None and len(grads) != len(variables):  # Keras would leave the rest out
            raise ValueError(
                "`grads` must have a gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        if len(grads) == len(known):  # else Keras says so
            grads = [g if g is None else self.prepared(g, v) for g, v in zip(grads, known, strict=True)]
            if self.gradient_accumulation_steps:
                grads = [_at_least_float32(g) for g in grads]
        super().apply(grads, variables)

    def update_variables(self, gradients: Sequence[Tensor], variables: Sequence[Any], learning_rate: Tensor) -> None:
        """Update all `variables` with reduced and clipped `gradients`, one by one unless a subclass overrides this."""
        super()._backend_update_step(gradients, variables, learning_rate)

    def stateless_apply(
        self, optimizer_variables: Sequence[Tensor], grads: Sequence[Tensor], trainable_variables: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the new weights and optimizer variables. Without weights there is nothing to build or update."""
        if not self.built and not trainable_variables:
            return [], list(optimizer_variables)
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    # The base class would call a schedule with its count of micro-batches.
    def _get_current_learning_rate(self) -> Any:
        schedule = self._learning_rate
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return schedule(self.iterations)
        return super()._get_current_learning_rate()

    # In float16 a norm above 256 has no square.
    def _clip_gradients(self, grads: Sequence[Tensor]) -> list[Tensor]:
        if self.clipnorm or self.global_clipnorm or self.clipvalue:
            grads = [_at_least_float32(g) if _dtype(g) == "float16" else g for g in grads]
        return super()._clip_gradients(grads)

    # The base class would move the average with each micro-batch of `gradient_accumulation_steps`.
    def _update_model_variables_moving_average(self, trainable_variables: Sequence[Any]) -> None:
        steps = self.gradient_accumulation_steps
        if not steps:
            super()._update_model_variables_moving_average(trainable_variables)
            return
        is_update = keras.ops.equal((self._iterations + 1) % steps, 0)
        momentum = keras.ops.where(is_update, self.ema_momentum, 1.0)
        momentum = keras.ops.where(keras.ops.equal(self.iterations, 0), 0.0, momentum)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            if average is not None:
                m = keras.ops.cast(momentum, average.dtype)
                average.assign(m * average + (1 - m) * variable)

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        self.update_variables(grads, trainable_variables, learning_rate)

    # The base class would subtract `lr * b * w` outside the rule.
    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        pass

    def _use_weight_decay(self, variable: Any) -> bool:
        return False


def _dtype(tensor: Tensor) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def _at_least_float32(tensor: Tensor | None) -> Tensor | None:
    short = tensor is not None and _dtype(tensor) in ("float16", "bfloat16")
    return keras.ops.cast(tensor, "float32") if short else tensor


def variable_index(optimizer: keras.optimizers.Optimizer, variable: Any) -> int:
    """Return the position of a variable, of Keras or of the backend, among the optimizer's variables."""
    return optimizer._get_variable_index(variable)


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the variables that a built optimizer updates."""
    return optimizer._trainable_variables


def clip_gradients(optimizer: keras.optimizers.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients, clipped by `clipnorm`, `global_clipnorm` or `clipvalue`."""
    return optimizer._clip_gradients(gradients)


def uses_weight_decay(optimizer: keras.optimizers.Optimizer, variable: Any) -> bool:
    """Return whether the optimizer's decoupled weight decay acts on a variable."""
    return optimizer._use_weight_decay(variable)


def is_overwritten(variable: Any) -> bool:
    """Return whether the gradient of a variable is its new value: scales and histories of float8 layers."""
    return getattr(variable, "overwrite_with_gradient", False)


def update_ema(optimizer: keras.optimizers.Optimizer) -> None:
    """Update the EMA of the optimizer's variables."""
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)


def ema_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable | None]:
    """Return the EMA of each of the optimizer's variables, in their order; None for overwritten variables."""
    return optimizer._model_variables_moving_average


def learning_rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Return the optimizer's `LearningRateSchedule`, its callable, or the variable that holds its rate."""
    return optimizer._learning_rate


def layers_of(model: keras.Model, include_self: bool = True) -> list[keras.layers.Layer]:
    """Return all layers of a model, including layers inside layers."""
    return list(model._flatten_layers(include_self=include_self, recursive=True))


def own_trainable_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Return a layer's own trainable variables, without those of its sublayers."""
    return layer._trainable_variables


def has_autocast(variable: keras.Variable) -> bool:
    """Return whether a layer casts the variable to its compute dtype."""
    return variable._autocast


def backend_value(variable: keras.Variable) -> Any:
    """Return the array that a variable holds, whatever scope is in force."""
    return variable._value


def set_backend_value(variable: keras.Variable, value: Any) -> None:
    """Put an array in the place of a variable's value, ignoring its layout."""
    variable._value = value


def backend_values(variables: Iterable[keras.Variable]) -> list[Any]:
    """Return the arrays that variables hold, whatever scope is in force."""
    return [v._value for v in variables]


def set_backend_values(variables: Iterable[keras.Variable], values: Iterable[Any]) -> None:
    """Put arrays in the place of the variables' values, ignoring their layouts."""
    for variable, value in zip(variables, values, strict=True):
        variable._value = value


def output_tensors(layer: keras.layers.Layer) -> list[Any]:
    """Return the symbolic outputs of a layer, from each of its calls in functional models."""
    return [tensor for node in layer._inbound_nodes for tensor in node.output_tensors]


def has_keras_moments(layer: keras.layers.Layer) -> bool:
    """Return whether a layer computes the batch statistics that `keras.layers.BatchNormalization` computes."""
    return getattr(type(layer), "_moments", None) is keras.layers.BatchNormalization._moments


def replace_moments(layer: keras.layers.BatchNormalization, moments: Moments) -> None:
    """Make a layer compute its batch statistics by `moments(inputs, mask)`, until `restore_moments`."""
    layer._moments = moments


def restore_moments(layer: keras.layers.BatchNormalization) -> None:
    """Undo `replace_moments`."""
    del layer._moments


def reduction_axes(layer: keras.layers.BatchNormalization) -> list[int]:
    """Return the axes over which a built layer takes its batch statistics."""
    return layer._reduction_axes


def is_seed_state(variable: keras.Variable) -> bool:
    """Return whether a variable is the state of a `keras.random.SeedGenerator`."""
    return variable.path.endswith("seed_generator_state")


_threads = threading.local()


@contextlib.contextmanager
def losses_of_one_replica() -> Iterator[None]:
    """Temporarily compute losses, in this thread, as on one device.

    Under `tf.distribute` Keras divides its own losses by the number of replicas, but not what an overridden
    `compute_loss` adds.
    """
    module = sys.modules[keras.losses.Loss.__module__]
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        scaling = getattr(module, name)
        if not hasattr(scaling, "of_keras"):  # once and for all: replicas are threads, which take turns
            setattr(module, name, _unless_of_one_replica(scaling))
    before = getattr(_threads, "one_replica", False)
    _threads.one_replica = True
    try:
        yield
    finally:
        _threads.one_replica = before


def _unless_of_one_replica(scaling: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def scaled(value: Tensor) -> Tensor:
        return value if getattr(_threads, "one_replica", False) else scaling(value)

    scaled.of_keras = scaling  # type: ignore[attr-defined]
    return scaled


@contextlib.contextmanager
def recorded_masks() -> Iterator[list[Tensor | None]]:
    """Record, in this thread, the mask of each mean that a loss takes over the entries of a batch; None if unmasked.

    The mask comes from the predictions, from `ignore_class`, or from both. Keras divides by its valid entries.
    """
    module: Any = sys.modules[keras.losses.Loss.__module__]
    if not hasattr(module.apply_mask, "of_keras"):
        module.apply_mask = _recording(module.apply_mask)
    before = getattr(_threads, "masks", None)
    masks: list[Tensor | None] = []
    _threads.masks = masks
    try:
        yield masks
    finally:
        _threads.masks = before


def _recording(apply_mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def applied(sample_weight: Tensor, mask: Tensor, dtype: str, reduction: str) -> Tensor:
        masks = getattr(_threads, "masks", None)
        if masks is not None and reduction in ("mean", "sum_over_batch_size"):
            masks.append(mask)
        return apply_mask(sample_weight, mask, dtype=dtype, reduction=reduction)

    applied.of_keras = apply_mask  # type: ignore[attr-defined]
    return applied


def compiled_losses(model: keras.Model) -> list[keras.losses.Loss]:
    """Return the losses of a model that was compiled, and has computed its loss."""
    return [loss.loss for loss in (model._compile_loss._flat_losses or [])] if model._compile_loss else []


def loss_trackers(model: keras.Model) -> list[keras.metrics.Metric]:
    """Return the metric that follows each of `compiled_losses`; none where there is one loss."""
    return list(model._compile_loss.metrics) if model._compile_loss else []


def has_swapped(callback: keras.callbacks.SwapEMAWeights) -> bool:
    """Return True if the model has the EMA weights by this callback, and the optimizer keeps the other ones."""
    return callback._ema_weights_in_model


def single_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Return all metrics of a built model; the metrics given to `compile` come one by one."""
    compiled = model._compile_metrics
    return [m for m in model.metrics if m is not compiled] + (compiled.metrics if compiled else [])


def metric_function(metric: keras.metrics.Metric) -> Callable[..., Tensor] | None:
    """Return the function or loss whose mean a metric is; None if it is not a `MeanMetricWrapper`."""
    return metric._fn if isinstance(metric, keras.metrics.MeanMetricWrapper) else None


def layer_losses(model: keras.Model) -> list[tuple[str, Tensor]]:
    """Return the losses that layers have added in this stateless scope, each with the layer's name.

    Regularizers of weights are not among them.
    """
    return [(layer.name, loss) for layer in layers_of(model) for loss in layer._get_own_losses()]


def compute_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> Tensor:
    """Return the model's loss, called as Keras's steps do: with `training` only if an override takes it."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def compiled_parts(model: keras.Model) -> list[Any]:
    """Return the objects that `model.compile` makes or takes: optimizer, learning rate, loss and metrics."""
    inner = inner_optimizer(model.optimizer)
    return [model.optimizer, inner._learning_rate, model._compile_loss, model._compile_metrics]


def mask_of(tensor: Tensor) -> Tensor | None:
    """Return the mask that Keras's layers have attached to a tensor."""
    # Not an attribute of every tensor: JAX's take none.
    return sys.modules["keras.src.backend.common.masking"].get_keras_mask(tensor)


def set_mask(tensor: Tensor, mask: Tensor | None) -> None:
    """Attach a mask to a tensor, as Keras's layers do."""
    sys.modules["keras.src.backend.common.masking"].set_keras_mask(tensor, mask)


def has_unweighted_metrics(model: keras.Model) -> bool:
    """Return True if a model was compiled with `metrics=`; asks none of its objects for a config."""
    metrics = getattr(model, "_compile_metrics", None)
    return bool(getattr(metrics, "_user_metrics", None))


def supports_jit(model: keras.Model) -> bool:
    """Return True if Keras lets XLA compile a model with `jit_compile="auto"`: if all its layers allow it."""
    return sys.modules["keras.src.trainers.trainer"].model_supports_jit(model)
