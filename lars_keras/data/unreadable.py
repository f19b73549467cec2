"""The images of a run that could not be read."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from lars_keras.files import atomic_write_text


class UnreadableImages:
    """Notes each image that could not be read once, and says so in the log.

    Attributes:
        found: a line for each: which image, and what is wrong with it.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._lock = threading.Lock()  # several images are decoded at once

    def note(self, where: str, load: Callable[[], Any]) -> None:
        """Notes the image at `where`; `load`, which fails, tells why."""
        with self._lock:
            if where in self.found:
                return
            reason = "it could be read at the second try"
            try:
                load()
            except Exception as e:  # whatever a library makes of a damaged file
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            self.found[where] = reason
            logging.error("left out an image that cannot be read, %s: %s", where, reason)

    def load(self, path: Path) -> None:
        """Adds what `save` wrote, if there is such a file."""
        if path.exists():
            self.found.update(json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Writes `found` as JSON."""
        with self._lock:
            text = json.dumps(self.found, indent=2) + "\n"
        atomic_write_text(path, text)
