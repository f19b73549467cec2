"""Batches made on another host, as for a TPU pod: a program of two processes on loopback.

    python -m tests.remote_input FOLDER_WITH_IMAGENET

Prints `equal` where another TensorFlow server makes the batches that this process makes itself.
"""

import socket
import subprocess
import sys

import numpy as np

SERVER = """
import sys, tensorflow as tf
cluster = tf.train.ClusterSpec({"worker": [sys.argv[1]]})
tf.distribute.Server(cluster, job_name="worker", task_index=0, protocol="grpc").join()
"""


def main(root):
    with socket.create_server(("127.0.0.1", 0)) as s:
        address = f"127.0.0.1:{s.getsockname()[1]}"
    server = subprocess.Popen([sys.executable, "-c", SERVER, address], stderr=subprocess.DEVNULL)
    try:
        import tensorflow as tf

        from lars_keras.data import load
        from tests.data.streams import small_arrays

        tf.config.experimental_connect_to_host(address)
        data = load("imagenet2012", data_dir=root, image_size=24, remote=True)
        arrays = small_arrays()
        for batches in (
            lambda: data.train_batches(6, first=1, count=3, shard=(1, 2)),
            lambda: data.test_batches(4),
            lambda: arrays.train_batches(64, count=2),
        ):
            here = list(batches())
            with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
                there = list(batches())
            assert all("/job:worker" in t.device for batch in there for t in batch), "made here"
            for a, b in zip(here, there, strict=True):
                for x, y in zip(a, b, strict=True):
                    np.testing.assert_array_equal(x.numpy(), y.numpy())
        print("equal")
    finally:
        server.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
