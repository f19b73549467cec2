"""A small data set, and the order of its examples."""

import numpy as np

import lars_keras.data
from lars_keras.data import pad_crop_flip
from lars_keras.data.base import positions
from lars_keras.data.shuffle import example_ids


def small_arrays(crop_flip=pad_crop_flip):
    """Return 37 training and 23 test images whose pixels differ."""
    random = np.random.default_rng(0)

    def split(n):
        return random.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n) % 10

    return lars_keras.data.ArrayData("small", split(37), split(23), 10, crop_flip=crop_flip)


def train_ids(data, batch_size, *, first=0, count=1, seed=0, shard=(0, 1)):
    """Return the example ids of the batches of `data.train_batches`: int64 `(count, batch_size / W)`."""
    batches = np.arange(first, first + count, dtype=np.uint64)[:, None]
    ids, _ = example_ids(positions(batches, batch_size, shard), data.num_train, seed)
    return ids.astype(np.int64)
