"""Feed batches by index, generators and loaders to `Trainer`."""

import collections
import concurrent.futures
import dataclasses
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from absl import logging

from lars_keras.data.keyed import keys
from lars_keras.data.shuffle import permute
from lars_keras.training.array_data import weights_of_classes
from lars_keras.training.inputs import Batch, arrays_of, copied, count_in, rebatch, sliced, spec_of, to_array


class Indexed:
    """Holds batches that are read by their number.

    Args:
        batches: has `__getitem__`.
        count: number of batches; None if they have no end.
        name: name of the data in messages.
        class_weight: see `weights_of_classes`.

    Attributes:
        size: examples in each batch but the last.
        last: examples in the last batch.
    """

    def __init__(self, batches: Any, count: int | None, name: str, class_weight: Mapping[int, float] | None = None):
        if count == 0:
            raise ValueError(f"The data must have at least one batch. Received: {name} of length 0")
        self._batches, self.count, self.name, self._class_weight = batches, count, name, class_weight
        first = self.read(0)
        self.element_spec = spec_of(first)
        self.size = self.last = count_in(first)
        if count is not None and count > 1:
            self.last = count_in(self.read(count - 1))

    def read(self, index: int) -> Batch:
        """Return a batch as a tuple of arrays."""
        batch = arrays_of(self._batches[index])
        if self._class_weight is not None and len(batch) == 2:
            batch = (*batch, weights_of_classes(batch[1], self._class_weight))
        elif self._class_weight is not None:
            raise ValueError(f"`class_weight` needs batches of `(x, y)`. Received: batches of length {len(batch)}")
        return batch

    def sizes(self, order: np.ndarray) -> np.ndarray:
        """Return the number of examples in each batch, from the sizes of the first and the last batch."""
        assert self.count is not None
        return np.where(order == self.count - 1, self.last, self.size)

    def check_size(self, index: int, batch: Batch) -> None:
        """Warn if the size of a batch is not the expected one."""
        expected = self.last if self.count is not None and index == self.count - 1 else self.size
        if count_in(batch) != expected:
            logging.log_first_n(
                logging.WARNING,
                "Batch %d of the %s has %d examples, not %d as the others. An epoch is taken to have as many examples "
                "as if all had the same number, and a resumed run does not find its place exactly.",
                1,
                index,
                self.name,
                count_in(batch),
                expected,
            )


@dataclasses.dataclass(frozen=True)
class _Part:
    """A host's part of a stream of examples: the same places in every block.

    Attributes:
        block: examples in a block.
        start: place of the host's first example in a block.
        own: number of examples that the host takes from a block.
    """

    block: int
    start: int
    own: int

    @property
    def is_whole(self) -> bool:
        """True if the host takes all examples."""
        return self.own == self.block

    def of_batches(
        self, indices: Iterable[int], sizes: Iterable[int], start: int, first: int, last: int
    ) -> Iterator[tuple[int, list[tuple[int, int | None]]]]:
        """Yield the number of each batch that has examples of this host, and where these begin and end in it.

        Args:
            indices: the numbers of batches in their order.
            sizes: number of examples in each. The host that takes the last of them also takes any examples beyond.
            start: place of the first batch in the stream.
            first: place to begin with.
            last: place to end before.
        """
        for index, size in zip(indices, sizes, strict=False):
            begin, end = max(first, start), min(last, start + size)
            blocks = range(begin // self.block * self.block + self.start, end, self.block)
            own = [(max(begin, place) - start, min(end, place + self.own) - start) for place in blocks]
            slices = [(a, None if b == size else b) for a, b in own if a < b]
            if slices:
                yield index, slices
            start += size
            if start >= last:
                return


class EpochHooks:
    """Calls the hooks of a `PyDataset` around its epochs; other data have none.

    Each epoch that begins ends once, unless the training fails.

    Args:
        x: the data, or None.
    """

    def __init__(self, x: keras.utils.PyDataset | None = None):
        self._data, self._is_open = x, False
        self._lock = threading.Lock()  # a thread may read ahead while the training ends

    def begin(self) -> None:
        """Begin an epoch, before it is read."""
        with self._lock:
            if self._data is not None:
                getattr(self._data, "on_epoch_begin", lambda: None)()  # Keras 3.10 may have none
                self._is_open = True

    def end(self, close: bool = False) -> None:
        """End the epoch, unless it has ended. After `close`, when the training has ended, none begins."""
        with self._lock:
            if self._data is not None and self._is_open:
                self._is_open = False
                self._data.on_epoch_end()
            if close:
                self._data = None


@dataclasses.dataclass(frozen=True)
class IndexedFeed:
    """Returns a host's batches for training, from any update on, out of batches by index.

    All batches but the last are expected to have as many examples as the first. Each of several hosts reads only the
    batches that hold examples of its own.

    Attributes:
        source: the batches.
        seed: seed of the order of batches, which changes with each epoch; None for their own order.
        batch_size: global batch size.
        microbatch_size: examples that a replica takes through the model at once.
        per_epoch: examples that an epoch uses; None for all.
        workers: threads that read.
        hooks: called around each epoch.
    """

    source: Indexed
    seed: int | None
    batch_size: int
    microbatch_size: int
    per_epoch: int | None = None
    workers: int = 1
    hooks: EpochHooks = dataclasses.field(default_factory=EpochHooks)

    @property
    def element_spec(self) -> Any:
        return self.source.element_spec

    @property
    def examples(self) -> int | None:
        """Number of examples; None if they have no end."""
        count = self.source.count
        return None if count is None else int(self.source.sizes(np.arange(count)).sum())

    @property
    def order(self) -> list[Any]:
        """The values on which the order depends, for a checkpoint."""
        return [self.seed, self.examples, self.per_epoch or self.examples]

    def first(self, count: int) -> "IndexedFeed":
        """Return the same feed with this many examples in an epoch."""
        return dataclasses.replace(self, per_epoch=count)

    def __call__(self, context: Any, first_update: int) -> Iterator[Batch]:
        block = self.microbatch_size * context.num_replicas_in_sync
        own = block // context.num_input_pipelines
        part = _Part(block, context.input_pipeline_id * own, own)
        return rebatch(self._stream(first_update * self.batch_size, part), own, drop_remainder=True)

    def _stream(self, first: int, part: _Part) -> Iterator[Batch]:
        """Yield a host's examples without end, from a place in the stream on."""
        if self.source.count is None:
            index, skipped = divmod(first, self.source.size)
            sizes = itertools.repeat(self.source.size)
            yield from self._examples(itertools.count(index), sizes, first - skipped, skipped, sys.maxsize, part)
        assert self.examples is not None
        per_epoch = self.per_epoch or self.examples
        epoch, place = divmod(first, per_epoch)
        while True:
            self.hooks.begin()
            yield from self._epoch(epoch, place, per_epoch, part)
            self.hooks.end()
            epoch, place = epoch + 1, 0

    def _epoch(self, epoch: int, place: int, per_epoch: int, part: _Part) -> Iterator[Batch]:
        """Yield a host's examples of an epoch from its example `place` on."""
        assert self.source.count is not None
        order = np.arange(self.source.count, dtype=np.uint64)
        if self.seed is not None:
            order = permute(order, keys(self.seed, np.full_like(order, epoch)), len(order))
        order = order.astype(np.int64)
        sizes = self.source.sizes(order)
        ends = np.cumsum(sizes)
        index = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[index - 1]) if index else 0
        start = epoch * per_epoch + begin
        return self._examples(order[index:], sizes[index:], start, place - begin, per_epoch - place, part)

    def _examples(
        self, indices: Iterable[int], sizes: Iterable[int], start: int, skipped: int, left: int, part: _Part
    ) -> Iterator[Batch]:
        """Yield a host's examples of some batches.

        One of several hosts reads no batch without examples of its own, so it relies on the expected sizes of batches.
        A single host reads all batches, and uses their real sizes.

        Args:
            indices: the numbers of the batches.
            sizes: expected number of examples in each.
            start: place of the first batch in the stream.
            skipped: examples to leave out before the first.
            left: examples, of all hosts, that follow them.
            part: the host's part of the stream.
        """
        if part.is_whole:
            for batch in _skipping(self._read(indices), skipped):
                yield sliced(batch, 0, left)
                left -= count_in(batch)
                if left <= 0:
                    return
            return
        first = start + skipped
        wanted, ahead = itertools.tee(part.of_batches(indices, sizes, start, first, first + left))
        batches = self._read(index for index, _ in ahead)
        for (_, slices), batch in zip(wanted, batches, strict=True):
            for begin, end in slices:
                yield sliced(batch, begin, end)

    def _read(self, indices: Iterable[int]) -> Iterator[Batch]:
        """Yield batches in the order of `indices`, read ahead by threads if there are several."""
        if self.workers <= 1:
            for index in indices:
                yield self._checked(int(index))
            return
        ahead: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(self.workers, thread_name_prefix="read") as pool:
            try:
                for index in indices:
                    ahead.append(pool.submit(self._checked, int(index)))
                    if len(ahead) > 2 * self.workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _checked(self, index: int) -> Batch:
        batch = self.source.read(index)
        self.source.check_size(index, batch)
        return batch


def _skipping(batches: Iterator[Batch], examples: int) -> Iterator[Batch]:
    """Yield the batches without the first `examples` examples."""
    for batch in batches:
        have = count_in(batch)
        if examples < have:
            yield sliced(batch, examples, have) if examples else batch
        examples = max(examples - have, 0)


def feed_of_pydataset(
    x: keras.utils.PyDataset,
    class_weight: Mapping[int, float] | None,
    seed: int | None,
    batch_size: int,
    microbatch_size: int,
) -> IndexedFeed:
    """Return the feed of a `PyDataset`. The feed calls the hooks of the `PyDataset` as Keras does."""
    warn_of_processes(x)
    count = x.num_batches
    source = Indexed(x, None if count is None else int(count), "PyDataset", class_weight)
    return IndexedFeed(
        source,
        seed if count is not None else None,
        batch_size,
        microbatch_size,
        workers=x.workers,
        hooks=EpochHooks(x),
    )


def warn_of_processes(x: keras.utils.PyDataset) -> None:
    """Warn once that a `PyDataset` which asks for processes is read by threads."""
    if x.use_multiprocessing:
        logging.log_first_n(
            logging.WARNING,
            "`Trainer` reads a PyDataset with threads, not with processes, although use_multiprocessing=True. If "
            "reading is slow, let other code than Python do the work there, or train from a tf.data.Dataset.",
            1,
        )


class GeneratorFeed:
    """Returns the batches of a generator for training, from the generator's current position on.

    Args:
        generator: yields batches.
        batch_size: global batch size.
    """

    def __init__(self, generator: Iterator[Batch], batch_size: int):
        self.given = self.generator = generator
        self._batch_size = batch_size
        self._consumed = 0
        self._lock = threading.Lock()  # a thread of an earlier `fit` may still read ahead
        self._next: list[Batch] = []
        first = self.ahead(1)
        if not first:
            raise ValueError("The data must have at least one batch. Received: a generator without any")
        self.element_spec = spec_of(first[0])

    def ahead(self, count: int) -> list[Batch]:
        """Return the next batches, fewer at the end, which are still to be read."""
        with self._lock:
            for batch in itertools.islice(self.generator, max(count - len(self._next), 0)):
                self._next.append(copied(arrays_of(batch)))
            return self._next[:count]

    def __call__(self, context: Any, first_update: int) -> Iterator[Batch]:
        first = first_update * self._batch_size
        if 0 < first < self._consumed:
            logging.warning("A generator cannot go back to the examples of update %d. It goes on.", first_update)
        return _skipping(self._read(), max(first - self._consumed, 0))

    def _read(self) -> Iterator[Batch]:
        while True:
            with self._lock:
                batch = self._next.pop(0) if self._next else next(self.generator, None)
                if batch is None:
                    return
                batch = arrays_of(batch)
                self._consumed += count_in(batch)
            yield batch


@dataclasses.dataclass(frozen=True)
class Reread:
    """Wraps batches that can be read again, and hides the other features of their class.

    Attributes:
        batches: an iterable.
    """

    batches: Any

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self.batches if batch is not None)  # Grain gives None for what it has filtered out


class SizedBatches(Reread):
    """Wraps batches whose number is known."""

    def __len__(self) -> int:
        return len(self.batches)


class PyDatasetBatches(Reread):
    """The batches of a `keras.utils.PyDataset` in their order."""

    def __len__(self) -> int:
        return self.batches.num_batches

    def without_hooks(self) -> Iterator[Batch]:
        """Return an iterator over the batches that calls no hooks, to look at the first ones."""
        return (self.batches[i] for i in range(len(self)))

    def __iter__(self) -> Iterator[Batch]:
        getattr(self.batches, "on_epoch_begin", lambda: None)()
        yield from self.without_hooks()
        self.batches.on_epoch_end()


class TorchBatches(Reread):
    """The batches of a torch `DataLoader`, which may differ each time they are read."""

    @property
    def examples(self) -> int | None:
        """Number of examples; None if the loader does not know it."""
        loader = self.batches
        sampled = (getattr(loader, "sampler", None), loader.dataset)
        sized: list[Any] = [s for s in sampled if hasattr(s, "__len__")]
        if not sized or loader.batch_size is None:
            return None
        count = len(sized[0])
        return count // loader.batch_size * loader.batch_size if loader.drop_last else count

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            yield tuple(keras.tree.map_structure(to_array, part) for part in parts)
