"""`Trainer`: large global batches for any compiled Keras model, on any number of devices."""

import math
from collections.abc import Sequence
from typing import Any

import keras


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

    One device, N replicas and k micro-batches take the same step; `lars_keras.training.ghost` says how that is
    defined. The optimizer runs once for each global batch, and schedules count those updates.

    Args:
        model: a compiled `keras.Model`, created under the strategy it is to run on.
        batch_size: global batch: examples in an update.
        microbatch_size: examples that one replica takes through the model at once; a divisor of the replica's
            share of the global batch. Default, and at most: the whole share.
        updates_per_call: updates that run without returning to Python. Callbacks see the last of them.
        jit_compile: compile the gradient computation with XLA. `"auto"`: where there is a GPU or TPU.

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
        updates_per_call: int = 1,
        jit_compile: bool | str = "auto",
    ):
        if not getattr(model, "compiled", False):
            raise ValueError("`Trainer` needs a compiled model: call `model.compile(optimizer, loss)` first.")
        _check_loss(model)
        self.model = model
        self.batch_size = batch_size
        self.replicas = model.distribute_strategy.num_replicas_in_sync
        self.microbatch_size, self.microbatches = split_batch(batch_size, self.replicas, microbatch_size)
        if updates_per_call < 1:
            raise ValueError(f"`updates_per_call` must be at least 1. Received: {updates_per_call}")
        self.updates_per_call = updates_per_call
        self._jit_compile = jit_compile
        self._engine: Any = None

    def fit(
        self,
        data: Any,
        *,
        epochs: float = 1,
        steps_per_epoch: float | None = None,
        first_update: int = 0,
        validation_data: Any = None,
        validation_freq: int = 1,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int = 1,
    ) -> keras.callbacks.History:
        """Trains until update `ceil(epochs * steps_per_epoch)`.

        Args:
            data: a `tf.data.Dataset` of `(x, y)` or `(x, y, sample_weight)` batches of any size, finite or
                endless; or a function from `tf.distribute.InputContext` to the dataset of one worker's own examples.
            epochs: how many; may be a fraction.
            steps_per_epoch: updates in an epoch; may be a fraction, because batches of an endless dataset may
                cross the border of epochs: epoch `e` (from 1) ends with update `ceil(e * steps_per_epoch)`. Needed
                unless `data` is a dataset of known size, whose last partial batch is then left out.
            first_update: where to begin, for a resumed run; `data` begins there too.
            validation_data: as for `evaluate`, scored at the end of epochs.
            validation_freq: epochs between evaluations; the end of the run is always evaluated.
            callbacks: Keras callbacks. `on_train_batch_end(batch, logs)` gets the index of the last update of the
                whole run; `logs` has `loss` and metrics since the start of the epoch, `step_loss`, `learning_rate`.
            verbose: 0 for silence, else a progress bar.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: if the length of an epoch is not known.
        """
        if steps_per_epoch is None:
            data, steps_per_epoch = self._whole_batches(data)
        total = math.ceil(epochs * steps_per_epoch - 1e-9)
        engine = self._built_engine(data)
        callback_list = keras.callbacks.CallbackList(
            [*callbacks, *([keras.callbacks.ProgbarLogger()] if verbose else [])],
            add_history=True,
            model=self.model,
            epochs=math.ceil(epochs),
            steps=total,
            steps_per_epoch=steps_per_epoch,
            batch_size=self.batch_size,
            first_update=first_update,
            verbose=verbose,
        )
        self.model.stop_training = False
        iterator = engine.training_iterator(data, self.microbatch_size)
        callback_list.on_train_begin()
        update, logs = first_update, {}
        for epoch in range(math.floor(first_update / steps_per_epoch + 1e-9), math.ceil(epochs)):
            end = min(math.ceil((epoch + 1) * steps_per_epoch - 1e-9), total)
            if end == update:
                continue  # the update before covered this epoch as well
            self.model.reset_metrics()
            callback_list.on_epoch_begin(epoch)
            losses: list[float] = []
            while update < end and not self.model.stop_training:
                count = min(self.updates_per_call, end - update)
                callback_list.on_train_batch_begin(update)
                new_losses, rates, metrics = engine.train(iterator, count)
                losses.extend(new_losses)
                update += count
                logs = {
                    **metrics,
                    "loss": math.fsum(losses) / len(losses),
                    "step_loss": float(new_losses[-1]),
                    "learning_rate": float(rates[-1]),
                }
                callback_list.on_train_batch_end(update - 1, logs)
            if validation_data is not None and ((epoch + 1) % validation_freq == 0 or update == total):
                scores = self.evaluate(validation_data)
                logs = {**logs, **{f"val_{name}": value for name, value in scores.items()}}
            callback_list.on_epoch_end(epoch, logs)
            if self.model.stop_training:
                break
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        callback_list.on_train_end(logs)
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
        if (self.model.get_compile_config() or {}).get("metrics"):
            raise ValueError(
                "Metrics passed as `metrics=` ignore weights and would count the padding of the last batch. "
                "Compile with `weighted_metrics=` instead."
            )
        engine = self._built_engine(data)
        return engine.evaluate(data, self.microbatch_size)

    def _built_engine(self, data: Any) -> Any:
        """The compiled functions, made on first use, when the shapes of the examples are known."""
        if self._engine is None:
            from lars_keras.training.tensorflow_engine import TensorFlowEngine

            self._engine = TensorFlowEngine(
                self.model, data, microbatches=self.microbatches, jit_compile=self._jit_compile
            )
        return self._engine

    def _whole_batches(self, data: Any) -> tuple[Any, int]:
        """A finite dataset without its last partial batch, and the number of batches."""
        cardinality = int(data.cardinality()) if hasattr(data, "cardinality") else -1
        if cardinality < 0:
            raise ValueError(
                "`steps_per_epoch` is needed where the size of the data is not known. Received: steps_per_epoch=None"
            )
        examples = sum(len(keras.tree.flatten(batch)[0]) for batch in data)
        steps = examples // self.batch_size
        if steps == 0:
            raise ValueError(
                f"`batch_size` must be at most the number of examples, {examples}. Received: {self.batch_size}"
            )
        return data.rebatch(self.batch_size, drop_remainder=True), steps


def split_batch(batch_size: int, replicas: int, microbatch_size: int | None) -> tuple[int, int]:
    """How a global batch is cut.

    Args:
        batch_size: global batch.
        replicas: number of replicas.
        microbatch_size: examples of a replica's pass; None, or more than its share, for the whole share.

    Returns:
        `(microbatch_size, microbatches)` with `replicas * microbatch_size * microbatches == batch_size`.

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
