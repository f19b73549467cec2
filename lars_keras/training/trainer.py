"""`Trainer`: large global batches for any compiled Keras model, on any number of devices."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lars_keras._keras_internals import layers_of
from lars_keras.compiled import has_accelerator
from lars_keras.training.cluster import cluster_of
from lars_keras.training.inputs import element_spec


@dataclasses.dataclass
class Position:
    """Where a run is, between two updates.

    Attributes:
        update: updates finished.
        batches_consumed: updates' worth of training data used or skipped.
        epoch: the epoch that metrics are gathered for; -1 before the first.
        losses: losses of its updates so far.
        logs: what callbacks were last told.
    """

    update: int = 0
    batches_consumed: int = 0
    epoch: int = -1
    losses: list[float] = dataclasses.field(default_factory=list)
    logs: dict[str, float] = dataclasses.field(default_factory=dict)


class Trainer:
    """Trains a compiled model in global batches, cut into micro-batches and spread over replicas.

    It takes the place of `model.fit` and `model.evaluate`; everything else stays Keras:

    ```python
    with strategy.scope():                       # any tf.distribute strategy, or none
        model = ...                              # functional, Sequential or subclassed
        model.compile(LARS(...), loss=..., weighted_metrics=[...])
    trainer = Trainer(model, batch_size=8192, microbatch_size=256)
    trainer.fit(dataset, epochs=90, steps_per_epoch=156, validation_data=test_set)
    trainer.evaluate(test_set)
    ```

    One device, N replicas and k micro-batches take the same step; `lars_keras.training.forward` says how that is
    defined. The optimizer runs once for each global batch, and schedules count those updates.

    On JAX (KERAS_BACKEND=jax) `keras.distribution.set_distribution(keras.distribution.DataParallel())` takes the place
    of the strategy.

    Args:
        model: a compiled `keras.Model`, created under the strategy it is to run on.
        batch_size: global batch: examples in an update.
        microbatch_size: examples that one replica takes through the model at once; a divisor of the replica's
            share of the global batch. Default, and at most: the whole share.
        steps_per_execution: updates that run without returning to Python. Callbacks see the last of them.
        jit_compile: compile the gradient computation with XLA. `"auto"`: where there is a GPU or TPU.
        layer_norms: measure the norms of each variable and its gradient in every update; see `layer_norms` below.
        reduce_dtype: of the gradients on their way between devices. Below "float32", on JAX only, half the traffic
            and a rounding of each device's sum.
        layer_ratios: measure what `LARS` and `LAMB` do to each variable, too.

    Attributes:
        cluster: the devices and processes of the run, found from the model; see `Cluster`.
        position: where the run is; see `Position`.
        step_losses: of the last host call, the loss of each update.
        layer_norms: of the last host call, if asked for: `{"gradient": g, "weight": w}`, float32 of shape
            `(updates, variables)`, in the order of `model.trainable_variables`; `w` after the update. With
            `layer_ratios` also `lars_keras.layerwise.MEASURES`: `"weight_norm"` before the update, `"gradient_norm"`
            as the rule sees it, clipped; trust `"ratio"`, and effective `"rate"`, the ratio times the variable's rate.

    Raises:
        ValueError: if the model is not compiled, the sizes do not divide, or an option of the model
            or optimizer has no meaning here.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        batch_size: int,
        microbatch_size: int | None = None,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        layer_norms: bool = False,
        reduce_dtype: str = "float32",
        layer_ratios: bool = False,
    ):
        if not getattr(model, "compiled", False):
            raise ValueError("`Trainer` needs a compiled model: call `model.compile(optimizer, loss)` first.")
        _check_loss(model)
        self.model = model
        self.batch_size = batch_size
        self.cluster = cluster_of(model)
        self.replicas = self.cluster.replicas
        self.microbatch_size, self.accumulation_steps = split_batch(batch_size, self.replicas, microbatch_size)
        if steps_per_execution < 1:
            raise ValueError(f"`steps_per_execution` must be at least 1. Received: {steps_per_execution}")
        _check_engine(model, self.replicas, jit_compile, reduce_dtype, layer_ratios)
        self.steps_per_execution = steps_per_execution
        self._jit_compile = jit_compile
        self._measures_norms, self._measures_ratios = layer_norms, layer_ratios
        self._reduce_dtype = reduce_dtype
        self.step_losses: list[float] = []
        self.layer_norms: dict[str, np.ndarray] = {}
        self.position = Position()
        self._resumed = False
        self._counted: tuple[Any, int] = (None, 0)
        self._engine: Any = None

    def fit(
        self,
        data: Any,
        *,
        epochs: float = 1,
        steps_per_epoch: float | None = None,
        validation_data: Any = None,
        validation_freq: int = 1,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int = 1,
    ) -> keras.callbacks.History:
        """Trains until update `ceil(epochs * steps_per_epoch)`, from the start or from where `restore` has put the run.

        Args:
            data: a `tf.data.Dataset` of `(x, y)` or `(x, y, sample_weight)` batches of any size, finite or
                endless, the same each time it is read; or a function of `tf.distribute.InputContext` and the
                number of an update that gives the endless dataset of one worker's own examples from that update on.
            epochs: how many; may be a fraction.
            steps_per_epoch: updates in an epoch; may be a fraction, because batches of an endless dataset may
                cross the border of epochs: epoch `e` (from 1) ends with update `ceil(e * steps_per_epoch)`. Needed
                unless `data` is a dataset of known size, whose last partial batch is then left out.
            validation_data: as for `evaluate`, scored at the end of epochs.
            validation_freq: epochs between evaluations; the end of the run is always evaluated.
            callbacks: Keras callbacks. `on_train_batch_end(batch, logs)` gets the index of the last update of the
                whole run; `logs` has `loss` and metrics since the start of the epoch, `step_loss`, `learning_rate`,
                and `data_wait`, the seconds that the devices stood idle for want of data since the last call.
            verbose: 0 for silence, else a progress bar.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: if the length of an epoch is not known; if there are validation data that `evaluate` will
                refuse to score; for an optimizer that cannot be applied to summed gradients.
        """
        if validation_data is not None:
            self._check_metrics()
        if steps_per_epoch is None:
            data, steps_per_epoch = self._whole_batches(data)
        total = math.ceil(epochs * steps_per_epoch - 1e-9)
        ends = [min(math.ceil((e + 1) * steps_per_epoch - 1e-9), total) for e in range(math.ceil(epochs))]
        while len(ends) > 1 and ends[-2] == total:  # nothing is left for the last epoch
            ends.pop()
        engine = self._built_engine(data, 0)
        if not self._resumed:
            self.position = Position()
        self._resumed = False
        position = self.position
        callback_list = keras.callbacks.CallbackList(
            [*callbacks, *([keras.callbacks.ProgbarLogger()] if verbose else [])],
            add_history=True,
            model=self.model,
            epochs=len(ends),
            steps=total,
            steps_per_epoch=steps_per_epoch,
            batch_size=self.batch_size,
            first_update=position.update,
            verbose=verbose,
        )
        self.model.stop_training = False
        iterator = engine.training_iterator(data, self.microbatch_size, position.batches_consumed)
        callback_list.on_train_begin()
        for epoch, end in enumerate(ends):
            # A run that was resumed at an epoch's end may still have to evaluate it.
            if end < position.update or (epoch > 0 and end == ends[epoch - 1]):
                continue
            if position.epoch != epoch:
                position.epoch, position.losses = epoch, []
                self.model.reset_metrics()
            callback_list.on_epoch_begin(epoch)
            while position.update < end and not self.model.stop_training:
                count = min(self.steps_per_execution, end - position.update)
                callback_list.on_train_batch_begin(position.update)
                self.step_losses, rates, metrics, self.layer_norms = engine.train(iterator, count)
                position.losses += self.step_losses
                position.update += count
                position.batches_consumed += count
                position.logs = {
                    **metrics,
                    "loss": math.fsum(position.losses) / len(position.losses),
                    "step_loss": self.step_losses[-1],
                    "learning_rate": rates[-1],
                }
                # Not part of the position: a resumed run waits otherwise.
                callback_list.on_train_batch_end(position.update - 1, {**position.logs, "data_wait": engine.data_wait})
            logs = position.logs
            if validation_data is not None and ((epoch + 1) % validation_freq == 0 or position.update == total):
                with engine.ema_weights():
                    scores = self._evaluate(validation_data, callback_list.on_test_batch_end)
                logs = {**logs, **{f"val_{name}": value for name, value in scores.items()}}
            callback_list.on_epoch_end(epoch, logs)
            if self.model.stop_training:
                break
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        callback_list.on_train_end(position.logs)
        return self.model.history

    def evaluate(self, data: Any) -> dict[str, float]:
        """Scores every example exactly once, at any batch size and number of replicas.

        Args:
            data: a finite `tf.data.Dataset` of `(x, y)` or `(x, y, weight)` batches of any size; or a function from
                `tf.distribute.InputContext` to one worker's own examples, as many batches on each worker.

        Returns:
            `loss`, the compiled `weighted_metrics`, and `n`, the sum of the weights: the number of examples where none
            were given.

        Raises:
            ValueError: if the model was compiled with `metrics=`, which would count the padding of the last batch.
        """
        return self._evaluate(data, lambda batch: None)

    def _evaluate(self, data: Any, after_batch: Callable[[int], None]) -> dict[str, float]:
        self._check_metrics()
        return self._built_engine(data).evaluate(data, self.microbatch_size, after_batch)

    def _check_metrics(self) -> None:
        if (self.model.get_compile_config() or {}).get("metrics"):
            raise ValueError(
                "Metrics passed as `metrics=` ignore weights and would count the padding of the last batch. "
                "Compile with `weighted_metrics=` instead."
            )

    def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The whole state of the run between two updates: weights, optimizer, random numbers, metrics and position.

        Every worker must call it. `fit` must have begun.

        Returns:
            Arrays, and the rest, which JSON can hold.
        """
        return self._engine.snapshot(), dataclasses.asdict(self.position)

    def restore(self, arrays: Mapping[str, np.ndarray], position: Mapping[str, Any], data: Any) -> None:
        """Puts back what `snapshot` returned; the next `fit` goes on from there.

        Args:
            arrays, position: from `snapshot`.
            data: as for `fit`, for the shapes of its examples.

        Raises:
            ValueError: if the model or optimizer has other variables; nothing is changed then.
        """
        self._built_engine(data, 0).restore(arrays)
        self.position = Position(**{field.name: position[field.name] for field in dataclasses.fields(Position)})
        self._resumed = True

    def save_model(self, path: str | os.PathLike, write: bool = True) -> None:
        """Writes the model and its optimizer as a `.keras` file. `fit` must have begun.

        Every worker must call it, because each may hold a share of the weights; `write` is for one of them.
        """
        self._engine.save_model(path, write)

    def _built_engine(self, data: Any, *first_update: int) -> Any:
        """The compiled functions, made on first use, when the shapes of the examples are known."""
        if self._engine is None:
            engine: Any
            options: dict[str, Any] = {
                "accumulation_steps": self.accumulation_steps,
                "layer_norms": self._measures_norms,
                "layer_ratios": self._measures_ratios,
            }
            if keras.backend.backend() == "jax":
                from lars_keras.training.jax.engine import JaxEngine as engine

                options["reduce_dtype"] = self._reduce_dtype
            else:
                from lars_keras.training.tensorflow.engine import TensorFlowEngine as engine

                options["jit_compile"] = self._jit_compile
            self._engine = engine(self.model, element_spec(data, *first_update), **options)
        return self._engine

    def _whole_batches(self, data: Any) -> tuple[Any, int]:
        """A finite dataset without its last partial batch, and the number of batches."""
        cardinality = int(data.cardinality()) if hasattr(data, "cardinality") else -1
        if cardinality < 0:
            raise ValueError(
                "`steps_per_epoch` is needed where the size of the data is not known. Received: steps_per_epoch=None"
            )
        if self._counted[0] is not data:
            self._counted = data, sum(len(keras.tree.flatten(batch)[0]) for batch in data)
        examples = self._counted[1]
        steps = examples // self.batch_size
        if steps == 0:
            raise ValueError(
                f"`batch_size` must be at most the number of examples, {examples}. Received: {self.batch_size}"
            )
        ghosts = data.rebatch(self.microbatch_size, drop_remainder=True)  # never a global batch in one piece
        return ghosts.take(steps * self.accumulation_steps * self.replicas), steps


def _check_engine(
    model: keras.Model, replicas: int, jit_compile: bool | str, reduce_dtype: str, layer_ratios: bool
) -> None:
    """Refuses what the engine of this backend cannot do."""
    if keras.backend.backend() != "jax":
        if reduce_dtype != "float32":
            raise ValueError(
                "On TensorFlow gradients are reduced in float32; --reduce_dtype is for KERAS_BACKEND=jax. Received: "
                f"reduce_dtype={reduce_dtype}"
            )
        synchronized = any(getattr(layer, "synchronized", False) for layer in layers_of(model))
        if jit_compile is True and synchronized and replicas > 1 and not has_accelerator():
            raise ValueError(
                "XLA compiles no traffic between CPU replicas, as --sync_batch_norm asks for. Use --jit_compile=off. "
                "Received: jit_compile=True (--jit_compile=on)"
            )
        return
    if not jit_compile:
        raise ValueError("On JAX every update is compiled. Received: jit_compile=False (--jit_compile=off)")
    if layer_ratios and isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "On JAX the telemetry of layers (--telemetry_every) does not go with dynamic loss scaling "
            "(--precision=mixed_float16)."
        )


def split_batch(batch_size: int, replicas: int, microbatch_size: int | None) -> tuple[int, int]:
    """How a global batch is cut.

    Args:
        batch_size: global batch.
        replicas: number of replicas.
        microbatch_size: examples of a replica's pass; None, or more than its share, for the whole share.

    Returns:
        `(microbatch_size, accumulation_steps)` with `replicas * microbatch_size * accumulation_steps == batch_size`.

    Raises:
        ValueError: if that has no whole solution; the message names the nearest sizes that do.
    """
    if batch_size < 1 or batch_size % replicas:
        below = batch_size // replicas * replicas
        raise ValueError(
            f"`batch_size` must be a multiple of the {replicas} replicas, such as {max(below, replicas)}. "
            f"Received: batch_size={batch_size}"
        )
    share = batch_size // replicas
    if microbatch_size is None or microbatch_size > share:
        return share, 1
    if microbatch_size < 1 or share % microbatch_size:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - microbatch_size))
        raise ValueError(
            f"`microbatch_size` must divide the {share} examples of each replica, such as {nearest}. "
            f"Received: microbatch_size={microbatch_size}, batch_size={batch_size}, replicas={replicas}"
        )
    return microbatch_size, share // microbatch_size


def _check_loss(model: keras.Model) -> None:
    """Micro-batches of a sum or of a weighted mean do not add up to that of the whole batch."""
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                'The loss must be the mean over the batch, reduction="sum_over_batch_size". '
                f"Received: {type(loss).__name__}(reduction={reduction!r})"
            )
