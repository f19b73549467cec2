"""Batch normalization that can be synchronized on every backend.

This module only marks the synchronized layers, by the attribute `synchronized`. `lars_keras.training.batch_stats`
computes the statistics.
"""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="lars_keras")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """A `keras.layers.BatchNormalization(synchronized=True)` for every backend. Keras restricts its own to TensorFlow.

    `lars_keras.training.Trainer` takes the statistics of a whole micro-batch, over all replicas, on TensorFlow and JAX.
    Keras's own `fit` on JAX raises Keras's error.
    """

    def __init__(self, *, synchronized: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.synchronized = synchronized


def batch_normalization(*, synchronized: bool, **options: Any) -> keras.layers.Layer:
    """Return a `SyncBatchNormalization` if `synchronized`, else Keras's layer. `options` are its arguments."""
    return (SyncBatchNormalization if synchronized else keras.layers.BatchNormalization)(**options)
