"""`Trainer`: large global batches for any compiled Keras model, on any number of devices."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging

from lars_keras._keras_internals import inner_optimizer, learning_rate_of
from lars_keras.checks import check_count
from lars_keras.noise_scale import check_ghost_batches
from lars_keras.training.averages import warn_of_long_averages
from lars_keras.training.batch_data import GeneratorFeed, IndexedFeed
from lars_keras.training.callback_memory import (
    check_callbacks,
    has_swapped,
    memory_of,
    reads_scores,
    restore_memory,
    unpacked,
)
from lars_keras.training.cluster import cluster_of
from lars_keras.training.current_engine import CurrentEngine
from lars_keras.training.engine import Engine, EngineOptions, Scores, as_log
from lars_keras.training.epoch_loop import EpochLoop
from lars_keras.training.given_data import GivenData
from lars_keras.training.inputs import Data
from lars_keras.training.position import Position
from lars_keras.training.progress_bar import ProgressBar
from lars_keras.training.sizes import epoch_ends, epochs_to_validate, split_batch
from lars_keras.training.state import (
    EmaWeights,
    check_identity,
    finalize,
    identity_of,
    kept_random_state,
    without_other_metrics,
)
from lars_keras.training.votes import hold_vote


class Trainer:
    """Train a compiled model in global batches, cut into micro-batches and spread over replicas.

    It replaces `model.fit` and `model.evaluate`; everything else stays Keras:

    ```python
    with strategy.scope():                       # any tf.distribute strategy, or none
        model = ...                              # functional, Sequential or subclassed
        model.compile(LARS(...), loss=..., metrics=[...])
    trainer = Trainer(model, batch_size=8192, microbatch_size=256)
    trainer.fit(x, y, epochs=90, validation_data=(x_test, y_test))  # or a dataset, a PyDataset, a loader
    trainer.evaluate(x_test, y_test)
    ```

    One device, N replicas and k micro-batches take the same step; `lars_keras.training.forward` defines it. The
    optimizer runs once for each global batch, and schedules count these updates.

    On JAX (KERAS_BACKEND=jax) call `keras.distribution.set_distribution(keras.distribution.DataParallel())` before the
    model is made, in place of the strategy.

    Args:
        model: a compiled `keras.Model`, created under the strategy it is to run on.
        batch_size: global batch size: examples in an update.
        microbatch_size: examples that one replica takes through the model at once; a divisor of
            `batch_size / replicas`, which is the default and the maximum.
        steps_per_execution: updates that run without returning to Python. Callbacks see the last of them. Default: the
            value given to `compile`.
        jit_compile: compile the gradient computation with XLA. `"auto"`: if there is a GPU or TPU, and all layers of
            the model allow it. JAX always compiles.
        variable_norms: measure the norms of each variable and its gradient in every update; see `measures`.
        reduce_dtype: dtype of the gradients on their way between devices. A dtype below "float32", on JAX only, saves
            half the traffic and rounds each device's sum.
        trust_ratios: measure the trust ratio and the effective rate that `LARS` or `LAMB` gives each variable.
        noise_scale: measure the norms that `lars_keras.noise_scale` needs, and `variable_norms`. An update must have
            several ghost batches.

    Attributes:
        cluster: the devices and processes of the run, found from the model; see `Cluster`.
        replicas: number of replicas of the cluster.
        accumulation_steps: micro-batches of each replica in an update.
        position: the place of the run; see `Position`.
        callbacks: callbacks of the last `fit`.
        resumed: True if the last `fit` went on from a restored position.
        step_losses: the loss of each update of the last execution.
        measures: the requested measures of the last execution, each float32 of shape `(updates, variables)`, in the
            order of `model.trainable_variables`. With `variable_norms` the norms `"gradient"`, and `"weight"` after the
            update. With `trust_ratios` also `lars_keras.layerwise.MEASURES`: `"weight_norm"` before the update,
            `"gradient_norm"` as the rule sees it, clipped; trust `"ratio"`, and effective `"rate"`, the ratio times
            the variable's rate. With `noise_scale` also `"ghost_gradient"`, the root mean square of the norms of the
            ghost-batch gradients.

    Raises:
        ValueError: if the model is not compiled, or has its own `train_step`, `test_step`, `fit` or another loop, which
            would not be called; if the sizes do not divide; if the engine does not support an option, the model or the
            optimizer.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        batch_size: int,
        microbatch_size: int | None = None,
        steps_per_execution: int | None = None,
        jit_compile: bool | str = "auto",
        variable_norms: bool = False,
        reduce_dtype: str = "float32",
        trust_ratios: bool = False,
        noise_scale: bool = False,
    ):
        if not getattr(model, "compiled", False):
            raise ValueError("`Trainer` needs a compiled model: call `model.compile(optimizer, loss)` first.")
        batch_size = check_count("batch_size", batch_size, at_least=1)
        if steps_per_execution is None:
            steps_per_execution = getattr(model, "steps_per_execution", 1)
        steps_per_execution = check_count("steps_per_execution", steps_per_execution, at_least=1)
        if jit_compile not in (True, False, "auto"):
            raise ValueError(f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}')
        self.model, self.batch_size, self.steps_per_execution = model, batch_size, steps_per_execution
        self.cluster = cluster_of(model)
        self.replicas = self.cluster.replicas
        self.microbatch_size, self.accumulation_steps = split_batch(batch_size, self.replicas, microbatch_size)
        if microbatch_size and microbatch_size > self.microbatch_size:
            logging.warning(
                "A replica has %d examples of an update, so the micro-batch is as large, not microbatch_size=%d.",
                self.microbatch_size,
                microbatch_size,
            )
        if noise_scale:
            check_ghost_batches(self.microbatch_size, batch_size)
        options = EngineOptions(
            microbatch_size=self.microbatch_size,
            accumulation_steps=self.accumulation_steps,
            jit_compile=jit_compile,
            reduce_dtype=reduce_dtype,
            variable_norms=variable_norms or noise_scale,
            trust_ratios=trust_ratios,
            noise_scale=noise_scale,
        )
        self._current = CurrentEngine(model, self.cluster, options)
        self.position = Position()
        self.step_losses: list[float] = []
        self.measures: dict[str, np.ndarray] = {}
        self._restored: Engine | None = None
        self.resumed = False
        self._ema: EmaWeights | None = None
        self._has_raw_weights = False  # those that training continues from, not the average of them
        self.callbacks: Sequence[keras.callbacks.Callback] = ()
        self._sizes = {"batch_size": batch_size, "microbatch_size": self.microbatch_size}
        self._given = GivenData(batch_size, self.microbatch_size, self.replicas, self.cluster.hosts)

    @property
    def engine(self) -> Engine | None:
        """The compiled functions; None until `fit`, `evaluate` or `restore` has seen the shapes of the data."""
        return self._current.engine

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        epochs: float = 1,
        steps_per_epoch: float | None = None,
        validation_data: Any = None,
        validation_freq: int | Sequence[int] = 1,
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
        verbose: int | str = 1,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        seed: int = 0,
    ) -> keras.callbacks.History:
        """Train until update `ceil(epochs * steps_per_epoch)`, from the start or from the restored position.

        Args:
            x: the data, in one of these forms:
                - arrays or tensors of all examples, also a dictionary, list or tuple of them for several inputs;
                - batches of any size of `(x,)`, `(x, y)` or `(x, y, sample_weight)`: a `tf.data.Dataset`, finite or
                  endless; a `keras.utils.PyDataset`; a torch `DataLoader`; a Grain dataset or loader; a generator; or
                  an iterable such as a list of tuples, the same each time it is read;
                - a function of `lars_keras.training.inputs.InputContext` and the number of an update, which returns
                  the endless batches of one host's own examples from that update on.
            y: targets, if `x` is arrays.
            epochs: number of epochs; may be a fraction.
            steps_per_epoch: updates in an epoch; may be a fraction, because batches of an endless dataset may
                cross the border of epochs: epoch `e` (from 1) ends with update `ceil(e * steps_per_epoch)`. It may be
                left out if the size of the data is known; each epoch then leaves out its last partial global batch.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or `x` as for `evaluate`; scored at the end of epochs.
            validation_freq: number of epochs between evaluations, or a list of the epochs, from 1, to evaluate. The
                epoch of the last update is always evaluated, unless a callback stops the run at the end of an epoch.
            callbacks: Keras callbacks, or one. `on_train_batch_end(batch, logs)` gets the index of the last update of
                the whole run; `logs` has `loss` and metrics since the start of the epoch, `step_loss`, `learning_rate`,
                and `data_wait`, the seconds that the devices waited for data since the last call.
                `on_test_batch_end` gets the scores so far, which are fetched only for a callback that defines it.
                A callback may have a method `on_updates_end(last)`. It is called after the updates of an epoch, before
                they are evaluated; `last` is True if no update follows. If the optimizer keeps EMA weights, the model
                has them in `on_epoch_end`, as it had when it was scored. On several hosts, `model.stop_training` on one
                stops all of them, after the next call of the engine.
            verbose: 0 for silence, else a progress bar.
            shuffle: order arrays, or the batches of a `PyDataset`, anew in each epoch. Other data keep their order.
            class_weight: weight of the examples of each class, for arrays, a `PyDataset` and a `tf.data.Dataset`.
            sample_weight: weights, if `x` is arrays.
            seed: seed of the order. The order depends on it and on the epoch only, so a resumed run continues exactly.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: if the length of an epoch is not known; if the data have no known form; if `evaluate` would
                refuse to score the validation data; if a callback is `BackupAndRestore`, or on several hosts of JAX
                `ModelCheckpoint`; if no variable is trainable, or the loss depends on no trainable variable; if
                layers were frozen, unfrozen, added or removed without another `model.compile`.
        """
        callbacks = unpacked(callbacks)
        check_callbacks(callbacks, self.cluster.hosts)
        validated = epochs_to_validate(validation_freq)
        validation_data = self._given.validation(validation_data)
        data = self._given.training(x, y, sample_weight, class_weight, shuffle, seed)
        if steps_per_epoch is None:
            data, steps_per_epoch = self._given.whole_updates(data)
        ends = epoch_ends(epochs, steps_per_epoch)
        total = ends[-1] if ends else 0
        engine = self._current.for_training(data, validation_data)
        warn_of_long_averages(self.model, total)
        restored = self._restored
        if restored not in (None, engine):
            raise ValueError("The model was compiled again after `restore`. Compile it before you restore.")
        self.resumed = restored is not None
        if not restored:
            self.position = Position()
        position, self._has_raw_weights = self.position, True
        if beyond := position.update > total:
            logging.warning(
                "Nothing is trained: the restored run is at update %d, and this `fit` ends with update %d. Ask for "
                "more epochs to go on.",
                position.update,
                total,
            )
        order = getattr(data, "order", None)
        if position.order not in (None, order):
            logging.warning("The order of examples differs from the saved run's, so the run will not continue exactly.")
        position.order = order
        callback_list = keras.callbacks.CallbackList(
            [*callbacks, *([ProgressBar(ends)] if verbose else [])],
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
        iterator = engine.training_iterator(data, position.batches_consumed, max(total - position.update, 0))
        self.callbacks = ()  # they remember another run until `on_train_begin` has reset them
        callback_list.on_train_begin()
        self.callbacks = callback_list.callbacks
        if self.resumed and position.update:
            restore_memory(self.callbacks, position.callbacks)
        [wanted] = self.cluster.any_across_hosts(any(map(reads_scores, self.callbacks)))
        validate = functools.partial(self._evaluate, engine, validation_data, callback_list, wanted)
        may_end = isinstance(data, GeneratorFeed)
        loop = EpochLoop(
            self.model,
            self.cluster,
            position,
            callback_list,
            ends,
            updates_per_call=1 if may_end else self.steps_per_execution,  # to know how many came before the end
            may_end=may_end,
            execute=lambda updates: self._execute(engine, iterator, updates),
            check_unchanged=lambda: self._current.check_unchanged(engine),
            averaged=lambda: self._averaged(engine),
            validate=None if validation_data is None else validate,
            validated=validated,
        )
        logs = loop.run()
        if isinstance(data, IndexedFeed):
            data.hooks.end(close=True)
        if not beyond:
            if ends:
                finalize(self.model)
            self._restored, self._has_raw_weights = None, False
        callback_list.on_train_end(logs)
        return self.model.history

    def _execute(self, engine: Engine, iterator: Any, updates: int) -> float:
        """Take `updates` updates, move the position, and return the seconds that the devices waited for data."""
        result = engine.train(iterator, updates)
        self._restored = None
        self.step_losses, self.measures = result.losses, result.measures
        position = self.position
        position.update += updates
        position.batches_consumed += updates
        position.add_losses(result.losses)
        position.logs = {
            **result.metrics,
            "loss": position.mean_loss(),
            "step_loss": result.losses[-1],
            "learning_rate": result.learning_rates[-1],
        }
        return result.data_wait

    def evaluate(self, x: Any, y: Any = None, *, sample_weight: Any = None, verbose: int | str = 0) -> dict[str, Any]:
        """Score every example exactly once, at any batch size and number of replicas.

        A callback of `fit` may call this: metrics and random numbers of the training then stay as they are.

        Args:
            x: finite data as for `fit`; or a function of `lars_keras.training.inputs.InputContext` that returns
                batches of one host's own examples, equally many on each host.
            y: targets, if `x` is arrays.
            sample_weight: weights, if `x` is arrays.
            verbose: as in Keras: 0 for silence; 1 or "auto" for a progress bar, which waits for the devices after each
                batch; 2 for a line at the end.

        Returns:
            `loss`, the compiled metrics, and `n`, the sum of the weights: the number of examples if none
            were given.

        Raises:
            ValueError: if the data have no known form or no end. On several hosts and on TPUs, if the model would count
                the padding of the last batch, as `metrics=` do and `weighted_metrics=` do not.
        """
        data = self._given.scoring(x, y, sample_weight)
        bars = [keras.callbacks.ProgbarLogger()] if verbose else []
        callback_list = keras.callbacks.CallbackList(bars, verbose=verbose, epochs=1, steps=None)
        [wanted] = self.cluster.any_across_hosts(verbose in (1, "auto"))
        engine = self._current.of(data)
        with contextlib.ExitStack() as kept:
            if self._has_raw_weights:
                kept.enter_context(kept_random_state(self.model))
                kept.enter_context(engine.kept_metrics())
            return self._evaluate(engine, data, callback_list, wanted)

    def _evaluate(
        self, engine: Engine, data: Data, callback_list: keras.callbacks.CallbackList, wanted: bool
    ) -> dict[str, Any]:
        def after_batch(batch: int, scores: Scores) -> None:
            hold_vote(self.cluster, callback_list.callbacks, self.position.update, {})
            callback_list.on_test_batch_end(batch, scores() if wanted else {})

        with self._averaged(engine):
            callback_list.on_test_begin()
            scores = engine.evaluate(data, callback_list.on_test_batch_begin, after_batch)
            callback_list.on_test_end(scores)
        return scores

    @contextlib.contextmanager
    def _averaged(self, engine: Engine) -> Iterator[None]:
        """Give the model the EMA weights, unless it has them already: within this, or after the end of `fit`."""
        inside = self._ema is not None and self._ema.in_force
        if inside or not self._has_raw_weights or any(map(has_swapped, self.callbacks)):
            yield
            return
        self._ema = engine.ema_weights()
        with self._ema:
            yield

    def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the state of the run between two updates: weights, optimizer, random numbers, metrics and position.

        Collective: call it on every host. `fit` must have begun.

        Returns:
            A dictionary of arrays, and the position, as values for JSON.
        """
        if self.callbacks:
            self.position.callbacks = memory_of(self.callbacks)
        logs = {name: np.asarray(value).tolist() for name, value in self.position.logs.items()}
        position = dataclasses.asdict(self.position) | {"logs": logs, "identity": identity_of(self.model)}
        position["sizes"] = self._sizes
        with self._ema.suspended() if self._ema else contextlib.nullcontext():
            return self._current.running().snapshot(), position

    def restore(self, arrays: Mapping[str, np.ndarray], position: Mapping[str, Any], data: Any) -> None:
        """Restore a snapshot; the next `fit` goes on from there.

        If the model has other metrics, they begin anew, with a warning.

        Args:
            arrays: from `snapshot`.
            position: from `snapshot`.
            data: `(x, y)`, `(x, y, sample_weight)` or `x` as for `fit`; gives the shapes of the examples.

        Raises:
            ValueError: if the model or optimizer has other variables, or variables with the same shapes and other
                paths, or the optimizer is of another class; nothing is changed then.
        """
        if self._current.is_current():
            engine = self._current.to_restore()
        else:
            engine = self._current.of(self._given.training(*(data if isinstance(data, tuple) else (data,))), 0)
        identity = position.get("identity")
        check_identity(self.model, identity)
        before = self._stored_rate()
        engine.restore(without_other_metrics(self.model, arrays, identity))
        if before != (rate := self._stored_rate()):
            logging.warning("The learning rate is the saved one, %g. The optimizer was compiled with %g.", rate, before)
        if (sizes := position.get("sizes", self._sizes)) != self._sizes:
            logging.warning("Saved with %s. With %s the run will not continue exactly.", sizes, self._sizes)
        fields = {field.name for field in dataclasses.fields(Position)}
        self.position = Position(**{name: value for name, value in position.items() if name in fields})
        self.position.logs = {name: as_log(value) for name, value in self.position.logs.items()}
        self.callbacks = ()
        self._restored, self._has_raw_weights = engine, True

    def _stored_rate(self) -> float | None:
        """Return the learning rate if it is stored in a variable; None if a schedule sets it."""
        rate = learning_rate_of(inner_optimizer(self.model.optimizer))
        return float(keras.ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None

    def save_model(self, path: str | os.PathLike, write: bool = True) -> None:
        """Write the model and its optimizer to a `.keras` file. `fit` must have begun.

        Collective: call it on every host, because each may hold a shard of the weights.

        Args:
            path: path of the file.
            write: True on the one host that writes the file.
        """
        self._current.running().save_model(path, write)
