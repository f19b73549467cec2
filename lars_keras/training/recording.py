"""A stateless scope that says which variables were assigned in it, and which it did not know."""

from collections.abc import Sequence
from typing import Any

import keras

from lars_keras._keras_internals import is_seed_state

Tensor = Any


class RecordingScope(keras.StatelessScope):
    """A `keras.StatelessScope` that collects losses, and records which variables were assigned or not known.

    Args:
        mapping: pairs of a variable and its value.

    Attributes:
        assigned: variables that were assigned, by identity.
        unknown: variables that were read and have no value in `mapping`, by identity.
    """

    def __init__(self, mapping: Sequence[tuple[keras.Variable, Tensor]]):
        super().__init__(mapping, collect_losses=True)
        self.assigned: dict[int, keras.Variable] = {}
        self.unknown: dict[int, keras.Variable] = {}

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        """Return the value of a variable, as Keras's variables ask for it; None if the scope has none."""
        value = super().get_current_value(variable)
        if value is None:
            self.unknown[id(variable)] = variable
        return value

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        """Take the new value of a variable, as Keras's variables hand it over."""
        self.assigned[id(update[0])] = update[0]
        super().add_update(update)

    @property
    def random(self) -> bool:
        """True if a random number was drawn."""
        return any(map(is_seed_state, self.assigned.values()))
