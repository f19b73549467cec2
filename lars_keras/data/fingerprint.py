"""Fingerprint data sets, to tell one from another without reading the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_BLOCK = 1024  # images that are hashed together


def fingerprint(num_train: int, num_test: int, num_classes: int, parts: Iterable[bytes]) -> str:
    """Return one line that differs for different data: the counts, for people, and a hash.

    Args:
        num_train: number of training images.
        num_test: number of test images.
        num_classes: number of classes.
        parts: everything else that tells the data from others.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    counts = f"{num_train:,} train and {num_test:,} test images in {num_classes:,} classes"
    return f"{counts}, {digest.hexdigest()[:16]}"


def array_parts(images: np.ndarray, labels: np.ndarray) -> Iterator[bytes]:
    """Yield the contents of a split in memory."""
    yield str(images.shape).encode()
    yield labels.tobytes()
    for first in range(0, len(images), _BLOCK):
        yield images[first : first + _BLOCK].tobytes()


def builder_parts(builder: tfds.core.DatasetBuilder, splits: Iterable[str], described: bool) -> Iterator[bytes]:
    """Yield the metadata that tensorflow-datasets has of the splits, whatever the place of the files.

    Args:
        builder: the builder of the prepared data set.
        splits: names of the splits.
        described: whether the description of the data set identifies it, as in data sets of `lars_keras.data.store`.
    """
    yield builder.info.full_name.encode()
    if described:
        yield builder.info.description.encode()
    for split in splits:
        info = builder.info.splits[split]
        yield json.dumps([[int(n) for n in info.shard_lengths], int(info.num_bytes)]).encode()
