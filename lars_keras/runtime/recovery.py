"""Training that saves itself, continues after a kill, and rolls back after a divergence."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from lars_keras.runtime.checkpoint import Checkpoint, CheckpointManager, SavePolicy
from lars_keras.runtime.errors import Diverged, Preempted, UsageError
from lars_keras.training.cluster import Cluster
from lars_keras.training.trainer import Trainer


class CheckpointCallback(keras.callbacks.Callback):
    """Saves the state of a `Trainer` before the first update and whenever the policy asks for it.

    ```python
    manager = CheckpointManager("run/checkpoints")
    if checkpoint := manager.latest():
        trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], data)
    trainer.fit(data, ..., callbacks=[CheckpointCallback(trainer, manager, SavePolicy(minutes=10))])
    ```

    A run that is killed and continued this way ends as if it had not been killed, bit for bit on one device. All hosts
    read the checkpoints, and the chief writes them.

    Args:
        trainer: the trainer whose state is saved.
        manager: writes the checkpoints.
        policy: decides when to save.
        metadata: JSON-serializable values to save with each checkpoint.

    Attributes:
        trainer: as passed.
        manager: as passed.
        metadata: as passed; changes enter the next checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        manager: CheckpointManager,
        policy: SavePolicy,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.trainer, self.manager, self.metadata = trainer, manager, metadata if metadata is not None else {}
        self._policy = policy

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._policy.reset(self.trainer.position.update)
        if self.trainer.position.batches_consumed == 0:
            self.save()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.trainer.cluster.any_across_hosts(self._policy.due(batch + 1)):
            self.save()

    def save(self) -> None:
        """Save the state now, in the background. Collective: call it on every host."""
        arrays, position = self.trainer.snapshot()
        if self.trainer.cluster.is_chief:
            self.manager.save(position["update"], arrays, {**self.metadata, "position": position})
        self._policy.reset(position["update"])


def fit_with_recovery(
    data: Any,
    checkpoints: CheckpointCallback,
    *,
    max_rollbacks: int = 3,
    on_rollback: Callable[[dict[str, Any]], None] = lambda rollback: None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> keras.callbacks.History:
    """Run `Trainer.fit` with checkpoints, save on preemption, and roll back after a divergence.

    A rollback restores the last undamaged checkpoint. It skips the data of all updates since that checkpoint, up to and
    including the update that diverged.

    Args:
        data: as for `Trainer.fit`.
        checkpoints: saves the state of its trainer, which is trained.
        max_rollbacks: number of rollbacks in the whole run, restarts included.
        on_rollback: function of each rollback, `{"update": restored, "failed": diverged, "reason": ...}`.
        callbacks: Keras callbacks. `DivergenceGuard` detects divergence, and `StopOnSignal` detects preemption.
        **options: further arguments of `Trainer.fit`.

    Returns:
        The history of the last `Trainer.fit`.

    Raises:
        Diverged: if the run diverges after `max_rollbacks` rollbacks. All checkpoints precede the divergence.
        Preempted: after the state is saved.
        OSError: if the last state cannot be saved.
        UsageError: if hosts find different checkpoints for a rollback.
    """
    trainer, manager = checkpoints.trainer, checkpoints.manager
    cluster = trainer.cluster
    rollbacks: list[dict[str, Any]] = checkpoints.metadata.setdefault("rollbacks", [])
    while True:
        try:
            history = trainer.fit(data, callbacks=[*callbacks, checkpoints], **options)
            manager.wait()
            return history
        except Preempted:
            checkpoints.save()
            manager.wait()
            cluster.any_across_hosts(True)  # no host leaves before the chief has written
            raise
        except Diverged as e:
            position = trainer.position
            next_batch = position.batches_consumed - (position.update - e.update)
            with contextlib.suppress(OSError):  # logged when it happened
                manager.wait()
            cluster.any_across_hosts(True)  # no host reads before the chief has written
            checkpoint = manager.latest()
            require_same_checkpoint(cluster, checkpoint)
            if len(rollbacks) >= max_rollbacks or checkpoint is None:
                raise
            trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], data)
            rollbacks.append({"update": checkpoint.update, "failed": e.update, "reason": str(e)})
            trainer.position.batches_consumed = next_batch
            checkpoints.save()  # a kill from here on must not forget what to skip
            on_rollback(rollbacks[-1])
        except Exception:
            with contextlib.suppress(OSError):
                manager.wait()  # the checkpoint being written may be the newest that survives
            raise


def require_same_checkpoint(cluster: Cluster, checkpoint: Checkpoint | None) -> None:
    """Refuse to continue from different checkpoints. Collective: call it on every host.

    Hosts at different updates would average the gradients of different weights.

    Args:
        cluster: that of the trainer.
        checkpoint: the checkpoint that this host has found, or None.

    Raises:
        UsageError: if the hosts have found checkpoints of different updates.
    """
    update = checkpoint.update if checkpoint else 0
    if not cluster.same_on_all_hosts(update):
        raise UsageError(
            "The hosts found different checkpoints. Keep the checkpoints in a directory that all hosts share. "
            f"Found by this host: {f'update {update}' if checkpoint else 'none'}"
        )
