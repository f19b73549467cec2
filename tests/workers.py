"""Several processes on loopback under `MultiWorkerMirroredStrategy`; as a program, one of them."""

import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def start(count, command, **more):
    """Start `command` as `count` workers of one cluster, with `more` in their environment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    processes = []
    for index in range(count):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), "TF_CPP_MIN_LOG_LEVEL": "2", **more}
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return processes


def wait(processes, seconds=300):
    """Return what each process printed; none outlives the call."""
    try:
        return [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.communicate()


def main(out, table):
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before the first operation

    from tests import step_cases as cases

    rows = []
    for row in getattr(cases, table):
        trainer, history = cases.trained_row(strategy, 2, *row)
        rows.append((cases.state(trainer), history))
    with open(f"{out}/{strategy.cluster_resolver.task_id}.pickle", "wb") as f:
        pickle.dump(rows, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
