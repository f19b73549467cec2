"""Convert the data of a `Trainer` to the form that engines take."""

from collections.abc import Mapping
from typing import Any

from lars_keras.training.batch_data import GeneratorFeed, SizedBatches
from lars_keras.training.function_data import FunctionData
from lars_keras.training.inputs import Data, count_examples, take_updates
from lars_keras.training.sources import scoring_data, training_data, validation_data_of


class GivenData:
    """Bring the data of `Trainer.fit` and `Trainer.evaluate` into the form that engines take.

    It remembers the generator or function of the last `fit`, to go on from its current position, and the size of the
    data that it counted last.

    Args:
        batch_size: global batch size.
        microbatch_size: examples that a replica takes through the model at once; a divisor of `batch_size / replicas`.
        replicas: number of replicas of all hosts.
        hosts: number of hosts.
    """

    def __init__(self, batch_size: int, microbatch_size: int, replicas: int, hosts: int):
        self._batch_size, self._microbatch_size, self._hosts = batch_size, microbatch_size, hosts
        self._scored_at_once = microbatch_size * replicas
        self._read_once: GeneratorFeed | FunctionData | None = None
        self._counted: tuple[Any, int] = (None, 0)

    def training(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Data:
        """Return the data for training; see `lars_keras.training.sources.training_data`."""
        with_others = y is not None or sample_weight is not None or class_weight is not None
        if self._read_once and self._read_once.given is x and not with_others:
            return self._read_once
        sizes = {"batch_size": self._batch_size, "microbatch_size": self._microbatch_size, "hosts": self._hosts}
        data = training_data(x, y, sample_weight, class_weight, **sizes, shuffle=shuffle, seed=seed)
        self._read_once = data if isinstance(data, GeneratorFeed | FunctionData) else None
        return data

    def validation(self, data: Any) -> Data | None:
        """Return the data of the argument `validation_data`; None for None."""
        if data is None:
            return None
        return validation_data_of(data, batch_size=self._scored_at_once, hosts=self._hosts)

    def scoring(self, x: Any, y: Any = None, sample_weight: Any = None) -> Data:
        """Return the data for one evaluation; see `lars_keras.training.sources.scoring_data`."""
        return scoring_data(x, y, sample_weight, batch_size=self._scored_at_once, hosts=self._hosts, once=True)

    def whole_updates(self, data: Data) -> tuple[Data, int]:
        """Return finite data without their last partial global batch, and the number of their updates.

        Raises:
            ValueError: if the size of the data is not known, or the data have too few examples for an update.
        """
        given = data.batches if isinstance(data, SizedBatches) else data
        if self._counted[0] is not given or isinstance(given, list):  # a list may have grown
            self._counted = given, count_examples(data)
        examples = self._counted[1]
        updates = examples // self._batch_size
        if updates == 0:
            raise ValueError(
                f"`batch_size` must be at most the number of examples, {examples}. Received: "
                f"batch_size={self._batch_size}"
            )
        return take_updates(data, self._microbatch_size, updates * self._batch_size // self._microbatch_size), updates
