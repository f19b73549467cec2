"""Data sets by name, through tensorflow-datasets."""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import pad_crop_flip
from lars_keras.data.base import AUGMENTS, ImageData
from lars_keras.data.folder import FolderExamples, read_folder
from lars_keras.data.image_files import Examples, ImageFileData
from lars_keras.data.locate import PREPARED, TEST_SPLIT, data_root, prepared_dir
from lars_keras.data.records import ArrayRecords, ParsedRecords, Records, TFRecords
from lars_keras.data.subset import Subset, holdout

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

NAMES = (*PREPARED, "folder")
ANY_SIZE = ("imagenet2012", "folder")  # decoded to whatever size is wanted
CACHES = ("none", "memory", "disk")


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    augment: str | None = None,
    cache: str = "none",
    cache_dir: str | os.PathLike | None = None,
    remote: bool = False,
    validation_split: float = 0.0,
) -> ImageData:
    """Loads a data set. Nothing is ever downloaded.

    Args:
        name: `"digits"`, prepared on first use (seconds, no network); `"cifar10"` or `"imagenet2012"`, both prepared
            beforehand by `python -m lars_keras.data.prepare`; or `"folder"`, image files in folders of their classes
            (see `read_folder`), which needs `data_dir`.
        data_dir: the folder that holds the prepared data sets, one folder each; `None` for
            `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. A bucket's (`gs://...`) needs `cache="disk"`.
        image_size: height and width of the images in pixels. Free for `ANY_SIZE` (`None`:
            227); the others have their own (`None`: 16 and 32).
        augment: one of `AUGMENTS`; `None` for the data set's own: `"none"` for digits, else `"crop_flip"`.
        cache: for `ANY_SIZE`: `"none"`, files are read where they are; `"memory"`, they are all read once and held,
            not decoded; `"disk"`, they are copied once to `cache_dir`, a disk of this machine.
        cache_dir: the folder of the copies; `None` for `~/.cache/lars_keras`.
        remote: whether batches are made on other hosts than this process's; see `ImageFileData`.
        validation_split: of the training images, left out of training and scored in the place of the test split.

    Returns:
        The data set.

    Raises:
        ValueError: a value is unknown or does not fit the data set, there is no room for the cache, or the files are
            damaged.
        FileNotFoundError: the data set is not in `data_dir`.
    """
    for text, value, accepted in (("dataset", name, NAMES), ("augment", augment, AUGMENTS), ("cache", cache, CACHES)):
        if value is not None and value not in accepted:
            raise ValueError(f"Unknown {text}. Received: {value!r}. Accepted: {', '.join(accepted)}.")
    if name not in ANY_SIZE and cache != "none":
        raise ValueError(
            f"--cache is for {' and '.join(ANY_SIZE)}; {name} is in memory anyway. Received: --cache={cache}"
        )
    if remote and cache != "none":
        raise ValueError(
            "--cache serves the machine that this process runs on, not the other hosts of a pod slice. Received: "
            f"--cache={cache}"
        )
    if name == "folder" and data_dir is None:
        raise ValueError("--dataset=folder needs --data_dir, the folder of train/ and val/. Received: no --data_dir")
    if augment == "alternating_flip" and name in ANY_SIZE:
        raise ValueError(
            f"alternating_flip is for images in memory, as of cifar10. Received: augment={augment!r}, {name=}"
        )
    if augment == "randaugment":
        try:
            import lars_keras.data.randaugment  # noqa: F401
        except ImportError as e:
            raise ValueError(str(e)) from e
    root = data_root(data_dir)
    options: dict[str, Any] = {"image_size": image_size or 227, "augment": augment or "crop_flip", "remote": remote}
    if name == "folder":
        train_files: Examples
        test_files: Examples
        train_files, test_files, classes = read_folder(root)
        if cache == "disk":
            train_files, test_files = (
                FolderExamples(_on_disk(files.paths, root, cache_dir), files.labels)
                for files in (train_files, test_files)
            )
        if validation_split:
            train_files, test_files = _apart(train_files, validation_split)
        return _image_file_data(name, train_files, test_files, len(classes), f"in {root}", cache, options)
    builder_dir = prepared_dir(root, name)
    if builder_dir is None and name == "digits":
        from lars_keras.data.prepare import prepare

        prepare("digits", root)
        builder_dir = prepared_dir(root, name)
    if builder_dir is None:
        raise FileNotFoundError(_how_to_prepare(root, name))

    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(builder_dir)
    for split in ("train", TEST_SPLIT[name]):
        if split not in builder.info.splits:
            raise FileNotFoundError(f"{builder_dir} has no {split} split: remove it and prepare it again.")
    if "://" in str(builder_dir) and name not in ANY_SIZE:
        raise ValueError(
            f"{name} is read from a local folder: copy {builder_dir} to one, and name that with --data_dir."
        )
    if "://" in str(builder_dir) and cache != "disk":
        raise ValueError(
            f"{builder_dir} is in a bucket, where single records take too long to read: --cache=disk copies its files. "
            f"Received: --cache={cache}"
        )
    if remote and builder.info.file_format.value == "array_record":
        raise ValueError(
            f"{builder_dir} is array_record, which the hosts of a pod slice cannot read; tfrecord they can."
        )
    train, test = (
        _records(
            builder, split, _on_disk(builder.info.splits[split].filepaths, root, cache_dir) if cache == "disk" else None
        )
        for split in ("train", TEST_SPLIT[name])
    )
    num_classes = builder.info.features["label"].num_classes
    origin = f"{builder.info.full_name} in {root}, {builder.info.file_format.value}"
    if name == "imagenet2012":
        parse = _jpeg_parser(builder.info.features)
        train_images: Examples = ParsedRecords(train, parse)
        test_images: Examples = ParsedRecords(test, parse)
        if validation_split:
            train_images, test_images = _apart(train_images, validation_split)
        return _image_file_data(name, train_images, test_images, num_classes, origin, cache, options)
    height, width, channels = builder.info.features["image"].shape
    if image_size not in (None, height):
        raise ValueError(f"`image_size` of {name} is {height}. Received: image_size={image_size}")
    train_arrays = _decode_all(builder.info.features, train)
    if validation_split:
        images, labels = train_arrays
        parts = holdout(len(train), validation_split, _originals(name))
        train_arrays, test_arrays = ((images[ids], labels[ids]) for ids in parts)
    else:
        test_arrays = _decode_all(builder.info.features, test)
    return ArrayData(
        name,
        train_arrays,
        test_arrays,
        num_classes,
        crop_flip=pad_crop_flip if name == "cifar10" else None,
        augment=augment,
        description=f"{_counts(train_arrays[0], test_arrays[0])}, {height}x{width}x{channels}, in memory ({origin})",
    )


def _apart(train: Examples, share: float) -> tuple[Examples, Examples]:
    kept, apart = holdout(len(train), share)
    return Subset(train, kept), Subset(train, apart)


def _originals(name: str) -> int | None:
    """Of how many images the training images are copies; see `holdout`."""
    if name != "digits":
        return None
    from lars_keras.data.digits import NUM_SOURCES

    return NUM_SOURCES


def _image_file_data(
    name: str, train: Examples, test: Examples, num_classes: int, origin: str, cache: str, options: dict[str, Any]
) -> ImageFileData:
    if cache == "memory":
        from lars_keras.data.cache import InMemory

        train, test = InMemory(train), InMemory(test)
    size = options["image_size"]
    description = f"{_counts(train, test)}, JPEG decoded to {size}x{size}x3 ({origin}; cache: {cache})"
    return ImageFileData(name, train, test, num_classes, description=description, **options)


def _counts(train: Any, test: Any) -> str:
    return f"{len(train):,} train and {len(test):,} test images"


def _on_disk(paths: Any, root: Any, cache_dir: str | os.PathLike | None) -> list[str]:
    """The copies of files below `root` in a folder of the cache that is named after it."""
    from lars_keras.data.cache import copied

    folder = pathlib.Path(cache_dir or "~/.cache/lars_keras").expanduser()
    full = os.fspath(root) if "://" in os.fspath(root) else os.path.realpath(root)
    place = f"{os.path.basename(full)}-{hashlib.sha256(full.encode()).hexdigest()[:12]}"
    return copied([os.fspath(path) for path in paths], os.fspath(root), folder / place)


def _how_to_prepare(root: pathlib.Path, name: str) -> str:
    command = f"python -m lars_keras.data.prepare --dataset={name} --data_dir={root}"
    if name == "imagenet2012" and not any((root / "downloads" / "manual").glob("*.tar")):
        command += " --manual_dir=FOLDER_OF_THE_TAR_FILES"
    return f"{name} is not in {root}. Name its folder with --data_dir, or prepare it: {command}"


def _records(builder: tfds.core.DatasetBuilder, split: str, paths: list[str] | None) -> Records:
    info = builder.info.splits[split]
    kind = ArrayRecords if builder.info.file_format.value == "array_record" else TFRecords
    return kind(paths or [os.fspath(path) for path in info.filepaths], info.shard_lengths)


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
