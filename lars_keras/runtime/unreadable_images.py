"""Stop a run whose data set has too many unreadable images."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import keras

from lars_keras.runtime.errors import TooManyUnreadableImages
from lars_keras.training.cluster import cluster_of
from lars_keras.training.votes import take_agreed


class DataSet(Protocol):
    """The part of `lars_keras.data.ImageData` that the limit reads."""

    num_train: int
    num_test: int
    unreadable_images: Any


class UnreadableImageLimit(keras.callbacks.Callback):
    """Raises `TooManyUnreadableImages` on all hosts for more than `max_unreadable_images` distinct unreadable images.

    This process knows the names of the images that it could not read itself. For other hosts it knows only numbers,
    from the model's metric `lars_keras.metrics.MaskedExamples` in training, and from the missing examples of an
    evaluation.

    Args:
        data: the data set.
        max_unreadable_images: number of unreadable images that are tolerated.
        on_new: function of `(update, where, reason)`, called once for each newly named image. `update` is the last
            finished update.
    """

    def __init__(
        self, data: DataSet, max_unreadable_images: int, on_new: Callable[[int, str, str], None] = lambda *_: None
    ):
        super().__init__()
        self._data, self._max_unreadable_images, self._on_new = data, max_unreadable_images, on_new
        self._named = set(data.unreadable_images.found)
        self._masked = {"train": 0, "test": 0}
        self._update = 0
        self.agreed: bool | None = None

    @property
    def count(self) -> int:
        """A lower bound on the number of distinct unreadable images."""
        return max(len(self._named), sum(self._masked.values()))

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._cluster = cluster_of(model)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._update = self.params.get("first_update", 0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._epoch_start = math.ceil(epoch * self.params["steps_per_epoch"] - 1e-9)

    def vote(self, update: int, logs: Mapping[str, float]) -> bool:
        """Return True if this host knows of too many; see `lars_keras.training.votes.Voter`."""
        self._update = update
        for where, reason in list(self._data.unreadable_images.found.items()):
            if where not in self._named:
                self._named.add(where)
                self._on_new(update, where, reason)
        if "masked_examples" in logs:
            examples = (update - self._epoch_start) * self.params["batch_size"]
            # An epoch's updates may reach into the permutation before it and the one after it.
            permutations = examples // self._data.num_train + 2
            self._note("train", math.ceil(logs["masked_examples"] / permutations))
        return self.count > self._max_unreadable_images

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._check(batch + 1, logs)

    def on_test_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._check(self._update)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if logs and "val_n" in logs:
            self._note("test", self._data.num_test - round(logs["val_n"]))
            self._check(self._update)

    def _note(self, split: str, masked: int) -> None:
        self._masked[split] = max(self._masked[split], masked)

    def _check(self, update: int, logs: dict[str, float] | None = None) -> None:
        if take_agreed(self, self._cluster, update, logs):
            found = self._data.unreadable_images.found
            count = max(self.count, self._max_unreadable_images + 1)
            example = "The logs of the other hosts name them."
            for where, reason in found.items():
                example = f"The last one: {where}: {reason}"
            raise TooManyUnreadableImages(
                f"{count} image{'s are' if count > 1 else ' is'} unreadable, more than "
                f"`max_unreadable_images`={self._max_unreadable_images}. {example}"
            )
