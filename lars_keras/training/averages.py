"""Find running averages that need a longer run."""

import keras
from absl import logging

from lars_keras._keras_internals import inner_optimizer, layers_of


def warn_of_long_averages(model: keras.Model, updates: int) -> None:
    """Log the sentences of `long_averages`."""
    for warning in long_averages(model, updates):
        logging.warning("%s", warning)


def long_averages(model: keras.Model, updates: int) -> list[str]:
    """Return a sentence for each kind of average that still holds much of its first value at the end of a run.

    An average with momentum m covers about 1 / (1 - m) updates. After that many updates it holds 37 % of its first
    value.

    Args:
        model: compiled and built.
        updates: number of updates in the whole run.
    """
    found = []
    optimizer = inner_optimizer(model.optimizer)
    if optimizer.use_ema and _covered(optimizer.ema_momentum) > updates:
        found.append(
            f"The EMA of the weights covers {_covered(optimizer.ema_momentum):.0f} updates "
            f"(ema_momentum={optimizer.ema_momentum:g}), and the run has {updates}. "
            f"{optimizer.ema_momentum**updates:.0%} of the average is still the initial weights."
        )
    if optimizer.use_ema and (optimizer.ema_overwrite_frequency or 0) > updates:
        found.append(
            f"The EMA overwrites the weights every {optimizer.ema_overwrite_frequency} updates, and the run has "
            f"{updates}."
        )
    layers = [
        layer
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable and _covered(layer.momentum) > updates
    ]
    if layers:
        momentum = max(layer.momentum for layer in layers)
        found.append(
            f"The moving statistics of {len(layers)} BatchNormalization layer{'s' if len(layers) > 1 else ''} cover "
            f"{_covered(momentum):.0f} updates (momentum={momentum:g}), and the run has {updates}. "
            f"In evaluation, {momentum**updates:.0%} of each statistic is still its initial value. Lower the momentum."
        )
    return found


def _covered(momentum: float) -> float:
    return 1 / max(1 - momentum, 1e-12)
