"""Locations of prepared data sets, on disk or in a bucket."""

from __future__ import annotations

import os
import re
from typing import Any

from lars_keras.files import local_path

PREPARED = ("digits", "cifar10", "imagenet2012")
_BUCKETS = ("gs://", "s3://")


def data_root(data_dir: str | os.PathLike | None) -> Any:
    """Return the folder of the prepared data sets.

    Args:
        data_dir: the folder; None for `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` without it.

    Returns:
        A `pathlib.Path`, or for a bucket an `etils.epath.Path`.

    Raises:
        ValueError: if it is the address of another service, or begins with `~` of an unknown user.
    """
    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if root.startswith(_BUCKETS):
        from etils import epath

        return epath.Path(root)
    return local_path(root, "data_dir")


def prepared_dir(root: Any, name: str) -> Any | None:
    """Return the folder of the newest prepared version of a data set, or None if there is none."""
    found = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    found = [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return max(found, key=lambda path: [int(x) for x in path.name.split(".")], default=None)


def test_split(name: str) -> str:
    """Return the name of the split that scores a data set."""
    return "test" if name in ("digits", "cifar10") else "validation"
