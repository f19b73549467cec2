"""The loop of `Trainer.fit`: updates, evaluations and callbacks, in the order of Keras's `fit`."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
from absl import logging

from lars_keras.training.callback_memory import swaps_at_epochs
from lars_keras.training.cluster import Cluster
from lars_keras.training.inputs import DataEnded
from lars_keras.training.position import Position
from lars_keras.training.state import kept_random_state, kept_rate
from lars_keras.training.votes import hold_vote


@dataclasses.dataclass(frozen=True)
class EpochLoop:
    """Takes the epochs of one `fit`.

    Args:
        model: the model.
        cluster: the hosts, which stop together.
        position: the place of the run, which `execute` moves.
        callback_list: the callbacks, after `on_train_begin`.
        ends: the last update of each epoch.
        updates_per_call: the most updates of a call of `execute`.
        may_end: True if the data may end before the last update.
        execute: takes this many updates, and returns the seconds that the devices waited for data.
        check_unchanged: raises an error if a callback has compiled or changed the model.
        averaged: returns a context in which the model has the EMA of its weights.
        validate: returns the scores of the validation data; None without such data.
        validated: returns True for the epochs, from 1, that are evaluated. The epoch of the last update always is.
    """

    model: keras.Model
    cluster: Cluster
    position: Position
    callback_list: keras.callbacks.CallbackList
    ends: Sequence[int]
    updates_per_call: int
    may_end: bool
    execute: Callable[[int], float]
    check_unchanged: Callable[[], None]
    averaged: Callable[[], contextlib.AbstractContextManager]
    validate: Callable[[], dict[str, Any]] | None
    validated: Callable[[int], bool]

    def run(self) -> dict[str, Any]:
        """Train to the end of the last epoch, or until a host stops; return the last logs."""
        logs = self.position.logs
        for epoch, end in enumerate(self.ends):
            # A run that was resumed at an epoch's end may still have to evaluate it.
            over = end == self.position.update < self.ends[-1] and epoch < self.position.ended
            if over or end < self.position.update or (epoch > 0 and end == self.ends[epoch - 1]):
                continue
            self._begin_epoch(epoch)
            last = self._end_updates(self._train_until(end))
            logs = self._end_epoch(epoch, last)
            if self._stops():
                break
        return logs

    def _begin_epoch(self, epoch: int) -> None:
        resumed = self.position.epoch == epoch
        if not resumed:
            self.position.begin_epoch(epoch)
            self.model.reset_metrics()
        with kept_rate(self.model) if resumed else contextlib.nullcontext():  # callbacks have set it before the stop
            self.callback_list.on_epoch_begin(epoch)
        self.check_unchanged()

    def _train_until(self, end: int) -> bool:
        """Take updates until `end`, or until a host or the data stop the run; return True if one does."""
        position, callbacks = self.position, self.callback_list
        stop = False  # as in Keras, a stop from before acts after the next call
        while position.update < end and not stop:
            callbacks.on_train_batch_begin(position.update)
            try:
                data_wait = self.execute(min(self.updates_per_call, end - position.update))
            except DataEnded as error:
                if not self.may_end or not position.update:
                    raise
                logging.warning("%s The training ends with update %d of %d.", error, position.update, self.ends[-1])
                return True
            # Not part of the position: a resumed run waits otherwise.
            logs = {**position.logs, "data_wait": data_wait}
            stop = hold_vote(self.cluster, callbacks.callbacks, position.update, logs, self.model.stop_training)
            callbacks.on_train_batch_end(position.update - 1, logs)
            if self.cluster.hosts == 1:
                stop = self.model.stop_training
        return stop

    def _end_updates(self, stop: bool) -> bool:
        """Call the callbacks, and return True if no update follows."""
        last = self._stops(stop) or self.position.update == self.ends[-1]
        for callback in self.callback_list.callbacks:
            if hasattr(callback, "on_updates_end"):
                callback.on_updates_end(last)
        self.check_unchanged()
        return last

    def _end_epoch(self, epoch: int, last: bool) -> dict[str, Any]:
        """Evaluate if the epoch is to be or no update follows, call the callbacks, and return their logs."""
        logs = self.position.logs if self.position.counted else {}  # the data may have ended with the epoch before
        with contextlib.ExitStack() as averaged:
            averaged.enter_context(self.averaged())
            if self.validate and (last or self.validated(epoch + 1)):
                with kept_random_state(self.model):
                    scores = self.validate()
                logs = logs | {f"val_{name}": value for name, value in scores.items()}
            if any(map(swaps_at_epochs, self.callback_list.callbacks)):
                averaged.close()
            self.callback_list.on_epoch_end(epoch, logs)  # `ModelCheckpoint` saves the weights that were scored
        self.position.ended = epoch + 1
        return logs

    def _stops(self, stop: bool = False) -> bool:
        """Return True if a host is to stop, by `stop` or its model, and tell the models of all. Collective."""
        [self.model.stop_training] = self.cluster.any_across_hosts(stop or self.model.stop_training)
        return self.model.stop_training
