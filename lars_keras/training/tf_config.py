"""Read TF_CONFIG, the environment variable that names the other processes of a run on both backends."""

import json
import os


def workers() -> list[str]:
    """Return the addresses of the chief and the workers; empty if TF_CONFIG is not set.

    Raises:
        ValueError: if TF_CONFIG is not the JSON of a cluster.
    """
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return [*cluster.get("chief", []), *cluster.get("worker", [])]
    except (ValueError, AttributeError, TypeError) as e:
        raise ValueError(f"TF_CONFIG is not the JSON of a cluster ({e}). Received: {os.environ['TF_CONFIG']!r}") from e


def index() -> int:
    """Return the place of this process in `workers()`."""
    config = json.loads(os.environ["TF_CONFIG"])
    task = config.get("task", {})
    chiefs = len(config["cluster"].get("chief", []))
    return int(task.get("index", 0)) + (chiefs if task.get("type") == "worker" else 0)


def unset_message(alternative: str = "") -> str:
    """Return the message for a multi-worker run without TF_CONFIG."""
    return (
        '`strategy="multi_worker"` needs the environment variable TF_CONFIG with the addresses of the workers, and the '
        f"type and index of this task{alternative}."
    )
