"""A metric that saved models refer to. `import lars_keras` registers it, so that these models load."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("lars_keras")
class MaskedExamples(keras.metrics.Sum):
    """Counts the examples of weight 0 on all replicas. In training these are the unreadable images."""

    def __init__(self, name: str = "masked_examples", **kwargs: Any):
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(0.0 if sample_weight is None else ops.cast(ops.equal(sample_weight, 0), "float32"))
