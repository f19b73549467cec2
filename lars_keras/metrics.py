"""A metric of `train.py`, here so that `import lars_keras` is enough to load the models that it saves."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("lars_keras")
class MaskedExamples(keras.metrics.Sum):
    """How many examples had weight 0, on all replicas: in training those that could not be read."""

    def __init__(self, name: str = "masked_examples", **kwargs: Any):
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(0.0 if sample_weight is None else ops.cast(ops.equal(sample_weight, 0), "float32"))
