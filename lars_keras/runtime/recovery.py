"""A run that goes on: it saves itself, comes back after a kill, and rolls back when it diverges."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from lars_keras.runtime.checkpoint import Checkpoint, CheckpointManager, SavePolicy
from lars_keras.runtime.errors import Diverged, Preempted, UsageError
from lars_keras.training.cluster import any_across_hosts, is_chief, same_on_all_hosts, strategy_of
from lars_keras.training.trainer import Trainer


class CheckpointCallback(keras.callbacks.Callback):
    """Saves the whole state of a `Trainer` when it is due, and before the first update.

    ```python
    folder = CheckpointManager("run/checkpoints")
    if checkpoint := folder.latest():
        trainer.restore(checkpoint.arrays, checkpoint.info["position"], data)
    trainer.fit(data, ..., callbacks=[CheckpointCallback(trainer, folder, SavePolicy(minutes=10))])
    ```

    The run then ends as it would have ended without the kill, bit for bit on one device. All workers read the
    folder, the chief writes it.

    Args:
        trainer: whose state to save.
        folder: where to.
        every: when.
        about: what else to keep with each checkpoint, as JSON can hold it.
    """

    def __init__(
        self, trainer: Trainer, folder: CheckpointManager, policy: SavePolicy, about: dict[str, Any] | None = None
    ):
        super().__init__()
        self.trainer, self.folder, self.about = trainer, folder, about or {}
        self._policy = policy
        self._chief = is_chief(strategy_of(trainer.model))

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._policy.reset(self.trainer.position.update)
        if self.trainer.position.batches_consumed == 0:
            self.save()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if any_across_hosts(strategy_of(self.model), self._policy.due(batch + 1)):
            self.save()

    def save(self) -> None:
        """Saves the state now, in the background."""
        arrays, position = self.trainer.snapshot()
        if self._chief:
            self.folder.save(position["update"], arrays, {**self.about, "position": position})
        self._policy.reset(position["update"])


def fit_with_recovery(
    data: Any,
    save: CheckpointCallback,
    *,
    max_rollbacks: int = 3,
    on_rollback: Callable[[dict[str, Any]], None] = lambda rollback: None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> keras.callbacks.History:
    """`Trainer.fit` that saves itself, also when it is preempted, and rolls back when it diverges.

    After a divergence the state of the last undamaged checkpoint is restored, and the data of all updates since then,
    up to the one that diverged, are skipped.

    Args:
        data: as for `Trainer.fit`.
        save: saves the trainer's state.
        max_rollbacks: how often, over all of the run, whatever its restarts.
        on_rollback: is told of each: `{"update": restored, "failed": diverged, "reason": ...}`.
        callbacks: with a `DivergenceGuard` and a `StopOnSignal` among them for divergence and preemption to be noticed.
        **options: for `Trainer.fit`.

    Raises:
        Diverged: if the run diverges once more; the checkpoints are from before.
        Preempted: after the state is saved.
        OSError: if it could not be saved.
    """
    trainer, folder = save.trainer, save.folder
    strategy = strategy_of(trainer.model)
    rollbacks: list[dict[str, Any]] = save.about.setdefault("rollbacks", [])
    while True:
        try:
            history = trainer.fit(data, callbacks=[*callbacks, save], **options)
            folder.wait()
            return history
        except Preempted:
            save.save()
            folder.wait()
            any_across_hosts(strategy, True)  # no worker leaves before the chief has written
            raise
        except Diverged as e:
            position = trainer.position
            next_data = position.batches_consumed - (position.update - e.update)
            with contextlib.suppress(OSError):  # logged when it happened
                folder.wait()
            any_across_hosts(strategy, True)  # no worker looks before the chief has written
            checkpoint = folder.latest()
            check_all_found(strategy, checkpoint)
            if len(rollbacks) >= max_rollbacks or checkpoint is None:
                raise
            trainer.restore(checkpoint.arrays, checkpoint.info["position"], data)
            rollbacks.append({"update": checkpoint.update, "failed": e.update, "reason": str(e)})
            trainer.position.batches_consumed = next_data
            save.save()  # so that a kill from here on does not forget what to skip
            on_rollback(rollbacks[-1])
        except Exception:
            with contextlib.suppress(OSError):
                folder.wait()  # what is being written may be all that is left
            raise


def check_all_found(strategy: Any, checkpoint: Checkpoint | None) -> None:
    """All workers must go on from the same update, or they would average the gradients of different weights.

    Raises:
        UsageError: if they have not found the same checkpoint.
    """
    update = checkpoint.update if checkpoint else 0
    if not same_on_all_hosts(strategy, update):
        found = f"that of update {update}" if checkpoint else "none"
        raise UsageError(
            "--run_dir must be a folder that all workers share: they have found different checkpoints. "
            f"Found by this one: {found}"
        )
