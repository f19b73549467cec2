"""Write a data set whose images are stored at one size; see `lars_keras.data.resized`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from tqdm import tqdm

from lars_keras.data.parallel_map import cores, map_rows
from lars_keras.data.resized import Storage, resized
from lars_keras.files import atomic_write_text, size_text

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples

_SHARD = 1024  # images in a file
_SAMPLE = 64  # images that are encoded to learn the size of one
VERSION = "1.0.0"


def store(
    train: Examples, test: Examples, num_classes: int, folder: Path, name: str, storage: Storage, origin: str
) -> None:
    """Write both splits as a tensorflow-datasets data set, the examples in the same order.

    A file is written under another name, and renamed when it is complete. So after a kill or with a full disk, what is
    there is whole. The same call goes on, and the result has the same bytes. An unreadable image is stored as an empty
    one, so that ids stay as they are.

    Args:
        train: the training split.
        test: the test split.
        num_classes: number of labels.
        folder: to write to.
        name: of the data set.
        storage: the form of the images.
        origin: what the images are, for the check that a second call has the same.

    Raises:
        ValueError: if the disk lacks space, or the folder holds images of another origin.
        OSError: if the folder cannot be written.
    """
    import tensorflow_datasets as tfds

    splits = {"train": train, "validation": test}
    source = {"origin": origin, "examples": [len(train), len(test)], "bytes": [train.nbytes, test.nbytes]}
    folder.mkdir(parents=True, exist_ok=True)
    _check_source(folder / "source.json", source)
    shards = {split: _shards(name, split, len(examples)) for split, examples in splits.items()}
    left = [
        (splits[split], folder / file, ids)
        for split, files in shards.items()
        for file, ids in files.items()
        if not (folder / file).exists()
    ]
    _check_space(folder, left, storage)
    unreadable = 0
    with tqdm(total=sum(len(ids) for *_, ids in left), desc=name, unit=" images", disable=not left) as done:
        for examples, path, ids in left:
            unreadable += _write_shard(examples, path, ids, storage)
            done.update(len(ids))
    if unreadable:
        logging.warning("%d unreadable images are stored as empty ones", unreadable)
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(ids) for ids in files.values()],
            num_bytes=sum((folder / file).stat().st_size for file in files),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=name, split=split, filetype_suffix="tfrecord"
            ),
        )
        for split, files in shards.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(num_classes, storage),
        split_infos=infos,
        description=f"{origin}, stored as {storage}",
        check_data=False,
    )


def _features(num_classes: int, storage: Storage) -> Any:
    """Return what tensorflow-datasets needs to read the result."""
    import tensorflow_datasets as tfds

    shape = (storage.size, storage.size, 3)
    if storage.encoding == "raw":
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    else:
        image = tfds.features.Image(shape=shape, encoding_format=storage.encoding)
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=num_classes)})


def _shards(name: str, split: str, count: int) -> dict[str, range]:
    """Return the ids in each file of a split."""
    files = -(-count // _SHARD)
    starts = [count * i // files for i in range(files + 1)]
    return {
        f"{name}-{split}.tfrecord-{i:05}-of-{files:05}": range(*ids) for i, ids in enumerate(itertools.pairwise(starts))
    }


def _check_source(path: Path, source: dict[str, Any]) -> None:
    """Refuse to go on with the files of another source; note the source if there is none."""
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != source:
            raise ValueError(
                f"{path.parent} was begun with other images: remove it, or write elsewhere. "
                f"Found: {there}. Received: {source}"
            )
    else:
        atomic_write_text(path, json.dumps(source) + "\n")


def _check_space(folder: Path, left: list[tuple[Examples, Path, range]], storage: Storage) -> None:
    """Refuse to begin what will not fit on the disk, by the size of a sample."""
    if not left:
        return
    examples, _, ids = left[0]
    sample = ids[:: max(len(ids) // _SAMPLE, 1)]
    each = sum(len(data) for data, _ in _converted(examples, sample, storage)) / len(sample) + 64
    needed, free = each * sum(len(ids) for *_, ids in left), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"The images need about {size_text(needed)} in {folder}, and {size_text(free)} are free.")


def _write_shard(examples: Examples, path: Path, ids: range, storage: Storage) -> int:
    """Write one file. Return the number of unreadable images."""
    import tensorflow as tf

    rows = _converted(examples, ids, storage)
    part = path.with_name(f"{path.name}.part")
    try:
        with tf.io.TFRecordWriter(os.fspath(part)) as writer:
            for data, label in rows:
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                record = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(record.SerializeToString(deterministic=True))
    except tf.errors.OpError as e:  # the disk is full, say
        part.unlink(missing_ok=True)
        raise OSError(f"{e.message}: a file could not be written. The same call goes on from here.") from e
    os.replace(part, path)
    return sum(not data for data, _ in rows)


def _converted(examples: Examples, ids: range, storage: Storage) -> list[tuple[bytes, int]]:
    """Return the stored image and the label of each example, in order. An unreadable image is empty, with label 0."""
    import tensorflow as tf

    def convert(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, label = examples.example(i)
        return resized(image, storage), tf.cast(label, tf.int64), True

    def unreadable(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        raw = storage.encoding == "raw"
        empty = tf.zeros((storage.size, storage.size, 3), tf.uint8) if raw else tf.constant(b"")
        return empty, tf.constant(0, tf.int64), False

    rows = map_rows(convert, (tf.constant(list(ids), tf.int64),), cores(), unreadable)
    images, labels, readable = (part.numpy() for part in rows)
    return [
        (b"" if not ok else image if isinstance(image, bytes) else image.tobytes(), int(label))
        for image, label, ok in zip(images, labels, readable, strict=True)
    ]
