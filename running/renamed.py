"""Names that flags and checkpoints had in earlier versions, so that older run folders can be resumed.

They are for run folders only. On the command line an earlier name is refused, and the message gives the new one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

FLAGS = {
    "warmup_epochs": "warmup",
    "validation_share": "validation_split",
    "ema": "ema_momentum",
    "epsilon": "trust_epsilon",
    "updates_per_call": "steps_per_execution",
    "shard_update": "shard_optimizer_state",
    "max_bad_images": "max_unreadable_images",
}
VALUES = {("strategy", "one"): "single"}
POSITION = {"data_update": "batches_consumed"}
METRICS = {"left_out": "masked_examples"}


def flag_lines(lines: Iterable[str]) -> list[str]:
    """Return the lines of a `flags.txt`, each `--name=value`, with today's names."""
    renamed = []
    for line in filter(None, map(str.strip, lines)):
        name, equals, value = line.removeprefix("--").partition("=")
        name = FLAGS.get(name, name)
        renamed.append(f"--{name}{equals}{VALUES.get((name, value), value)}" if equals else line)
    return renamed


def checkpoint_metadata(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a checkpoint, with today's names."""
    flags = _renamed(info["flags"], FLAGS)
    flags |= {name: new for (name, old), new in VALUES.items() if flags.get(name) == old}
    position = _renamed(info["position"], POSITION)
    position["logs"] = _renamed(position["logs"], METRICS)
    position.setdefault("rollbacks", info.get("rollbacks", []))
    return {**info, "flags": flags, "position": position}


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
