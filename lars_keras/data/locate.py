"""Finds prepared data sets on disk or in a bucket."""

from __future__ import annotations

import os
import pathlib
from typing import Any

TEST_SPLIT = {"digits": "test", "cifar10": "test", "imagenet2012": "validation"}
PREPARED = tuple(TEST_SPLIT)


def data_root(data_dir: str | os.PathLike | None) -> Any:
    """Returns the folder of the prepared data sets, `data_dir` or what tfds uses without one: a `pathlib.Path`, or one
    like it of a bucket."""
    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if "://" in root:
        from etils import epath

        return epath.Path(root)
    return pathlib.Path(root).expanduser()


def prepared_dir(root: Any, name: str) -> Any | None:
    """Returns the folder of the newest prepared version of a data set, if there is one."""
    found = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    found = [path for path in found if path.name.replace(".", "").isdigit()]
    return max(found, key=lambda path: [int(x) for x in path.name.split(".")], default=None)
