"""Load data sets by name: from tensorflow-datasets, or from folders of images."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import pad_crop_flip
from lars_keras.data.base import AUGMENTS, ImageData
from lars_keras.data.fingerprint import builder_parts, fingerprint
from lars_keras.data.folder import FolderExamples, describe_left_out, empty_classes, read_folder
from lars_keras.data.image_files import Examples, ImageFileData
from lars_keras.data.locate import PREPARED, data_root, prepared_dir, test_split
from lars_keras.data.records import ArrayRecords, ParsedRecords, Records, TFRecords
from lars_keras.data.resized import Storage
from lars_keras.data.subset import Subset, holdout
from lars_keras.data.unreadable import reason_of
from lars_keras.files import local_path, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import tensorflow as tf
    import tensorflow_datasets as tfds

NAMES = (*PREPARED, "folder")
ANY_SIZE = ("imagenet2012", "folder")  # decoded to any size
CACHES = ("none", "memory", "disk")


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    augment: str | None = None,
    resized: str | None = None,
    cache: str = "none",
    cache_dir: str | os.PathLike | None = None,
    remote: bool = False,
    validation_split: float = 0.0,
) -> ImageData:
    """Load a data set. Nothing is ever downloaded.

    Args:
        name: one of `NAMES`. `"digits"` is prepared at the first use (seconds, no network); `lars_keras.data.prepare`
            prepares `"cifar10"` and `"imagenet2012"` beforehand; `"folder"` is a folder of images in `data_dir`, one
            folder per class (see `read_folder`).
        data_dir: folder of the prepared data sets, each in a folder of its own; None for `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`. A bucket (`gs://...`) needs `cache="disk"`.
        image_size: height and width of the images in pixels. Data sets in `ANY_SIZE` accept any (None: 227). The others
            have a fixed size.
        resized: form of the stored images, such as `"crop256"`, for imagenet2012 and folder: reads what
            `lars_keras.data.prepare` has written to `data_dir` with `resize`; see `lars_keras.data.resized.Storage`.
        augment: one of `AUGMENTS`; None for `"none"` with digits, and `"crop_flip"` otherwise.
        cache: for data sets in `ANY_SIZE`. `"none"` reads the files where they are; `"memory"` reads all of them once
            and holds them encoded; `"disk"` copies them once to `cache_dir` on a local disk.
        cache_dir: folder of the copies; None for `~/.cache/lars_keras`.
        remote: whether hosts other than this process's make the batches; see `ImageFileData`.
        validation_split: fraction of the training images to hold out. They replace the test split, so a folder of
            images then needs no folder for it.

    Returns:
        The data set.

    Raises:
        ValueError: if a value is unknown or does not fit the data set, if the cache lacks space, or if the files are
            damaged.
        FileNotFoundError: if the data set is not in `data_dir`.
    """
    _check_arguments(name, data_dir, augment, cache, remote)
    root = data_root(data_dir)
    options: dict[str, Any] = {
        "image_size": 227 if image_size is None else image_size,
        "augment": augment or "crop_flip",
        "remote": remote,
    }
    if resized is not None:
        if name not in ANY_SIZE:
            raise ValueError(f"`resized` is for {' and '.join(ANY_SIZE)}, not {name}. Received: resized={resized}")
        options["storage"] = Storage.parse(resized)
    if name == "folder" and not resized:
        return _load_folder(root, validation_split, cache, cache_dir, options)
    if printable(os.fspath(root)) != os.fspath(root):
        raise ValueError(f"`data_dir` must be UTF-8 for {name}. Received: data_dir={printable(os.fspath(root))}")
    stored_name = f"{name}_{options['storage']}" if resized else name
    builder = _builder(root, stored_name)
    _check_access(builder, root, stored_name, cache, remote)
    splits = ("train", test_split(name))
    files = [
        _on_disk(builder.info.splits[split].filepaths, root, cache_dir) if cache == "disk" else None for split in splits
    ]
    train, test = (_records(builder, split, paths) for split, paths in zip(splits, files, strict=True))
    origin = f"{builder.info.full_name} in {root}, {builder.info.file_format.value}"
    features = builder.info.features
    found: ImageData
    if name in ANY_SIZE:
        metadata, count = builder_parts(builder, splits, described=resized is not None), features["label"].num_classes
        options["fingerprint"] = fingerprint(len(train), len(test), count, metadata)
        parse = _parser(features)
        images = ParsedRecords(train, parse), ParsedRecords(test, parse)
        found = _image_file_data(name, *images, validation_split, count, origin, cache, options)
    else:
        found = _load_arrays(name, features, train, test, validation_split, origin, image_size, augment)
    names = tuple(features["label"].names)
    if names != tuple(map(str, range(len(names)))):  # else tensorflow-datasets makes them up
        found.class_names = names
    return found


def _load_folder(
    root: Any, validation_split: float, cache: str, cache_dir: str | os.PathLike | None, options: dict[str, Any]
) -> ImageData:
    """Load a folder of images."""
    if "://" in os.fspath(root):
        raise ValueError(f"A folder of images must be on a local disk: copy it to one. Received: data_dir={root}")
    train, test, classes = read_folder(root, needs_test=not validation_split)
    contents = itertools.chain(train.parts(), test.parts())
    options = options | {"fingerprint": fingerprint(len(train), len(test), len(classes), contents)}
    if cache == "disk":
        train, test = (
            FolderExamples(_on_disk(files.paths, root, cache_dir), files.labels, files.left_out)
            for files in (train, test)
        )
    origin = f"in {printable(str(root))}"
    found = _image_file_data("folder", train, test, validation_split, len(classes), origin, cache, options)
    trained = train.labels[holdout(len(train), validation_split)[0]] if validation_split else train.labels
    _mention(found, empty_classes(trained, classes), train.left_out + test.left_out)
    found.class_names = tuple(classes)
    return found


def _load_arrays(
    name: str,
    features: Any,
    train: Records,
    test: Records,
    validation_split: float,
    origin: str,
    image_size: int | None,
    augment: str | None,
) -> ImageData:
    """Load records of images of one size, all into memory."""
    height, width, channels = features["image"].shape
    if image_size not in (None, height):
        raise ValueError(f"`image_size` of {name} is {height}. Received: image_size={image_size}")
    train_arrays = _decode_all(features, train)
    if validation_split:
        images, labels = train_arrays
        parts = holdout(len(train), validation_split, _originals(name))
        train_arrays, test_arrays = ((images[ids], labels[ids]) for ids in parts)
    else:
        test_arrays = _decode_all(features, test)
    return ArrayData(
        name,
        train_arrays,
        test_arrays,
        features["label"].num_classes,
        crop_flip=pad_crop_flip if name == "cifar10" else None,
        augment=augment,
        description=f"{_counts(train_arrays[0], test_arrays[0])}, {height}x{width}x{channels}, in memory ({origin})",
    )


def _check_arguments(
    name: str, data_dir: str | os.PathLike | None, augment: str | None, cache: str, remote: bool
) -> None:
    """Raise a `ValueError` for arguments of `load` that are unknown or exclude each other."""
    if name not in NAMES:
        raise ValueError(f"The data set must be one of {', '.join(NAMES)}. Received: {name!r}")
    if augment is not None and augment not in AUGMENTS:
        raise ValueError(f"`augment` must be one of {', '.join(AUGMENTS)}. Received: augment={augment!r}")
    if cache not in CACHES:
        raise ValueError(f"`cache` must be one of {', '.join(CACHES)}. Received: cache={cache!r}")
    if name not in ANY_SIZE and cache != "none":
        raise ValueError(
            f"`cache` is for {' and '.join(ANY_SIZE)}; {name} is in memory anyway. Received: cache={cache}"
        )
    if remote and cache != "none":
        raise ValueError(
            "`cache` serves the machine of this process, not the other hosts of a pod slice. Received: "
            f"cache={cache}, {remote=}"
        )
    if name == "folder" and data_dir is None:
        raise ValueError("The data set folder needs `data_dir`, the folder of train/ and val/. Received: data_dir=None")
    if augment == "alternating_flip" and name in ANY_SIZE:
        raise ValueError(
            f"`augment` alternating_flip is for images in memory, such as cifar10, not for {name}. "
            f"Received: augment={augment}"
        )
    if augment == "randaugment":
        try:
            import lars_keras.data.randaugment  # noqa: F401
        except ImportError as e:
            raise ValueError(str(e)) from e


def _find(root: Any, name: str) -> Any | None:
    """Return the folder of a prepared data set. Raise a `ValueError` for a bucket that cannot be reached."""
    if "://" not in os.fspath(root):
        return prepared_dir(root, name)
    if not name.startswith(ANY_SIZE):
        raise ValueError(f"{name} is read from a local folder: copy {root / name} to one, and set `data_dir` to that.")
    try:
        return prepared_dir(root, name)
    except Exception as e:  # of TensorFlow, fsspec or a missing package
        raise ValueError(
            f"`data_dir` cannot be read: {(str(e) or type(e).__name__).splitlines()[0]}. Received: data_dir={root}"
        ) from e


def _builder(root: Any, name: str) -> tfds.core.DatasetBuilder:
    """Return the builder of a prepared data set. Prepare the digits if they are missing."""
    builder_dir = _find(root, name)
    if builder_dir is None and name == "digits":
        from lars_keras.data.prepare import prepare

        prepare("digits", root)
        builder_dir = prepared_dir(root, name)
    if builder_dir is None:
        raise FileNotFoundError(_how_to_prepare(root, name))

    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(builder_dir)
        features = builder.info.features
        usable = {"image", "label"} <= set(features)
        usable = usable and isinstance(features["label"], tfds.features.ClassLabel)
    except Exception as e:  # whatever tensorflow-datasets makes of the files of another version
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"{builder_dir} cannot be read by tensorflow-datasets {tfds.__version__}, so another version has probably "
            f"written it: {reason}. Prepare it again in another `data_dir`, or install the version that wrote it."
        ) from e
    if not usable:
        raise ValueError(f"{builder_dir} is not {name}: it has no features image and label. Set another `data_dir`.")
    for split in ("train", test_split(name)):
        if split not in builder.info.splits:
            raise FileNotFoundError(f"{builder_dir} has no {split} split: remove it and prepare it again.")
    return builder


def _check_access(builder: tfds.core.DatasetBuilder, root: Any, name: str, cache: str, remote: bool) -> None:
    """Raise a `ValueError` if the files cannot be read in the requested way."""
    folder = prepared_dir(root, name)
    if "://" in str(folder) and cache != "disk":
        raise ValueError(
            f"{folder} is in a bucket, where single records take too long to read: set `cache` to disk, which copies "
            f"the files. Received: cache={cache}"
        )
    if remote and builder.info.file_format.value == "array_record":
        raise ValueError(
            f"{folder} is array_record, which the hosts of a pod slice cannot read. They can read tfrecord."
        )


def _originals(name: str) -> int | None:
    """Return the number of originals whose copies the training images are; see `holdout`."""
    if name != "digits":
        return None
    from lars_keras.data.digits import NUM_SOURCES

    return NUM_SOURCES


def _image_file_data(
    name: str,
    train: Examples,
    test: Examples,
    validation_split: float,
    num_classes: int,
    origin: str,
    cache: str,
    options: dict[str, Any],
) -> ImageFileData:
    """Hold out validation images, fill the cache in memory, and describe the data."""
    if validation_split:
        parts = holdout(len(train), validation_split)
        train, test = (Subset(train, ids) for ids in parts)
    if cache == "memory":
        from lars_keras.data.cache import InMemory

        train, test = InMemory(train), InMemory(test)
    size = options["image_size"]
    description = f"{_counts(train, test)}, decoded to {size}x{size}x3 ({origin}; cache: {cache})"
    return ImageFileData(name, train, test, num_classes, description=description, **options)


def _mention(data: ImageFileData, empty: list[str], left_out: Mapping[str, int]) -> None:
    """Describe the files that are in the folder but in no split, and warn of classes without training images."""
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        data.description += f"; no training images of {names}"
        data.warnings = (f"{len(empty)} of {data.num_classes} classes have no training images: {names}.",)
    if left_out:
        data.description += f"; left out: {describe_left_out(left_out)}"


def _counts(train: Any, test: Any) -> str:
    return f"{len(train):,} train and {len(test):,} test images"


def _on_disk(paths: Any, root: Any, cache_dir: str | os.PathLike | None) -> list[str]:
    """Copy files below `root` to a folder of the cache that is named after `root`. Return the paths of the copies."""
    from lars_keras.data.cache import copy_to_local

    folder = local_path(cache_dir or "~/.cache/lars_keras", "cache_dir")
    full = os.fspath(root) if "://" in os.fspath(root) else os.path.realpath(root)
    place = f"{os.path.basename(full)}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:12]}"
    return copy_to_local([os.fspath(path) for path in paths], os.fspath(root), folder / place)


def _how_to_prepare(root: pathlib.Path, name: str) -> str:
    name, _, form = name.partition("_")
    command = f"python -m lars_keras.data.prepare -n {name} -d {root if name != 'folder' else 'FOLDER'}"
    if form:
        command += f" -r {form} -o {root}"
    if name == "imagenet2012" and not any((root / "downloads" / "manual").glob("*.tar")):
        command += " -m FOLDER_OF_THE_TAR_FILES"
    return (
        f"{name}{f'_{form}' if form else ''} is not in {root}. Set `data_dir` to its folder, or prepare it: {command}"
    )


def _records(builder: tfds.core.DatasetBuilder, split: str, paths: list[str] | None) -> Records:
    info = builder.info.splits[split]
    kind = ArrayRecords if builder.info.file_format.value == "array_record" else TFRecords
    return kind(paths or [os.fspath(path) for path in info.filepaths], info.shard_lengths)


def _parser(features: tfds.features.FeaturesDict) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return a function that maps a record to the encoded image and the label."""
    import tensorflow_datasets as tfds

    if not isinstance(features["image"], tfds.features.Image):  # raw pixels
        import tensorflow as tf

        scalars = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
        return lambda record: tuple(tf.io.parse_single_example(record, scalars)[key] for key in ("image", "label"))
    skip = {"image": tfds.decode.SkipDecoding()}

    def parse(record):
        example = features.deserialize_example(record, decoders=skip)
        return example["image"], example["label"]

    return parse


def _decode_all(features: tfds.features.FeaturesDict, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Decode all images and labels of a split, in the order of the records.

    Raises:
        ValueError: if a record is damaged or missing.
    """
    import tensorflow as tf

    def decode_one(record):
        example = features.deserialize_example(record)
        return example["image"], example["label"]

    def decode(block):  # in blocks, because each dispatch of a small record costs more than its decoding
        return tf.map_fn(decode_one, block, fn_output_signature=(tf.uint8, tf.int64))

    blocks = records.dataset().batch(1024)
    blocks = blocks.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    try:
        images, labels = zip(*blocks.as_numpy_iterator(), strict=True)
    except tf.errors.OpError as e:
        raise ValueError(f"A file in {records.folder} cannot be read: {reason_of(e)}") from e
    return np.concatenate(images), np.concatenate(labels)
