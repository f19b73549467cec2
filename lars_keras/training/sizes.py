"""Compute the sizes of a run: micro-batches of a global batch, and the last update of each epoch."""

import math
from collections.abc import Callable, Sequence

from lars_keras.checks import as_number, check_count, check_number


def split_batch(batch_size: int, replicas: int, microbatch_size: int | None) -> tuple[int, int]:
    """Split a global batch into micro-batches.

    Args:
        batch_size: global batch size.
        replicas: number of replicas.
        microbatch_size: examples that a replica takes through the model at once; None, or too many, for all of its
            examples.

    Returns:
        `(microbatch_size, accumulation_steps)` with `replicas * microbatch_size * accumulation_steps == batch_size`.

    Raises:
        ValueError: if there is no such split; the message names the nearest sizes that can be split.
    """
    if batch_size < 1 or batch_size % replicas:
        below = batch_size // replicas * replicas
        raise ValueError(
            f"`batch_size` must be a multiple of the {replicas} replicas, such as {max(below, replicas)}. "
            f"Received: batch_size={batch_size}"
        )
    if microbatch_size is not None:
        microbatch_size = check_count("microbatch_size", microbatch_size, at_least=1)
    per_replica = batch_size // replicas
    if microbatch_size is None or microbatch_size > per_replica:
        return per_replica, 1
    if per_replica % microbatch_size:
        divisors = [d for d in range(1, per_replica + 1) if per_replica % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - microbatch_size))
        raise ValueError(
            f"`microbatch_size` must divide the {per_replica} examples of each replica, such as {nearest}. "
            f"Received: microbatch_size={microbatch_size}, batch_size={batch_size}, replicas={replicas}"
        )
    return microbatch_size, per_replica // microbatch_size


def epoch_ends(epochs: float, steps_per_epoch: float) -> list[int]:
    """Return the number of the last update of each epoch, from 1.

    Raises:
        ValueError: if an argument is not a finite number, or `steps_per_epoch` is 0.
    """
    check_number("epochs", epochs)
    check_number("steps_per_epoch", steps_per_epoch, above=0.0)
    epochs, steps_per_epoch = as_number(epochs), as_number(steps_per_epoch)
    total = math.ceil(epochs * steps_per_epoch - 1e-9)
    ends = [min(math.ceil((e + 1) * steps_per_epoch - 1e-9), total) for e in range(math.ceil(epochs))]
    while len(ends) > 1 and ends[-2] == total:  # nothing is left for the last epoch
        ends.pop()
    return ends


def epochs_to_validate(validation_freq: int | Sequence[int]) -> Callable[[int], bool]:
    """Return a function that returns True if an epoch, numbered from 1, is to be evaluated.

    Args:
        validation_freq: number of epochs between evaluations, or the epochs to evaluate.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(validation_freq, list | tuple | set | range):
        epochs = {check_count("validation_freq", epoch, at_least=1) for epoch in validation_freq}
        return lambda epoch: epoch in epochs
    every = check_count("validation_freq", validation_freq, at_least=1)
    return lambda epoch: epoch % every == 0
