"""The unreadable images of a run."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from lars_keras.files import atomic_write_text

# TensorFlow writes where an operation is before its message, and the operations that called it after it.
_OPERATION_BEFORE = re.compile(r"^(\{\{[^}]*\}\}\s*)+")
_OPERATIONS_AFTER = re.compile(r"(\n\t \[\[| \[Op:).*", re.DOTALL)


def reason_of(error: Exception) -> str:
    """Return what went wrong, in a line: the message of the innermost operation if the error is of TensorFlow."""
    lines = _OPERATIONS_AFTER.sub("", str(error)).strip().splitlines()
    return _OPERATION_BEFORE.sub("", lines[-1]).strip() if lines else type(error).__name__


class UnreadableImages:
    """Records every unreadable image once, and logs it.

    Attributes:
        found: maps the location of each unreadable image to the reason.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._lock = threading.Lock()  # several threads decode

    def add(self, where: str, load: Callable[[], Any]) -> None:
        """Record the image at `where`. Call `load` once more to learn the reason from its exception."""
        with self._lock:
            if where in self.found:
                return
            reason = "it could be read at the second try"
            try:
                load()
            except Exception as e:  # whatever a library makes of a damaged file
                reason = reason_of(e)
            self.found[where] = reason
            logging.error("left out an unreadable image, %s: %s", where, reason)

    def load(self, path: Path) -> None:
        """Add the images of a file that `save` wrote, if it exists."""
        if path.exists():
            self.found.update(json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write `found` as JSON."""
        with self._lock:
            text = json.dumps(self.found, indent=2) + "\n"
        atomic_write_text(path, text)
