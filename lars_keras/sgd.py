"""SGD whose biases can have another learning rate, to compare with LARS on equal terms."""

from collections.abc import Sequence
from typing import Any

import keras

from lars_keras._keras_internals import SelectiveDecaySGD, variable_index
from lars_keras.checks import check_number
from lars_keras.exclude import DEFAULT_EXCLUDE, Matches, check_patterns, match_patterns, plain
from lars_keras.trust_ratio import Tensor


@keras.saving.register_keras_serializable(package="lars_keras")
class SGD(SelectiveDecaySGD):
    """Apply `keras.optimizers.SGD`, but do not decay the excluded variables, and give them another learning rate.

    Some recipes give the shifts of batch normalization a higher rate: 64 times that of the kernels in airbench (Jordan
    2024, arXiv 2404.00498). With `excluded_lr_scale=1` and without weight decay this is `keras.optimizers.SGD`
    to the bit.

    Args:
        learning_rate: a number or a `LearningRateSchedule`.
        exclude: regular expressions for `keras.Variable.path`, as for `LARS`. Matching variables are not decayed, and
            their learning rate is multiplied by `excluded_lr_scale`.
        excluded_lr_scale: factor on the learning rate of excluded variables.
        matches: what the patterns matched at the first build, as `get_config` returns it.
        **kwargs: arguments of `keras.optimizers.SGD`, such as `momentum`, `nesterov`, and the decoupled
            `weight_decay`.

    Raises:
        ValueError: for invalid patterns, or a factor that is not a finite number of at least 0.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        *,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        excluded_lr_scale: float = 1.0,
        matches: Matches | None = None,
        **kwargs: Any,
    ):
        super().__init__(learning_rate, **kwargs)
        self._exclude = check_patterns("exclude", exclude)
        self.excluded_lr_scale = excluded_lr_scale
        self._matches = matches
        self._excluded: frozenset[int] = frozenset()

    @property
    def exclude(self) -> tuple[str, ...]:
        """Return the patterns of `exclude`."""
        return tuple(self._exclude)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the slots, and resolve the exclusions.

        Raises:
            ValueError: if a pattern that the user gave matches no variable.
        """
        if self.built:
            return
        if variables:
            found, self._matches = match_patterns(variables, self._exclude, saved=self._matches)
            self._excluded = frozenset(i for indices in found.values() for i in indices)
        super().build(variables)

    def decays(self, variable: Any) -> bool:
        """Return whether weight decay acts on a variable."""
        return variable_index(self, variable) not in self._excluded

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Apply SGD to one variable, at its own learning rate."""
        if variable_index(self, variable) in self._excluded and self.excluded_lr_scale != 1.0:
            learning_rate = learning_rate * self.excluded_lr_scale
        super().update_step(gradient, variable, learning_rate)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "exclude":  # without effect once built
            raise AttributeError(f"Give `exclude` to the constructor. Received: exclude={value!r}")
        super().__setattr__(name, check_number(name, value) if name == "excluded_lr_scale" else value)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {"exclude": list(self.exclude), "excluded_lr_scale": self.excluded_lr_scale}
        return config if self._matches is None else config | {"matches": plain(self._matches)}
