"""Batches that a thread makes one ahead, and gives to the devices one ahead, from memory that is used again.

`test_on_jax.py` runs this file on JAX.
"""

import contextlib
import gc
import itertools
import multiprocessing
import subprocess
import sys
import threading
import time
import unittest
import weakref
from unittest import mock

import keras
import numpy as np
import pytest

from lars_keras.training import Trainer, inputs

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    from lars_keras.training.jax.engine import JaxEngine
    from lars_keras.training.jax.prefetch import Prefetcher
    from lars_keras.training.jax.staging import Staging


@unittest.skipUnless(ON_JAX, "run by test_on_jax.py")
class ThreadTest(unittest.TestCase):
    @pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
    def test_a_batch_may_fork(self):
        """Fork in its thread, as a torch loader with workers does; the fork must end without an error."""

        def batch():
            process = multiprocessing.get_context("fork").Process(target=int)
            process.start()
            process.join()
            return process.exitcode

        prefetcher = Prefetcher(batch, lambda exitcode: exitcode, 2)
        self.assertEqual([prefetcher(()), prefetcher(())], [0, 0])

    def test_an_exit_waits_for_a_batch_in_the_making_and_not_for_data_that_hang(self):
        """Run in a process of its own: a fork of `multiprocessing` leaves out what is registered for the exit."""
        program = """
import sys, threading, time
from lars_keras.training.jax.prefetch import Prefetcher
asked, hangs = threading.Event(), sys.argv[1] == "hangs"
def batch():
    asked.set()
    if hangs:
        threading.Event().wait()
    time.sleep(1)
    print("made", flush=True)
prefetcher = Prefetcher(batch, lambda made: made, 2)
asked.wait()
"""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        expected = {"hangs": "", "takes a second": "made\n"}
        processes = [subprocess.Popen([sys.executable, "-c", program, how], **pipes) for how in expected]
        for process, printed in zip(processes, expected.values(), strict=True):
            self.addCleanup(process.kill)
            out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out), (0, printed), err)

    def test_the_thread_ends_with_its_prefetcher(self):
        threads = []
        prefetcher = Prefetcher(lambda: threads.append(threading.current_thread()), lambda made: made, 3)
        prefetcher(())
        del prefetcher  # with batches left to make
        threads[0].join(timeout=30)
        self.assertFalse(threads[0].is_alive())

    def test_devices_hold_two_batches(self):
        """A host that is faster than the devices gives them a batch when the program before the last one is done."""
        log = []

        class Program:
            """Stands for the arrays that a program gives."""

            def __init__(self, number):
                self.number = number

            def block_until_ready(self):
                log.append(f"program {self.number} is done")

        numbers, threads = itertools.count(), set()

        def made():
            threads.add(threading.current_thread())
            return next(numbers)

        prefetcher = Prefetcher(made, lambda number: log.append(f"batch {number}") or number, 5)
        for number in range(4):
            prefetcher._next.on_devices.exception()  # waits until the batch is there
            self.assertEqual(prefetcher(Program(number - 1) if number else ()), number)
        self.assertEqual(prefetcher(()), 4)
        [thread] = threads  # to start one takes as long as a small update
        thread.join(timeout=30)
        self.assertFalse(thread.is_alive())
        self.assertIsNone(prefetcher._next)  # nothing is made that nobody will take
        self.assertEqual(
            log,
            ["batch 0", "batch 1"] + [text for i in range(3) for text in (f"program {i} is done", f"batch {i + 2}")],
        )


@unittest.skipUnless(ON_JAX, "run by test_on_jax.py")
class StagingTest(unittest.TestCase):
    """A GPU and a TPU read batches from memory of the host that is used again."""

    def test_copies(self):
        """Hold three copies, whatever comes in between, apart from the user's memory."""
        rng, staging, log = np.random.default_rng(0), Staging(again=True), []
        memory = rng.integers(0, 256, 4000, "uint8")
        held = []
        for i, (size, dtype) in enumerate(((96, "uint8"), (1000, "float32"), (5, "int64"), (0, "int8"), (900, "bool"))):
            x = memory[: size * np.dtype(dtype).itemsize].view(dtype)
            given = ({"x": x, "nothing": None}, x[::2].reshape(-1, 1, order="F"))
            copy = staging.copied(given)
            held.append((copy, ({"x": x.copy()}, given[1].copy())))
            self.assertIsNone(copy[0]["nothing"])
            for array in (copy[0]["x"], copy[1]):
                self.assertFalse(np.shares_memory(array, memory))
                self.assertEqual(array.ctypes.data % 64 if array.size else 0, 0)
            memory[:] = rng.integers(0, 2, 4000, "uint8")
            for (parts, y), (expected, target) in held[-3:]:
                np.testing.assert_array_equal(parts["x"], expected["x"])
                np.testing.assert_array_equal(y, target)

            class Arrays:
                """Stands for arrays on the devices."""

                def is_ready(self):
                    return False

                def block_until_ready(self, i=i):
                    log.append(i)

            self.assertIsInstance(staging.send(lambda parts: Arrays(), copy), Arrays)
            staging.send(lambda parts: Arrays(), copy)  # a second part of the same batch
            self.assertEqual(log, [number for number in range(i - 2) for _ in range(2)])

    def test_memory_is_used_again(self):
        staging = Staging(again=True)
        places = [staging.copied((np.zeros(n),))[0].ctypes.data for n in (9, 9, 9, 9, 8, 9, 9)]
        self.assertEqual(places[3:], places[:4])
        self.assertEqual(len(set(places)), 3)

    def test_what_is_kept(self):
        """Let go what the devices have, or they would hold batches that are used; keep nothing on a CPU."""

        class Arrays:
            """Stands for arrays on the devices."""

            ready = False

            def is_ready(self):
                return self.ready

        for again, ready, kept in ((True, False, True), (True, True, False), (False, False, False)):
            staging, batch = Staging(again), (np.arange(3),)
            staging.copied(batch)
            arrays = staging.send(lambda batch: Arrays(), batch)
            found, arrays.ready = weakref.ref(arrays), ready
            staging.send(lambda batch: Arrays(), batch)
            del arrays
            gc.collect()
            self.assertEqual(found() is not None, kept, (again, ready))
        first, second = (Staging(again=False).copied(batch)[0] for _ in range(2))
        self.assertFalse(np.shares_memory(first, second))

    def test_training_as_without(self):
        """Train with devices that copy what they are given, and read it late."""
        found, put = [], JaxEngine.on_devices

        def on_devices(engine, arrays):
            time.sleep(0.005)
            return put(engine, inputs.copied(arrays))

        for again in (False, True):
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
            model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=["mae"])

            def batches():
                memory = np.zeros((7, 5), "float32")
                for i in range(12):
                    memory[:] = np.sin(np.arange(35.0) + 35 * i).reshape(7, 5)
                    yield memory[:, :3], memory[:, 3:]

            trainer = Trainer(model, batch_size=8, microbatch_size=4)
            with contextlib.ExitStack() as patched:
                if again:
                    patched.enter_context(mock.patch.object(JaxEngine, "_staging", lambda *_: Staging(again=True)))
                    patched.enter_context(mock.patch.object(JaxEngine, "on_devices", on_devices))
                data = Again(batches)
                history = trainer.fit(
                    data, epochs=2, steps_per_epoch=10, validation_data=Again(batches), verbose=0
                ).history
                found.append((history, model.get_weights()[0].tolist(), trainer.evaluate(Again(batches))))
        self.assertEqual(found[0], found[1])


class Again:
    """Reads the batches of a generator function again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return self.batches()


if __name__ == "__main__":
    unittest.main()
