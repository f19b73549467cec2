"""Data sets by name, through tensorflow-datasets."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import pad_crop_flip
from lars_keras.data.image_data import ImageData
from lars_keras.data.jpegs import JpegData, Records
from lars_keras.data.records import ArrayRecords, TFRecords

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_TEST_SPLIT = {"digits": "test", "cifar10": "test", "imagenet2012": "validation"}
NAMES = tuple(_TEST_SPLIT)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    remote: bool = False,
) -> ImageData:
    """Loads a data set that tensorflow-datasets has prepared. Nothing is ever downloaded.

    Args:
        name: `"digits"`, prepared on first use (seconds, no network), `"cifar10"` or
            `"imagenet2012"`, both prepared beforehand by `python -m lars_keras.data.prepare`.
        data_dir: the folder that holds the prepared data sets, one folder each; `None` for
            `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        image_size: height and width of the images in pixels. Free for `"imagenet2012"` (`None`:
            227); the other two have their own (`None`: 16 and 32).
        remote: whether batches are made on other hosts than this process's; see `JpegData`.

    Returns:
        The data set.

    Raises:
        ValueError: the name is unknown, the size does not fit, or the files are damaged.
        FileNotFoundError: the data set is not prepared in `data_dir`.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown dataset. Received: {name!r}. Accepted: {', '.join(NAMES)}.")
    root = data_root(data_dir)
    builder_dir = prepared_dir(root, name)
    if builder_dir is None and name == "digits":
        from lars_keras.data.prepare import prepare

        prepare("digits", root)
        builder_dir = prepared_dir(root, name)
    if builder_dir is None:
        raise FileNotFoundError(_how_to_prepare(root, name))

    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(builder_dir)
    for split in ("train", _TEST_SPLIT[name]):
        if split not in builder.info.splits:
            raise FileNotFoundError(f"{builder_dir} has no {split} split: remove it and prepare it again.")
    train, test = (_records(builder, split) for split in ("train", _TEST_SPLIT[name]))
    num_classes = builder.info.features["label"].num_classes
    counts = f"{len(train):,} train and {len(test):,} test images"
    origin = f"{builder.info.full_name} in {root}, {builder.info.file_format.value}"
    if name == "imagenet2012":
        size = image_size or 227
        return JpegData(
            name,
            train,
            test,
            _jpeg_parser(builder.info.features),
            num_classes,
            image_size=size,
            description=f"{counts}, JPEG decoded to {size}x{size}x3 ({origin})",
            remote=remote,
        )
    height, width, channels = builder.info.features["image"].shape
    if image_size not in (None, height):
        raise ValueError(f"`image_size` of {name} is {height}. Received: image_size={image_size}")
    return ArrayData(
        name,
        _decode_all(builder.info.features, train),
        _decode_all(builder.info.features, test),
        num_classes,
        augment=pad_crop_flip if name == "cifar10" else None,
        description=f"{counts}, {height}x{width}x{channels}, in memory ({origin})",
    )


def data_root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Returns the folder of the prepared data sets: `data_dir`, or what tfds uses without one."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(root).expanduser()


def prepared_dir(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the folder of the newest prepared version of a data set, if there is one."""
    found = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    found = [path for path in found if path.name.replace(".", "").isdigit()]
    return max(found, key=lambda path: [int(x) for x in path.name.split(".")], default=None)


def _how_to_prepare(root: pathlib.Path, name: str) -> str:
    command = f"python -m lars_keras.data.prepare --dataset={name} --data_dir={root}"
    if name == "imagenet2012" and not any((root / "downloads" / "manual").glob("*.tar")):
        command += " --manual_dir=FOLDER_OF_THE_TAR_FILES"
    return f"{name} is not in {root}. Name its folder with --data_dir, or prepare it: {command}"


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Records:
    info = builder.info.splits[split]
    kind = ArrayRecords if builder.info.file_format.value == "array_record" else TFRecords
    return kind([os.fspath(path) for path in info.filepaths], info.shard_lengths)


def _jpeg_parser(features: tfds.features.FeaturesDict):
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}

    def parse(record):
        example = features.deserialize_example(record, decoders=skip)
        return example["image"], example["label"]

    return parse


def _decode_all(features: tfds.features.FeaturesDict, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images and labels of a split, in the order of the records."""
    import tensorflow as tf

    def read(ids):
        return np.array(records.read(ids), dtype=object)

    def decode_one(record):
        example = features.deserialize_example(record)
        return example["image"], example["label"]

    def decode(ids):  # in blocks: to dispatch each of these small records would take longer
        block = tf.ensure_shape(tf.numpy_function(read, [ids], tf.string), [None])
        return tf.map_fn(decode_one, block, fn_output_signature=(tf.uint8, tf.int64))

    blocks = tf.data.Dataset.range(len(records)).batch(1024)
    blocks = blocks.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    images, labels = zip(*blocks.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)
