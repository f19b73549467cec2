"""Save a training, continue it after a kill, and roll it back after a divergence."""

import contextlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lars_keras.runtime.checkpoint import Checkpoint, CheckpointManager, SavePolicy
from lars_keras.runtime.errors import Diverged, Preempted, UsageError
from lars_keras.training.cluster import Cluster
from lars_keras.training.trainer import Trainer
from lars_keras.training.votes import take_agreed


class CheckpointCallback(keras.callbacks.Callback):
    """Saves the state of a `Trainer` before the first update, when the policy asks for it, and after the last update.

    The last state has the raw weights, not their average. It is saved before it is evaluated: a restart finds that no
    update is left, and evaluates. A last update whose loss is not finite is not saved. If a callback may stop the run
    at the end of an epoch, the state after the epoch's updates is held in memory until then.

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
        save_first: save the restored state, too, before the run goes on. A run whose metadata have changed needs this,
            or its newest checkpoint would keep the old metadata.

    Attributes:
        trainer: as passed.
        manager: as passed.
        metadata: as passed; changes go into the next checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        manager: CheckpointManager,
        policy: SavePolicy,
        metadata: dict[str, Any] | None = None,
        save_first: bool = False,
    ):
        super().__init__()
        self._save_first = save_first
        self.trainer, self.manager, self.metadata = trainer, manager, metadata if metadata is not None else {}
        self._policy = policy
        self.agreed: bool | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        position = self.trainer.position
        reached = f"{position.update}/{position.batches_consumed}"
        if not self.trainer.cluster.same_on_all_hosts(zlib.crc32(reached.encode()) >> 1):
            raise UsageError(
                "The hosts begin at different updates or batches. Restore them from one checkpoint, in a folder that "
                f"all share. This host is at update {position.update}, batch {position.batches_consumed}."
            )
        # A run that begins anew has nothing to do with any checkpoint, not even with one of update 0.
        self._refuse_newer(position.update if position.update or self.trainer.resumed else -1)
        self._policy.reset(position.update)
        self._saved = position.update
        self._held: tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None = None
        if position.batches_consumed == 0 or self._save_first:
            self.save()
        self._save_first = False

    def vote(self, update: int, logs: Mapping[str, float]) -> bool:
        """Return True if this host's policy asks for a save; see `lars_keras.training.votes.Voter`."""
        return self._policy.due(update)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if take_agreed(self, self.trainer.cluster, batch + 1):
            self.save()

    def on_updates_end(self, last: bool) -> None:
        """Save the last state, or hold it for `on_train_end`. The trainer calls it before an evaluation."""
        position = self.trainer.position
        if position.update == self._saved or not math.isfinite(position.logs["step_loss"]):
            return
        if last:
            self.save()
        elif any(self.trainer.cluster.any_across_hosts(any(_may_stop(c) for c in self.trainer.callbacks))):
            self._held = self.trainer.snapshot()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        # Stopped at the end of an epoch. By now the weights may be their average, or those of the best epoch.
        if self._held and self._held[1]["update"] == self.trainer.position.update != self._saved:
            self._write(*self._held)
        self._held = None

    def save(self) -> None:
        """Save the state now, in the background. Collective: call it on every host."""
        self._write(*self.trainer.snapshot())

    def _write(self, arrays: Mapping[str, np.ndarray], position: Mapping[str, Any]) -> None:
        if self.trainer.cluster.is_chief:
            self.manager.save(position["update"], arrays, {**self.metadata, "position": position})
        self._saved = position["update"]
        self._policy.reset(position["update"])

    def _refuse_newer(self, update: int) -> None:
        """Raise on every host if the folder has checkpoints that this run has not reached."""
        try:
            self.manager.check_newest(update)
            refused = None
        except ValueError as e:
            refused = e
        if any(self.trainer.cluster.any_across_hosts(refused is not None)):
            raise refused or UsageError("Another host found checkpoints of later updates in its folder.")


def _may_stop(callback: keras.callbacks.Callback) -> bool:
    """Return True if a callback may set `model.stop_training` at the end of an epoch."""
    kind, lambdas = type(callback), isinstance(callback, keras.callbacks.LambdaCallback)
    if kind.__module__.startswith("keras.") and not lambdas:
        return isinstance(callback, keras.callbacks.EarlyStopping)
    ours = kind.__module__.startswith("lars_keras.")
    return not ours and (lambdas or kind.on_epoch_end is not keras.callbacks.Callback.on_epoch_end)


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
        checkpoints: callback that saves the state of its trainer; this trainer is trained.
        max_rollbacks: number of rollbacks in the whole run, restarts included.
        on_rollback: called with each rollback, `{"update": restored, "failed": diverged, "reason": ...}`.
        callbacks: Keras callbacks. `DivergenceGuard` detects divergence, and `StopOnSignal` detects preemption.
        **options: further arguments of `Trainer.fit`.

    Returns:
        The history of the last `Trainer.fit`.

    Raises:
        Diverged: if the run diverges after `max_rollbacks` rollbacks. All checkpoints precede the divergence.
        Preempted: after the state is saved.
        OSError: if the last state cannot be saved.
        UsageError: if hosts find different checkpoints for a rollback, or the folder has checkpoints of later updates.
    """
    trainer, manager = checkpoints.trainer, checkpoints.manager
    cluster = trainer.cluster
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
            position, rollbacks = trainer.position, trainer.position.rollbacks
            next_batch = position.batches_consumed - (position.update - e.update)
            with contextlib.suppress(OSError):  # logged when it happened
                manager.wait()
            cluster.any_across_hosts(True)  # no host reads before the chief has written
            checkpoint = manager.latest()
            require_same_checkpoint(cluster, checkpoint)
            if len(rollbacks) >= max_rollbacks or checkpoint is None:
                raise
            trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], data)
            rollback = {"update": checkpoint.update, "failed": e.update, "reason": str(e)}
            trainer.position.rollbacks = [*rollbacks, rollback]
            trainer.position.batches_consumed = next_batch
            checkpoints.save()  # a kill from here on must not forget what to skip
            on_rollback(rollback)
        except Exception:
            with contextlib.suppress(OSError):
                manager.wait()  # the checkpoint being written may be the newest that survives
            raise


def require_same_checkpoint(cluster: Cluster, checkpoint: Checkpoint | None) -> None:
    """Refuse to continue from different checkpoints. Collective: call it on every host.

    Hosts with different files would average the gradients of different weights, or read different data.

    Args:
        cluster: cluster of the trainer.
        checkpoint: the checkpoint that this host has found, or None.

    Raises:
        UsageError: if the hosts have found different checkpoints.
    """
    # The name has the update and a checksum: after a rollback there may be two of one update.
    number = zlib.crc32(checkpoint.path.name.encode()) >> 1 if checkpoint else 0
    if not cluster.same_on_all_hosts(number):
        raise UsageError(
            "The hosts found different checkpoints. Keep the checkpoints in a directory that all hosts share. "
            f"Found by this host: {checkpoint.path.name if checkpoint else 'none'}"
        )
