"""Signals while a run has child processes."""

import os
import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).parents[2]
CHILDREN = """
import contextlib, multiprocessing, os, signal, time
from lars_keras.runtime.preemption import StopOnSignal

fork = multiprocessing.get_context("fork")

def mine(number, frame):
    os._exit(77)

signal.signal(signal.SIGUSR1, mine)
with StopOnSignal() as outer, StopOnSignal() as stop:
    for _ in range(5):
        with fork.Pool(2) as pool:  # its end sends SIGTERM to its processes
            assert pool.map(abs, [-1, -2]) == [1, 2]
    ends = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        os.kill(child.pid, number)
        child.join(20)
        ends.append(child.exitcode)
    if not (left := os.fork()):  # a child that leaves the block by itself
        stop.__exit__()
        os._exit(5)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(left, 0)[1]))
    print(ends, stop.vote(1, {}), outer.vote(1, {}), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print(stop.vote(1, {}), flush=True)
    lives = fork.Process(target=time.sleep, args=(60,))
    lives.start()
print(lives.is_alive(), flush=True)  # leaving the block does not wait for it
lives.terminate()
"""


class ForkTest(unittest.TestCase):
    def test_the_signals_of_forked_processes_are_their_own(self):
        """A data pipeline may fork and end processes within the block. The run must not take their signals for its."""
        done = subprocess.run(
            [sys.executable, "-c", CHILDREN],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": "numpy"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(done.stdout.splitlines(), ["[-15, 77, 5] False False", "True", "True"], done.stderr[-2000:])


if __name__ == "__main__":
    unittest.main()
