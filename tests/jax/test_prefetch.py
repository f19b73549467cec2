"""Batches that a thread makes one ahead, and gives to the devices one ahead.

`test_on_jax.py` runs this file on JAX.
"""

import itertools
import multiprocessing
import threading
import unittest

import keras
import pytest

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    from lars_keras.training.jax.prefetch import Prefetcher


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

    @pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
    def test_an_exit_does_not_wait_for_data_that_hang(self):
        never = threading.Event()
        arguments = (never.wait, lambda made: made, 1)
        process = multiprocessing.get_context("fork").Process(target=Prefetcher, args=arguments)
        process.start()
        self.addCleanup(process.kill)
        process.join(timeout=30)
        self.assertEqual(process.exitcode, 0)

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

    def test_a_batch_may_use_the_memory_of_the_one_before(self):
        """It is made when the devices have that one, and no update waits for that."""
        log, has_arrived = [], threading.Event()

        class OnItsWay:
            """Stands for a batch that the devices do not have yet."""

            def block_until_ready(self):
                has_arrived.wait(30)
                log.append("arrived")

        def made():
            log.append("made")

        prefetcher = Prefetcher(made, lambda made: OnItsWay(), 2)
        first = prefetcher(())  # asks for the next one
        self.assertIsInstance(first, OnItsWay)
        self.assertEqual(log, ["made"])
        has_arrived.set()
        prefetcher(())
        self.assertEqual(log[:3], ["made", "arrived", "made"])


if __name__ == "__main__":
    unittest.main()
