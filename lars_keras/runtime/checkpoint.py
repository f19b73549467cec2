"""Checkpoints on disk: whole or absent, verified when they are read, written while training goes on.

A checkpoint is one NumPy `.npz` file, `update-00000042-<first 16 digits of its SHA-256>.npz`. It gets that name only
when all of it is on the disk, so a kill leaves either the file or nothing, and a bit that flips later no longer fits
the name.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lars_keras.runtime.errors import Preempted

_NAME = re.compile(r"update-(\d+)-([0-9a-f]{16})\.npz")
_INFO = "info"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run after some update.

    Attributes:
        update: how many updates had been finished.
        arrays: name to array.
        info: whatever else was saved with it, as JSON can hold it.
        path: its file.
    """

    update: int
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]
    path: Path


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: created with the first checkpoint.
        keep: how many of the newest to keep.
        keep_hours: of the older ones, keep one for every so many hours; None for none of them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3, keep_hours: float | None = None):
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1. Received: keep={keep}")
        self._folder, self._keep, self._keep_hours = Path(folder), keep, keep_hours
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, update: int, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint, when the one before is written; `arrays` must not change any more."""
        with contextlib.suppress(OSError):  # logged by the thread
            self.wait()
        self._writing = self._writer.submit(self._write, update, dict(arrays), dict(info))

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            OSError: if the last checkpoint could not be written. Those before it are still there.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is undamaged, or None. Each damaged one is named in the log.

        Raises:
            OSError: if one cannot be read. It may be whole, and a run that began without it would throw it away.
        """
        with contextlib.suppress(OSError):
            self.wait()
        for path in self._paths():
            try:
                return _read(path)
            except ValueError as e:
                logging.error("checkpoint %s is left out: %s", path, e)
        return None

    def _paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        found = [path for path in self._folder.glob("update-*.npz") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_update(path), path.stat().st_mtime), reverse=True)

    def _write(self, update: int, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        contents: dict[str, Any] = {**arrays, _INFO: np.frombuffer(json.dumps(info).encode(), np.uint8)}
        temporary = self._folder / f".writing-{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w+b") as file:
                np.savez(file, **contents)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            os.replace(temporary, self._folder / f"update-{update:08d}-{digest}.npz")
            directory = os.open(self._folder, os.O_RDONLY)  # the new name must be on the disk, too
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            self._prune(update)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            logging.error("the checkpoint of update %d could not be written, the one before stands: %s", update, e)
            raise

    def _prune(self, newest: int) -> None:
        for leftover in self._folder.glob(".writing-*"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        for path in self._paths():
            if _update(path) > newest:  # damaged, or the run would have gone on from there
                path.unlink()
        kept_at: float | None = None
        for path in reversed(self._paths()[self._keep :]):  # the oldest first
            written = path.stat().st_mtime
            due = kept_at is None or written - kept_at >= (self._keep_hours or 0) * 3600
            if self._keep_hours is not None and due:
                kept_at = written
            else:
                path.unlink()


def _update(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _read(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Raises:
        ValueError: if the file is damaged, or none of ours.
        OSError: if it cannot be read.
    """
    match = _NAME.fullmatch(path.name)
    assert match
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest()[:16] != match[2]:
            raise ValueError("it is damaged, its content does not fit the checksum in its name")
        file.seek(0)
        try:
            with np.load(file) as archive:
                arrays = dict(archive)
            info = json.loads(arrays.pop(_INFO).tobytes())
        except (MemoryError, Preempted):
            raise
        except Exception as e:  # whatever the libraries make of a file that is none of ours
            raise ValueError(f"it is no checkpoint: {e}") from e
    return Checkpoint(int(match[1]), arrays, info, path)


class SavePolicy:
    """Says when something is due: every so many updates, every so many minutes, or both.

    Args:
        updates, minutes: None for never.
        clock: returns seconds.
    """

    def __init__(self, updates: int | None = None, minutes: float | None = None, clock: Any = time.monotonic):
        self._updates, self._minutes, self._clock = updates, minutes, clock
        self.reset(0)

    def reset(self, update: int) -> None:
        """It was done after `update` updates."""
        self._last_update, self._last_time = update, self._clock()

    def due(self, update: int) -> bool:
        """Whether it should be done now."""
        by_updates = self._updates is not None and update - self._last_update >= self._updates
        by_time = self._minutes is not None and self._clock() - self._last_time >= 60 * self._minutes
        return by_updates or by_time
