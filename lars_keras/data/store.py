"""Write a data set whose images are stored at one size; see `lars_keras.data.resized`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from tqdm import tqdm

from lars_keras.data.limits import cores
from lars_keras.data.parallel_map import map_rows
from lars_keras.data.resized import Storage, resized
from lars_keras.files import atomic_write_text, size_text

if TYPE_CHECKING:
    import tensorflow as tf

    from lars_keras.data.image_files import Examples, ImageFileData

_SHARD = 1024  # images in a file
_BLOCK = 64  # images that are converted together, or encoded to learn the size of one
_NAMED = 10  # unreadable images that a warning names
VERSION = "1.0.0"
_SOURCE, _INFO = "source.json", "dataset_info.json"


def source_of(data: ImageFileData) -> dict[str, Any]:
    """Return values that identify the images of a data set, wherever they are."""
    splits = (data.train_examples, data.test_examples)
    return {
        "fingerprint": data.fingerprint,
        "examples": [len(examples) for examples in splits],
        "bytes": [examples.nbytes for examples in splits],
    }


def check_source(folder: Path, source: dict[str, Any]) -> None:
    """Refuse files that come from another source than `source_of` returned.

    Files that an earlier version wrote have no fingerprint.

    Raises:
        ValueError: if the files come from another source.
    """
    path = folder / _SOURCE
    if not path.exists():
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if any(there.get(name, value) != value for name, value in source.items()):
        raise ValueError(f"{folder} has other images: remove it, or write elsewhere. Found: {there}. Now: {source}")


def store(data: ImageFileData, folder: Path, name: str, storage: Storage, source: dict[str, Any]) -> None:
    """Write both splits as a tensorflow-datasets data set, the examples in the same order.

    A file is written under another name, and renamed when it is complete. So after a kill or on a full disk, all
    existing files are complete. The same call resumes, and the result has the same bytes. An unreadable image is stored
    as an empty one, so that ids stay the same.

    Args:
        data: the data set.
        folder: to write to, which no other process does.
        name: name of the result.
        storage: the form of the images.
        source: what `source_of` returns, for the check that a second call has the same images.

    Raises:
        ValueError: if the disk lacks space, or the folder holds images of another origin.
        OSError: if the folder cannot be written.
    """
    import tensorflow_datasets as tfds

    splits = {"train": data.train_examples, "validation": data.test_examples}
    folder.mkdir(parents=True, exist_ok=True)
    check_source(folder, source)
    if not (folder / _SOURCE).exists():
        atomic_write_text(folder / _SOURCE, json.dumps(source) + "\n")
    shards = {split: _shards(name, split, len(examples)) for split, examples in splits.items()}
    left = {
        split: {folder / file: ids for file, ids in files.items() if not (folder / file).exists()}
        for split, files in shards.items()
    }
    count = sum(len(ids) for files in left.values() for ids in files.values())
    _check_space(folder, splits, left, count, storage)
    unreadable: list[str] = []
    with tqdm(total=count, desc=name, unit=" images", disable=not count) as done:
        for split, files in left.items():
            rows = _converted(splits[split], [i for ids in files.values() for i in ids], storage)
            for path, ids in files.items():
                empty = _write_shard(path, itertools.islice(rows, len(ids)), done)
                unreadable += [splits[split].where(ids[place]) for place in empty]
    if unreadable:
        named = ", ".join(unreadable[:_NAMED]) + ", ..." * (len(unreadable) > _NAMED)
        logging.warning("%d unreadable images are stored as empty ones: %s", len(unreadable), named)
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
    part = folder / "metadata.part"  # dataset_info.json, which says that all is there, is renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        samples = [part / next(iter(files)) for files in shards.values()]  # tensorflow-datasets looks for their names
        for sample in samples:
            sample.touch()
        tfds.folder_dataset.write_metadata(
            data_dir=part,
            features=_features(data, storage),
            split_infos=infos,
            version=VERSION,
            description=f"{data.fingerprint}, stored as {storage}",
            check_data=False,
        )
        for sample in samples:
            sample.unlink()
        for path in sorted(part.iterdir(), key=lambda path: path.name == _INFO):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _features(data: ImageFileData, storage: Storage) -> Any:
    """Return the features by which tensorflow-datasets reads the result, with the names of the classes."""
    import tensorflow_datasets as tfds

    shape = (storage.size, storage.size, 3)
    if storage.encoding == "raw":
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    else:
        image = tfds.features.Image(shape=shape, encoding_format=storage.encoding)
    names = data.class_names
    if names and all(name.isprintable() and name == name.strip() for name in names):  # lines of a text file
        label = tfds.features.ClassLabel(names=names)
    else:
        label = tfds.features.ClassLabel(num_classes=data.num_classes)
    return tfds.features.FeaturesDict({"image": image, "label": label})


def _shards(name: str, split: str, count: int) -> dict[str, range]:
    """Return the ids in each file of a split."""
    files = -(-count // _SHARD)
    starts = [count * i // files for i in range(files + 1)]
    return {
        f"{name}-{split}.tfrecord-{i:05}-of-{files:05}": range(*ids) for i, ids in enumerate(itertools.pairwise(starts))
    }


def _check_space(
    folder: Path, splits: dict[str, Examples], left: dict[str, dict[Path, range]], count: int, storage: Storage
) -> None:
    """Refuse to begin if the result will not fit on the disk, by the size of a sample."""
    for split, files in left.items():
        for ids in files.values():
            sample = ids[:: max(len(ids) // _BLOCK, 1)][:_BLOCK]
            each = sum(len(data) for data, _ in _converted(splits[split], sample, storage)) / len(sample) + 64
            needed, free = each * count, shutil.disk_usage(folder).free
            if needed > free:
                raise ValueError(
                    f"The images need about {size_text(needed)} in {folder}, and {size_text(free)} are free."
                )
            return


def _write_shard(path: Path, rows: Iterable[tuple[bytes, int]], done: tqdm) -> list[int]:
    """Write one file. Return the places of unreadable images."""
    import tensorflow as tf

    part, unreadable = path.with_name(f"{path.name}.part"), []
    try:
        with tf.io.TFRecordWriter(os.fspath(part)) as writer:
            for place, (data, label) in enumerate(rows):
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                record = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(record.SerializeToString(deterministic=True))
                if not data:
                    unreadable.append(place)
                done.update()
    except tf.errors.OpError as e:  # the disk is full, say
        part.unlink(missing_ok=True)
        raise OSError(f"{e.message}: a file could not be written. The same call goes on from here.") from e
    os.replace(part, path)
    return unreadable


def _converted(examples: Examples, ids: Sequence[int], storage: Storage) -> Iterator[tuple[bytes, int]]:
    """Yield the stored image and the label of each example, in order. An unreadable image is empty, with label 0."""
    import tensorflow as tf

    def convert(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, label = examples.example(i)
        return resized(image, storage), tf.cast(label, tf.int64), True

    def unreadable(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        raw = storage.encoding == "raw"
        empty = tf.zeros((storage.size, storage.size, 3), tf.uint8) if raw else tf.constant(b"")
        return empty, tf.constant(0, tf.int64), False

    if not ids:
        return
    size = min(_BLOCK, len(ids))

    @tf.autograph.experimental.do_not_convert
    def convert_block(block: tf.Tensor) -> Any:
        return map_rows(convert, (block,), cores(), unreadable)

    padded = np.pad(np.asarray(ids, np.int64), (0, -len(ids) % size), mode="edge")
    blocks = tf.data.Dataset.from_tensor_slices(padded.reshape(-1, size)).map(convert_block, num_parallel_calls=2)
    rows = itertools.chain.from_iterable(zip(*block, strict=True) for block in blocks.as_numpy_iterator())
    for image, label, readable in itertools.islice(rows, len(ids)):
        yield (image if isinstance(image, bytes) else image.tobytes()) if readable else b"", int(label)
