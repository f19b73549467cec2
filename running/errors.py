"""Turn errors of the library, which name its arguments, into lines that name the flags of `train.py`."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from flags.config import RunConfig
from lars_keras.runtime.errors import UsageError
from lars_keras.training.cluster import is_host_lost

# Arguments of the library whose flag has another name.
_FLAG_OF_ARGUMENT = {
    "end": "end_learning_rate",
    "epsilon": "adam_epsilon",  # of lamb; any --trust_epsilon that the flag takes is one that lars takes
    "keep_every_n_hours": "keep_checkpoint_hours",
    "trust_ratios": "telemetry_every",
    "max_to_keep": "keep_checkpoints",
    "out": "out",
    "input_shape": "image_size",
    "peak": "learning_rate",
    "synchronized": "sync_batch_norm",
}
_VALUES = {
    ("jit_compile", "=True"): "=on",
    ("jit_compile", "=False"): "=off",
    ("sync_batch_norm", "=True"): "",
    ("exclude", "=()"): "=",
}
_NO_QUOTES = str.maketrans("", "", "\"'")
_FLAG_OF_ARGUMENT |= {field.name: field.name for field in dataclasses.fields(RunConfig)}


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Raise `UsageError` for a refused argument or file: while a run is set up, the user must correct it."""
    try:
        yield
    except (ValueError, OSError) as e:
        if is_host_lost(e):  # while the hosts compare what they found
            raise
        raise UsageError(in_flags(str(e))) from e


def in_flags(message: str) -> str:
    """Return a message of the library with its arguments as flags.

    "`replicas` must be ... Received: replicas=3" becomes "--replicas must be ... Received: --replicas=3".
    """

    def flag(match: re.Match[str]) -> str:
        name, value = _FLAG_OF_ARGUMENT.get(match["name"]), match["value"].translate(_NO_QUOTES)
        return f"--{name}{_VALUES.get((name, value), value)}" if name else match[0]

    message = re.sub(r"`(?P<name>\w+)(?P<value>(=[^`\s]*)?)`", flag, message)
    text, received, values = message.rpartition("Received: ")
    return text + received + re.sub(r"(?<![-\w.=/])(?P<name>[a-z]\w*)(?P<value>=(True|False)?)", flag, values)
