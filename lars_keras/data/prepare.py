"""Prepares a data set for `lars_keras.data.load`, once.

python -m lars_keras.data.prepare --dataset=imagenet2012 --manual_dir=ARCHIVES --data_dir=DATA
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from lars_keras.data.locate import PREPARED, data_root, prepared_dir

_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    manual_dir: str | os.PathLike | None = None,
    file_format: str = "tfrecord",
) -> None:
    """Prepares a data set, if it is not, with its tensorflow-datasets builder.

    Several processes may do this at once: each writes to a folder of its own, the first to finish
    renames it, and the others find it there.

    Args:
        name: one of `PREPARED`. `"digits"` is computed, `"cifar10"` downloaded, and
            `"imagenet2012"` made from the archives `ILSVRC2012_img_train.tar` and
            `ILSVRC2012_img_val.tar`.
        data_dir: as in `lars_keras.data.load`.
        manual_dir: the folder of the archives; `None` for `data_dir/downloads/manual`.
        file_format: `"tfrecord"` or `"array_record"`.

    Raises:
        ValueError: the data set cannot be written to `data_dir`, or is there in another format.
        FileNotFoundError: an archive is missing.
    """
    root = data_root(data_dir)
    if found := prepared_dir(root, name):
        import tensorflow_datasets as tfds

        there = tfds.builder_from_directory(found).info.file_format.value
        if there != file_format:
            raise ValueError(
                f"{name} is prepared already, as {there}, in {found}: remove that, or name another --data_dir. "
                f"Received: --file_format={file_format}"
            )
        return
    archives = pathlib.Path(manual_dir or root / "downloads" / "manual").expanduser()
    if name == "imagenet2012":
        for archive in _ARCHIVES:
            if not (archives / archive).is_file():
                raise FileNotFoundError(
                    f"{archives / archive} does not exist. Name the folder of {_ARCHIVES[0]} and "
                    f"{_ARCHIVES[1]} (from https://image-net.org) with --manual_dir."
                )
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(
            f"{name} is not prepared in {root}, which cannot be written to. Name another folder with --data_dir."
        )

    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=archives if name == "imagenet2012" else None)
    if name == "digits":
        from lars_keras.data.digits import Digits

        builder = Digits(data_dir=root, file_format=file_format)
    else:
        builder = tfds.builder(name, data_dir=root, file_format=file_format)
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:
        if prepared_dir(root, name) is None:  # else another process was faster
            raise


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lars_keras.data.prepare", description="Prepares a data set, once.")
    parser.add_argument("--dataset", required=True, choices=PREPARED)
    parser.add_argument("--data_dir", help="where to (default: ~/tensorflow_datasets)")
    parser.add_argument("--manual_dir", help="the folder of the ImageNet archives")
    parser.add_argument("--file_format", default="tfrecord", choices=("tfrecord", "array_record"))
    options = parser.parse_args(arguments)
    try:
        prepare(
            options.dataset,
            options.data_dir,
            manual_dir=options.manual_dir,
            file_format=options.file_format,
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.dataset} is prepared in {data_root(options.data_dir)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
