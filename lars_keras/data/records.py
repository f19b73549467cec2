"""Random access to the record files that tensorflow-datasets writes, by example id.

Ids count the records of the split in the order of its files. Nothing is stored on disk: a read-only
folder will do.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

_HEADER = struct.Struct("<QI")  # length of the data, masked CRC-32C of these 8 bytes
_FOOTER = 4  # masked CRC-32C of the data


class Records(Protocol):
    """Random access to serialised examples."""

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> list[bytes]: ...

    def record(self, i: tf.Tensor) -> tf.Tensor: ...

    def where(self, i: int) -> str: ...

    @property
    def nbytes(self) -> int: ...


class ParsedRecords:
    """A split that is held as records.

    Args:
        records: the records.
        parse: a TensorFlow function from a record to the bytes of the image and its integer label.
    """

    def __init__(self, records: Records, parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]):
        self.records, self.parse = records, parse

    def __len__(self) -> int:
        return len(self.records)

    def example(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The bytes and the label of image `i` in a graph."""
        return self.parse(self.records.record(i))

    def where(self, i: int) -> str:
        """Which image `i` is, for people."""
        return self.records.where(i)

    @property
    def nbytes(self) -> int:
        """Size of all records, in bytes."""
        return self.records.nbytes


def _record_starts(path: str) -> np.ndarray:
    """Returns where the data of each record of a TFRecord file starts, and where the next would."""
    starts = []
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):  # read 12 bytes in every 100 kB, not all that lies between
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
    """The records of TFRecord files. One pass over the record headers, at the start, finds them.

    Args:
        paths: the files of the split, in order.
        counts: the number of records each must have.

    Raises:
        ValueError: a file is truncated or holds another number of records.
        FileNotFoundError: a file is missing.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        self._paths = [os.fspath(path) for path in paths]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # it is the disk that takes time
            starts = list(pool.map(_record_starts, self._paths))
        for path, found, count in zip(self._paths, starts, counts, strict=True):
            if len(found) - 1 != count:
                raise ValueError(f"{path} holds {len(found) - 1} records, dataset_info.json says {count}.")
        self._file = np.repeat(np.arange(len(starts), dtype=np.int32), [len(s) - 1 for s in starts])
        self._start = np.concatenate([s[:-1] for s in starts])
        self._length = np.concatenate([np.diff(s) for s in starts]) - _HEADER.size - _FOOTER

    def __len__(self) -> int:
        return len(self._start)

    def read(self, ids: np.ndarray) -> list[bytes]:
        """Returns the data of the records `ids`."""
        return [self._read(int(i)) for i in ids]

    @property
    def nbytes(self) -> int:
        """Size of all records, in bytes."""
        return int(self._length.sum())

    def record(self, i: tf.Tensor) -> tf.Tensor:
        """The data of record `i` in a graph, its checksum verified."""
        import tensorflow as tf

        paths, files, starts = self._tensors
        # The op takes the offset of a record; `tf.data.TFRecordDataset` does not let it through.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[paths[files[i]]],
            compression_type="",
            buffer_size=tf.constant(0, tf.int64),
            byte_offsets=[starts[i]],
        )
        record = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return record.take(1).get_single_element()

    def where(self, i: int) -> str:
        """Which record `i` is, for people."""
        path = self._paths[self._file[i]]
        return f"record {i - np.searchsorted(self._file, self._file[i])} of {path}"

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Tensor, ...]:
        """The table of records in TensorFlow's memory, beside the graphs and not in them."""
        import tensorflow as tf

        with tf.init_scope():
            return tf.constant(self._paths), tf.constant(self._file), tf.constant(self._start - _HEADER.size)

    def _read(self, i: int) -> bytes:
        path, length = self._paths[self._file[i]], int(self._length[i])
        # Opened anew each time (10 us): ImageNet has more files than a process may hold open.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, length, int(self._start[i]))
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise ValueError(f"{path} is truncated: record {i} has {len(data)} of {length} bytes.")
        return data


class ArrayRecords:
    """The records of ArrayRecord files, through the `array_record` package.

    Args:
        paths: the files of the split, in order.
        counts: the number of records each must have.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._folder = os.path.dirname(paths[0])
        self.nbytes = sum(os.stat(path).st_size for path in paths)
        self._source = ArrayRecordDataSource([os.fspath(path) for path in paths])
        if len(self._source) != sum(counts):
            raise ValueError(f"{self._folder} holds {len(self._source)} records, dataset_info.json says {sum(counts)}.")

    def __len__(self) -> int:
        return len(self._source)

    def read(self, ids: np.ndarray) -> list[bytes]:
        """Returns the data of the records `ids`."""
        return list(self._source.__getitems__([int(i) for i in ids]))

    def record(self, i: tf.Tensor) -> tf.Tensor:
        """The data of record `i` in a graph, read by Python: of no use on other hosts than this one."""
        import tensorflow as tf

        return tf.ensure_shape(tf.numpy_function(lambda i: self._source[int(i)], [i], tf.string), [])

    def where(self, i: int) -> str:
        """Which record `i` is, for people."""
        return f"record {i} of {self._folder}"
