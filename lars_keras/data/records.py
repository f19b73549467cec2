"""Random access to the record files of tensorflow-datasets, by example id.

Ids count the records of a split in the order of its files. Nothing is written, so the folder may be read-only.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lars_keras.files import printable

if TYPE_CHECKING:
    import tensorflow as tf

_HEADER = struct.Struct("<QI")  # length of the data, masked CRC-32C of the length
_FOOTER = 4  # masked CRC-32C of the data


class Records(Protocol):
    """Random access to serialized examples; see `TFRecords`."""

    folder: str

    def __len__(self) -> int: ...

    def dataset(self) -> tf.data.Dataset: ...

    def record(self, i: tf.Tensor) -> tf.Tensor: ...

    def where(self, i: int) -> str: ...

    @property
    def nbytes(self) -> int: ...


class ParsedRecords:
    """Random access to the encoded images in records.

    Args:
        records: the records.
        parse: a TensorFlow function that maps a record to the encoded image and its integer label.
    """

    def __init__(self, records: Records, parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]):
        self.records, self.parse = records, parse

    def __len__(self) -> int:
        return len(self.records)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the encoded image and the label of example `i`, in a graph."""
        return self.parse(self.records.record(i))

    def where(self, i: int) -> str:
        """Return the location of image `i`, for messages."""
        return self.records.where(i)

    @property
    def nbytes(self) -> int:
        """Return the size of all records, in bytes."""
        return self.records.nbytes


def _record_starts(path: str) -> np.ndarray:
    """Return the offsets of the data of each record in a TFRecord file, and of a record after the last."""
    starts = []
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):  # reads 12 bytes in every 100 kB, and nothing in between
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        offset = 0
        while offset + _HEADER.size <= size:
            length, _ = _HEADER.unpack(os.pread(file.fileno(), _HEADER.size, offset))
            starts.append(offset + _HEADER.size)
            offset += _HEADER.size + length + _FOOTER
    if offset != size:
        raise ValueError(f"{path} is damaged: a record ends at byte {offset}, the file at {size}.")
    return np.asarray([*starts, size + _HEADER.size], np.int64)


class TFRecords:
    """Random access to TFRecord files. The constructor reads every record header once.

    Args:
        paths: the files of the split, in order.
        counts: the expected number of records in each file.

    Attributes:
        folder: the folder of the first file.

    Raises:
        ValueError: if a file is truncated, or has another number of records.
        FileNotFoundError: if a file is missing.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        self._paths = [os.fspath(path) for path in paths]
        self.folder = os.path.dirname(self._paths[0])
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # the disk takes the time
            starts = list(pool.map(_record_starts, self._paths))
        for path, found, count in zip(self._paths, starts, counts, strict=True):
            if len(found) - 1 != count:
                raise ValueError(f"{path} holds {len(found) - 1} records, dataset_info.json says {count}.")
        self._file = np.repeat(np.arange(len(starts), dtype=np.int32), [len(s) - 1 for s in starts])
        self._start = np.concatenate([s[:-1] for s in starts])
        self._length = np.concatenate([np.diff(s) for s in starts]) - _HEADER.size - _FOOTER

    def __len__(self) -> int:
        return len(self._start)

    def dataset(self) -> tf.data.Dataset:
        """Return the data of all records in order, each verified by its checksum."""
        import tensorflow as tf

        return tf.data.TFRecordDataset(self._paths)

    @property
    def nbytes(self) -> int:
        """Return the size of all records, in bytes."""
        return int(self._length.sum())

    def record(self, i: tf.Tensor) -> tf.Tensor:
        """Read the data of record `i`, in a graph, and verify its checksum."""
        import tensorflow as tf

        paths, files, starts = self._tensors
        # The operation accepts the offset of a record; `tf.data.TFRecordDataset` does not pass one on.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[paths[files[i]]],
            compression_type="",
            buffer_size=tf.constant(0, tf.int64),
            byte_offsets=[starts[i]],
        )
        record = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return record.take(1).get_single_element()

    def where(self, i: int) -> str:
        """Return the location of record `i`, for messages."""
        path = self._paths[self._file[i]]
        return f"record {i - np.searchsorted(self._file, self._file[i])} of {printable(path)}"

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Tensor, ...]:
        """Hold the table of records in TensorFlow's memory, outside the graphs."""
        import tensorflow as tf

        with tf.init_scope():
            return (
                tf.constant([os.fsencode(path) for path in self._paths]),
                tf.constant(self._file),
                tf.constant(self._start - _HEADER.size),
            )


class ArrayRecords:
    """Random access to ArrayRecord files, by the package `array_record`.

    Args:
        paths: the files of the split, in order.
        counts: the expected number of records in each file.

    Attributes:
        folder: the folder of the first file.

    Raises:
        ValueError: if a file has another number of records.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder = os.path.dirname(paths[0])
        self.nbytes = sum(os.stat(path).st_size for path in paths)
        self._source = ArrayRecordDataSource([os.fspath(path) for path in paths])
        if len(self._source) != sum(counts):
            raise ValueError(f"{self.folder} holds {len(self._source)} records, dataset_info.json says {sum(counts)}.")

    def __len__(self) -> int:
        return len(self._source)

    def dataset(self) -> tf.data.Dataset:
        """Return the data of all records in order, by a Python function."""
        import tensorflow as tf

        def read(ids: np.ndarray) -> np.ndarray:
            return np.array(self._source.__getitems__(ids.tolist()), dtype=object)

        ids = tf.data.Dataset.range(len(self)).batch(1024)
        return ids.map(lambda i: tf.ensure_shape(tf.numpy_function(read, [i], tf.string), [None])).unbatch()

    def record(self, i: tf.Tensor) -> tf.Tensor:
        """Read the data of record `i`, in a graph, by a Python function, which other hosts cannot run."""
        import tensorflow as tf

        return tf.ensure_shape(tf.numpy_function(lambda i: self._source[int(i)], [i], tf.string), [])

    def where(self, i: int) -> str:
        """Return the location of record `i`, for messages."""
        return f"record {i} of {self.folder}"
