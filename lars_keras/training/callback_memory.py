"""Look at the callbacks of a run, and save their memory, so that a resumed run decides as one that never stopped."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from absl import logging

from lars_keras import _keras_internals as keras_internals
from lars_keras.runtime.divergence import DivergenceGuard

# Plain values only. Each of these classes resets them, or begins without them, in a new process.
_REMEMBERED: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best",),
    DivergenceGuard: ("memory",),
}


def unpacked(callbacks: Any) -> list[keras.callbacks.Callback]:
    """Return the callbacks in a structure of callbacks and `CallbackList`s, those within each other too."""
    found = []
    for callback in keras.tree.flatten(callbacks or ()):
        found += unpacked(callback.callbacks) if isinstance(callback, keras.callbacks.CallbackList) else [callback]
    return found


def check_callbacks(callbacks: Sequence[keras.callbacks.Callback], hosts: int) -> None:
    """Refuse objects that are not callbacks, and saving callbacks of Keras that would not work.

    `BackupAndRestore` puts back the weights of an epoch, and leaves it to `model.fit` to skip the epochs.
    `ModelCheckpoint` on several hosts of JAX makes variables while it saves, which all hosts must do together.

    Args:
        callbacks: callbacks of a run.
        hosts: number of processes of the run.

    Raises:
        ValueError: if there is such an object.
    """
    for callback in callbacks:
        if not hasattr(callback, "set_model"):
            raise ValueError(f"`callbacks` must be Keras callbacks. Received: {callback!r}")
    if hosts > 1 and keras.backend.backend() == "jax":
        if any(isinstance(callback, keras.callbacks.ModelCheckpoint) for callback in callbacks):
            raise ValueError(
                "On several hosts of JAX, save the model by a callback that every host has, and that calls "
                "`trainer.save_model(path, write=jax.process_index() == 0)`. Received: ModelCheckpoint"
            )
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise ValueError(
            "A run that `BackupAndRestore` has restored would take all of its epochs again. Save and resume it by "
            "`lars_keras.runtime.recovery`: `CheckpointCallback` and `fit_with_recovery`. Received: BackupAndRestore"
        )


def memory_of(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, dict[str, Any]]:
    """Return the memory of the callbacks, by class and number within the class, as values that JSON can hold."""
    return {
        key: {name: _plain(getattr(callback, name, None)) for name in names}
        for key, callback, names in _with_memory(callbacks)
    }


def restore_memory(
    callbacks: Sequence[keras.callbacks.Callback], memory: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Restore the result of `memory_of`. Call it after `on_train_begin`, which resets the callbacks.

    A warning names what cannot be restored.

    Args:
        callbacks: callbacks of the resumed run, those of one class in the same order as before.
        memory: None if the checkpoint has none, because an earlier version wrote it.
    """
    for key, callback, names in _with_memory(callbacks):
        if memory is None or key not in memory:
            logging.warning("The checkpoint does not say what %s remembered. It begins anew.", key)
            continue
        for name in names:
            setattr(callback, name, memory[key].get(name))
        if isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights:
            logging.warning(
                "A checkpoint does not hold the best weights of EarlyStopping(restore_best_weights=True). It restores "
                "the best of the epochs from here on. Keep the best model with ModelCheckpoint(save_best_only=True)."
            )


def _with_memory(
    callbacks: Sequence[keras.callbacks.Callback],
) -> Iterator[tuple[str, keras.callbacks.Callback, tuple[str, ...]]]:
    for kind, names in _REMEMBERED.items():
        found = [callback for callback in callbacks if isinstance(callback, kind)]
        for i, callback in enumerate(found):
            yield f"{kind.__name__}/{i}", callback, names


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, dict)) else float(value)


def reads_scores(callback: keras.callbacks.Callback) -> bool:
    """Return True if a callback may read the logs of `on_test_batch_end`. In training, Keras's and ours do not."""
    return not str(callback.on_test_batch_end.__module__).startswith(("keras.", "lars_keras."))


def has_swapped(callback: keras.callbacks.Callback) -> bool:
    """Return True for a callback that has swapped in the EMA weights, and the weights for the average."""
    return swaps_at_epochs(callback) and keras_internals.has_swapped(callback)


def swaps_at_epochs(callback: keras.callbacks.Callback) -> bool:
    """Return True for a callback that swaps in the EMA weights itself, from the end of an epoch to the next one."""
    return isinstance(callback, keras.callbacks.SwapEMAWeights) and callback.swap_on_epoch
