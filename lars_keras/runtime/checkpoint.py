"""Checkpoints on disk: written in the background, complete or absent, verified on reading.

A checkpoint is one NumPy `.npz` file, `update-00000042-<first 16 digits of its SHA-256>.npz`. The file gets this name
after all of it is on the disk. A kill therefore leaves the whole file or none, and a bit that flips later contradicts
the checksum in the name.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lars_keras.checks import check_count, check_number
from lars_keras.files import local_path, remove_abandoned, sync, temporary_name
from lars_keras.runtime.errors import Preempted, UsageError

_NAME = re.compile(r"update-(\d+)-([0-9a-f]{16})\.npz")
_METADATA = "info"  # its entry in the file


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two updates.

    Attributes:
        update: number of finished updates.
        arrays: saved arrays by name.
        metadata: JSON-serializable values saved with the arrays.
        path: file of the checkpoint.
    """

    update: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    path: Path


class CheckpointManager:
    """Writes, reads and deletes the checkpoints of one run.

    Args:
        directory: folder of the checkpoints, created with the first one.
        max_to_keep: number of newest checkpoints to keep.
        keep_every_n_hours: also keep one older checkpoint per this many hours. None keeps no older one. Otherwise those
            that are older when this process begins stay.

    Raises:
        ValueError: if `max_to_keep` is below 1, or `directory` is an address (`gs://...`) and not a local folder.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_to_keep: int = 3, keep_every_n_hours: float | None = None
    ):
        max_to_keep = check_count("max_to_keep", max_to_keep, at_least=1)
        self.directory = local_path(directory, "directory")
        self._max_to_keep, self._keep_every_n_hours = max_to_keep, keep_every_n_hours
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._damaged: set[Path] = set()

    def check_newest(self, update: int) -> None:
        """Refuse to save an update if the folder has undamaged checkpoints of later updates.

        Args:
            update: update of this run; -1 if the run begins anew, so that all checkpoints belong to another run.

        Raises:
            UsageError: if it has. They belong to another run, or this run was not restored.
        """
        newer = [path for path in self._paths() if _update(path) > update and path not in self._damaged]
        if newer:
            raise UsageError(
                f"{self.directory} holds a checkpoint of update {_update(newer[0])}, and this run is at update "
                f"{max(update, 0)}. Restore the newest checkpoint to go on with that run, or name another folder. "
                "Checkpoints of another run are never deleted."
            )

    def save(self, update: int, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
        """Start to write a checkpoint in the background.

        First waits until the previous checkpoint is written. The caller must not change `arrays` afterwards.

        Raises:
            UsageError: if the folder has checkpoints of later updates.
        """
        with contextlib.suppress(OSError):  # logged by the thread
            self.wait()
        self.check_newest(update)
        self._writing = self._writer.submit(self._write, update, dict(arrays), dict(metadata))

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError: if the last checkpoint could not be written. The older ones are unchanged.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None. Log the name of each damaged one.

        Raises:
            OSError: if a file cannot be read. It may be undamaged, and a run that started without it would delete it.
        """
        with contextlib.suppress(OSError):
            self.wait()
        for path in self._paths():
            try:
                return _read(path)
            except ValueError as e:
                logging.error("Skipped checkpoint %s: %s", path, e)
                self._damaged.add(path)
        return None

    @property
    def damaged(self) -> list[Path]:
        """The damaged files that `latest` has found, newest first."""
        return [path for path in self._paths() if path in self._damaged]

    def _paths(self) -> list[Path]:
        """Return the files of all checkpoints, newest first."""
        found = [path for path in self.directory.glob("update-*.npz") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_update(path), path.name), reverse=True)

    def _write(self, update: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        contents: dict[str, Any] = {**arrays, _METADATA: np.frombuffer(json.dumps(metadata).encode(), np.uint8)}
        temporary = self.directory / temporary_name("checkpoint.npz")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w+b") as file:
                np.savez(file, **contents)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            path = self.directory / f"update-{update:08d}-{digest}.npz"
            os.replace(temporary, path)
            sync(self.directory)
        except OSError as e:
            e.filename = e.filename or os.fspath(self.directory)  # writing to an open file names none
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            logging.error(
                "The checkpoint of update %d could not be written; the previous one is unchanged: %s", update, e
            )
            raise
        try:
            self._prune(path)
        except OSError as e:
            logging.error("Old checkpoints could not be removed: %s", e)

    def _prune(self, newest: Path) -> None:
        remove_abandoned(self.directory)
        for path in self._paths():
            again = _update(path) == _update(newest) and path != newest  # the state before a rollback
            if again or (_update(path) > _update(newest) and path in self._damaged):
                path.unlink(missing_ok=True)
        older = self._paths()[self._max_to_keep :]
        hours = self._keep_every_n_hours
        if hours is not None and older:
            # The others stay: they were kept before, and the copy of a folder has other times. So a `max_to_keep` that
            # is lowered later removes none of those.
            leaves, *kept = older
            apart = abs(leaves.stat().st_mtime - kept[0].stat().st_mtime) if kept else math.inf
            older = [] if apart >= hours * 3600 else [leaves]
        for path in older:
            path.unlink(missing_ok=True)


def _update(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: if the file is damaged or is not a checkpoint.
        OSError: if it cannot be read.
    """
    match = _NAME.fullmatch(path.name)
    assert match
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest()[:16] != match[2]:
            raise ValueError("it is damaged, because its content contradicts the checksum in its name")
        file.seek(0)
        try:
            with np.load(file) as archive:
                arrays = dict(archive)
            metadata = json.loads(arrays.pop(_METADATA).tobytes())
        except (MemoryError, Preempted):
            raise
        except Exception as e:  # the libraries raise many kinds for a foreign file
            raise ValueError(f"it is not a checkpoint: {e}") from e
    return Checkpoint(int(match[1]), arrays, metadata, path)


class SavePolicy:
    """Decides when to save: after a number of updates, a number of minutes, or whichever comes first.

    Args:
        updates: updates between two saves, or None.
        minutes: minutes between two saves, or None.
        clock: function that returns seconds.

    Raises:
        ValueError: if `updates` is not a whole number above 0, or `minutes` is negative or not finite.
    """

    def __init__(self, updates: int | None = None, minutes: float | None = None, clock: Any = time.monotonic):
        self._updates = None if updates is None else check_count("updates", updates, at_least=1)
        self._minutes = None if minutes is None else check_number("minutes", minutes)
        self._clock = clock
        self.reset(0)

    def reset(self, update: int) -> None:
        """Note that a save was made after `update` updates."""
        self._last_update, self._last_time = update, self._clock()

    def due(self, update: int) -> bool:
        """Return whether a save is due after `update` updates."""
        by_updates = self._updates is not None and update - self._last_update >= self._updates
        by_time = self._minutes is not None and self._clock() - self._last_time >= 60 * self._minutes
        return by_updates or by_time
