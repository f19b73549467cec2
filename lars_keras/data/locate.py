"""Locations of prepared data sets, on disk or in a bucket."""

from __future__ import annotations

import os
import pathlib
from typing import Any

TEST_SPLIT = {"digits": "test", "cifar10": "test", "imagenet2012": "validation"}
PREPARED = tuple(TEST_SPLIT)


def data_root(data_dir: str | os.PathLike | None) -> Any:
    """Return the folder of the prepared data sets.

    Args:
        data_dir: the folder; None for `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` without it.

    Returns:
        A `pathlib.Path`, or for a bucket an `etils.epath.Path`.
    """
    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if "://" in root:
        from etils import epath

        return epath.Path(root)
    return pathlib.Path(root).expanduser()


def prepared_dir(root: Any, name: str) -> Any | None:
    """Return the folder of the newest prepared version of a data set, or None if there is none."""
    found = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    found = [path for path in found if path.name.replace(".", "").isdigit()]
    return max(found, key=lambda path: [int(x) for x in path.name.split(".")], default=None)
