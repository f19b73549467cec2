"""Prepare a data set for `lars_keras.data.load`, once.

    python -m lars_keras.data.prepare -n imagenet2012 -m FOLDER_OF_THE_TAR_FILES -d DATA_DIR
    python -m lars_keras.data.prepare -n imagenet2012 -d DATA_DIR -r crop256
    python -m lars_keras.data.prepare -n folder -d FOLDER_OF_TRAIN_AND_VAL -r crop256 -o DATA_DIR

The option -h lists all options.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tarfile
from collections.abc import Iterator

from lars_keras.data.image_files import ImageFileData
from lars_keras.data.locate import PREPARED, data_root, prepared_dir
from lars_keras.data.resized import Storage
from lars_keras.files import local_path
from lars_keras.runtime.folder_lock import lock_folder

_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    manual_dir: str | os.PathLike | None = None,
    file_format: str = "tfrecord",
) -> None:
    """Prepare a data set with its tensorflow-datasets builder, unless it is prepared already.

    Several processes may call this at once. Each writes to a folder of its own. The first to finish renames that
    folder, and the others use it.

    Args:
        name: one of `PREPARED`. `"digits"` is computed, `"cifar10"` is downloaded, and `"imagenet2012"` is made from
            the archives `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`.
        data_dir: as in `lars_keras.data.load`.
        manual_dir: folder of the archives; None for `data_dir/downloads/manual`.
        file_format: `"tfrecord"` or `"array_record"`.

    Raises:
        ValueError: if `data_dir` is not local or not writable, or holds the data set in another format; if an archive
            is damaged.
        FileNotFoundError: if an archive is missing.
        OSError: if a file cannot be read or written.
    """
    root = local_path(data_root(data_dir), "data_dir")
    if found := prepared_dir(root, name):
        import tensorflow_datasets as tfds

        there = tfds.builder_from_directory(found).info.file_format.value
        if there != file_format:
            raise ValueError(
                f"{name} is prepared already, as {there}, in {found}: remove that, or set another `data_dir`. "
                f"Received: file_format={file_format}"
            )
        return
    archives = local_path(manual_dir or root / "downloads" / "manual", "manual_dir")
    if name == "imagenet2012":
        for archive in _ARCHIVES:
            if not (archives / archive).is_file():
                raise FileNotFoundError(
                    f"{archives / archive} does not exist. Set `manual_dir` to the folder of {_ARCHIVES[0]} and "
                    f"{_ARCHIVES[1]} (from https://image-net.org)."
                )
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(
            f"{name} is not prepared in {root}, and that folder is not writable. Set `data_dir` to another folder."
        )

    import tensorflow as tf
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=archives if name == "imagenet2012" else None)
    if name == "digits":
        from lars_keras.data.digits import Digits

        print(f"Making the digits data set in {root}: once, a few seconds", flush=True)
        builder = Digits(data_dir=root, file_format=file_format)
    else:
        builder = tfds.builder(name, data_dir=root, file_format=file_format)
    try:
        with _without_progress() if name == "digits" else contextlib.nullcontext():
            builder.download_and_prepare(download_config=config)
    except OSError:
        if prepared_dir(root, name) is None:  # otherwise another process was faster
            raise
    except (RuntimeError, tf.errors.OpError) as e:
        cause = e.__cause__ or e
        if isinstance(cause, tf.errors.OpError):  # the disk is full, say
            raise OSError(f"{name} could not be prepared: {cause.message}") from e
        raise
    except tarfile.TarError as e:
        damaged = " or ".join(str(archives / name) for name in _ARCHIVES if not _is_whole(archives / name))
        raise ValueError(f"{damaged or archives} is damaged or truncated: {e}") from e


def _is_whole(archive: os.PathLike) -> bool:
    """Return True if an archive can be read to its end; an archive inside it may still be damaged."""
    try:
        with tarfile.open(archive) as opened:
            for _ in opened:
                pass
    except tarfile.TarError:
        return False
    return True


def prepare_resized(
    name: str, data_dir: str | os.PathLike | None, resize: str, out_dir: str | os.PathLike | None = None
) -> str:
    """Store the images of a data set at one size, unless they are stored already. The next call resumes a killed one.

    One process at a time writes the result.

    Args:
        name: `"imagenet2012"`, prepared in `data_dir`, or `"folder"`, the folder `data_dir`.
        data_dir: as in `lars_keras.data.load`.
        resize: form of the stored images; see `lars_keras.data.resized.Storage`.
        out_dir: folder of the result; None for `data_dir`. Required for a folder of images.

    Returns:
        The folder of the result: `out_dir/NAME_FORM/VERSION`.

    Raises:
        ValueError: if an argument has no meaning, the disk lacks space, the result has or was begun with other images,
            or another process writes it.
        FileNotFoundError: if the data set is not in `data_dir`.
        OSError: if a file cannot be written, for example on a full disk. The same call resumes.
    """
    from lars_keras.data.loading import ANY_SIZE, load
    from lars_keras.data.store import VERSION, check_source, source_of, store

    if name not in ANY_SIZE:
        raise ValueError(f"`resize` is for {' and '.join(ANY_SIZE)}. Received: resize={resize}, {name=}")
    if name == "folder" and out_dir is None:
        raise ValueError("`resize` of a folder needs `out_dir`, another folder. Received: out_dir=None")
    storage = Storage.parse(resize)
    root = local_path(out_dir or data_root(data_dir), "out_dir")
    kind = f"{name}_{storage}"
    data = load(name, data_dir=data_dir)
    assert isinstance(data, ImageFileData)
    source = source_of(data)
    if prepared_dir(root, kind) is None:
        with lock_folder(root / kind, "out_dir"):
            if prepared_dir(root, kind) is None:  # another process may just have finished
                store(data, root / kind / VERSION, kind, storage, source)
    folder = prepared_dir(root, kind)
    assert folder
    check_source(folder, source)
    return str(folder)


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Silence tensorflow-datasets, which reports a download of unknown size although nothing is downloaded."""
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)


def _prepare(options: argparse.Namespace) -> None:
    file_format = options.file_format or "tfrecord"
    prepare(options.dataset, options.data_dir, manual_dir=options.manual_dir, file_format=file_format)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit code: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lars_keras.data.prepare", description="Prepare a data set, once.")
    names = (*PREPARED, "folder")
    parser.add_argument("-n", "--dataset", required=True, choices=names, help="name of the data set")
    parser.add_argument("-d", "--data_dir", help="folder of the prepared data sets (default: ~/tensorflow_datasets)")
    parser.add_argument("-m", "--manual_dir", help="folder of the two ImageNet archives")
    parser.add_argument("-f", "--file_format", choices=("tfrecord", "array_record"), help="(default: tfrecord)")
    parser.add_argument(
        "-r",
        "--resize",
        metavar="FORM",
        help="store the images of imagenet2012 or of a folder at one size: crop256 (shorter side 256, then the central "
        "square), squash256 (the aspect ratio is lost); JPEG of quality 95, or _q90, _png, _raw, as in crop256_raw",
    )
    parser.add_argument("-o", "--out_dir", help="folder for the resized images (default: DATA_DIR)")
    options = parser.parse_args(arguments)
    try:
        if options.manual_dir and options.dataset != "imagenet2012":
            raise ValueError(f"`manual_dir` is for imagenet2012. Received: manual_dir={options.manual_dir}")
        if options.out_dir and not options.resize:
            raise ValueError(f"`out_dir` needs `resize`. Received: out_dir={options.out_dir}, no `resize`")
        if options.file_format and options.dataset == "folder":
            raise ValueError(f"`file_format` is not for a folder. Received: file_format={options.file_format}")
        if options.resize:
            if options.manual_dir and not prepared_dir(data_root(options.data_dir), options.dataset):
                _prepare(options)
            folder = prepare_resized(options.dataset, options.data_dir, options.resize, options.out_dir)
            print(f"{options.dataset} is stored as {options.resize} in {folder}.")
            return 0
        if options.dataset == "folder":
            raise ValueError("A folder of images needs no preparation but `resize`. Received: no `resize`")
        _prepare(options)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.dataset} is prepared in {data_root(options.data_dir)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
