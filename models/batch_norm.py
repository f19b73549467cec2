"""Batch normalisation that can be synchronised on JAX as well."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="lars_keras")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization(synchronized=True)`, whose constructor Keras keeps to the TensorFlow backend.

    In training under `lars_keras.training.Trainer` its statistics are those of all replicas of a pass, on either
    backend; under Keras's own `fit` on JAX it raises Keras's error.
    """

    def __init__(self, *, synchronized: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.synchronized = synchronized


def batch_normalization(*, synchronized: bool, **options: Any) -> keras.layers.Layer:
    """Keras's own layer, or, where it has to be synchronised, `SyncBatchNormalization`."""
    return (SyncBatchNormalization if synchronized else keras.layers.BatchNormalization)(**options)
