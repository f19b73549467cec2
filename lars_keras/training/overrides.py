"""Refuse parts of a model that `Trainer` would ignore, so that it would train or score something else."""

from typing import Any

import keras

# `Trainer` calls none of these, so what a model does in them would be lost without a word.
_NEVER_CALLED = (
    "train_step",
    "test_step",
    "make_train_function",
    "make_test_function",
    "train_on_batch",
    "test_on_batch",
    "fit",
    "evaluate",
    "stateless_compute_loss",
    "compute_loss_and_updates",
)


def check_overrides(model: keras.Model) -> None:
    """Refuse an eager model, and a model with its own training or evaluation step, which `Trainer` would not call.

    Raises:
        ValueError: if there is such a step (the message names it), or the model was compiled with `run_eagerly`.
    """
    own = [name for name in _NEVER_CALLED if is_overridden(model, name)]
    if own:
        raise ValueError(
            "`Trainer` takes the place of Keras's training and evaluation loops, and calls none of a model's own: "
            f"{', '.join(own)}. Put the objective into `compute_loss` or `add_loss`, and metrics into `compile` or "
            f"`compute_metrics`; or train with `model.fit`. Received: model of type {type(model).__name__}"
        )
    if getattr(model, "run_eagerly", False):
        raise ValueError(
            "`Trainer` compiles its step, so it cannot run eagerly. Compile the model without `run_eagerly`, or debug "
            "it in `model.fit`. Received: run_eagerly=True"
        )


def check_loss(model: keras.Model) -> None:
    """Refuse a sum or a weighted mean: its values for the micro-batches do not give its value for the global batch.

    Raises:
        ValueError: for such a loss.
    """
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                'The loss must be the mean over the batch, reduction="sum_over_batch_size". '
                f"Received: {type(loss).__name__}(reduction={reduction!r})"
            )


def check_targets(model: keras.Model, spec: Any) -> None:
    """Refuse data without targets for a compiled loss, which needs them.

    Args:
        model: compiled.
        spec: spec of a batch, a tuple.

    Raises:
        ValueError: if the data have no targets.
    """
    compares = any(loss is not None for loss in keras.tree.flatten(model.loss))
    if compares and isinstance(spec, tuple) and len(spec) < 2 and not is_overridden(model, "compute_loss"):
        raise ValueError("The loss needs targets: pass `y`, or batches of `(x, y)`. Received: batches of `(x,)`")


def is_overridden(model: keras.Model, name: str) -> bool:
    """Return True if a model or its class overrides the method `name` of `keras.Model`."""
    of_keras = getattr(keras.Model, name, None)
    return name in vars(model) or getattr(type(model), name, None) is not of_keras
