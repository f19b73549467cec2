"""Cores and memory that a process may use, in a container and out of one."""

import os
import pathlib
import tempfile
import unittest.mock

import psutil
import tensorflow as tf

from lars_keras.data import limits


class LimitsTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.group = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(unittest.mock.patch.object(limits, "_CGROUP", self.group))
        self.enterContext(unittest.mock.patch.object(os, "sched_getaffinity", lambda _: set(range(96))))
        memory = unittest.mock.Mock(available=500_000)
        self.enterContext(unittest.mock.patch.object(psutil, "virtual_memory", lambda: memory))

    def write(self, **files):
        for name, text in files.items():
            (self.group / name.replace("_", ".")).write_text(text)

    def test_without_a_container(self):
        self.assertEqual((limits.cores(), limits.free_memory()), (96, 500_000))

    def test_without_limits(self):
        self.write(cpu_max="max 100000\n", memory_max="max\n", memory_current="20\n", memory_stat="anon 1\n")
        self.assertEqual((limits.cores(), limits.free_memory()), (96, 500_000))

    def test_limits_of_a_container(self):
        self.write(cpu_max="750000 100000\n", memory_max="64000\n", memory_current="60000\n")
        self.write(memory_stat="anon 50000\ninactive_file 9000\nactive_file 1000\n")
        self.assertEqual((limits.cores(), limits.free_memory()), (8, 13_000))
        self.write(memory_max="1000\n", memory_stat="", cpu_max="5000 100000\n")
        self.assertEqual((limits.cores(), limits.free_memory()), (1, 0))


if __name__ == "__main__":
    tf.test.main()
