"""The images of a run that could not be read."""

import threading
from collections.abc import Callable
from typing import Any

from absl import logging


class BadImages:
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
