"""The pure function of one ghost batch: weights, state and examples in; loss, predictions and new state out.

A *ghost batch* (Hoffer et al. 2017, arXiv 1705.08741) is the `microbatch_size` examples that one replica
takes through the model at once. A global batch is an ordered list of ghost batches, and an update is
defined by that list alone:

- The loss is the mean over the ghost batches.
- Every ghost batch starts from the same state. Floating-point state (moving statistics of batch normalisation) becomes
  the mean over the ghost batches of what each of them made of it, so it moves once per update.
- Ghost batch `j` draws its random numbers (dropout) from a stream keyed by `j`.

So it does not matter whether the ghost batches lie on one device one after the other, or side by side on
replicas.
"""

from typing import Any

import keras
from keras import ops

Tensor = Any

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive j over the key space
_KEYS = 2**31


class GhostBatch:
    """The state of a built model, sorted by what an update does with it.

    Attributes:
        trainable: trainable variables.
        averaged: floating-point state, averaged over ghost batches.
        counters: integer state, the same after every ghost batch: seed generators and counters.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.trainable = list(model.trainable_variables)
        state = list(model.non_trainable_variables)
        self.averaged = [v for v in state if keras.backend.is_float_dtype(v.dtype)]
        self.counters = [v for v in state if not keras.backend.is_float_dtype(v.dtype)]
        self._is_seed = [v.path.endswith("seed_generator_state") for v in self.counters]

    def loss(
        self,
        trainable: list[Tensor],
        averaged: list[Tensor],
        counters: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        index: Tensor,
    ) -> tuple[Tensor, Any, list[Tensor], list[Tensor]]:
        """Loss of ghost batch number `index` of its update, in training mode.

        Returns:
            The loss (mean over the ghost batch, plus the model's own losses), the predictions, and the new values of
            `averaged` and `counters`.
        """
        shift = ops.cast(ops.cast(index, "int64") * _GOLDEN % _KEYS, "int64")
        keyed = [
            _add_to_key(value, shift) if seed else value for value, seed in zip(counters, self._is_seed, strict=True)
        ]
        variables = self.trainable + self.averaged + self.counters
        mapping = list(zip(variables, trainable + averaged + keyed, strict=True))
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            y_pred = self.model(x, training=True)
            loss = self.model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
            new_averaged = [scope.get_current_value(v) for v in self.averaged]
            new_counters = [scope.get_current_value(v) for v in self.counters]
        new_counters = [
            _add_to_key(value, -shift) if seed else value
            for value, seed in zip(new_counters, self._is_seed, strict=True)
        ]
        return loss, y_pred, new_averaged, new_counters


def _add_to_key(seed_state: Tensor, shift: Tensor) -> Tensor:
    """Adds to the first word of a `[key, counter]` seed state."""
    return seed_state + ops.cast(ops.stack([shift, ops.zeros_like(shift)]), seed_state.dtype)
