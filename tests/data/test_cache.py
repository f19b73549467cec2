"""Caches of encoded images."""

import dataclasses
import errno
import io
import os
import pathlib
import shutil
import tempfile
import time
import unittest.mock

import numpy as np
import tensorflow as tf
from etils import epath

import lars_keras.data
from lars_keras.data import cache as cache_module
from lars_keras.data.cache import InMemory, copy_to_local
from lars_keras.data.folder import FolderExamples
from lars_keras.data.image_files import ImageFileData
from tests import prepared


class CacheTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.root = self.enterContext(tempfile.TemporaryDirectory())
        self.copies = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "copies")
        shutil.copytree(prepared.imagenet(), self.root, dirs_exist_ok=True)

    def load(self, cache, **options):
        options = {"cache_dir": self.copies} if cache == "disk" else options
        return lars_keras.data.load("imagenet2012", data_dir=self.root, image_size=24, cache=cache, **options)

    def batches(self, data):
        return [*data.train_batches(29, count=2).as_numpy_iterator(), *data.test_batches(11).as_numpy_iterator()]

    def check(self, data, expected):
        for a, b in zip(tf.nest.flatten(self.batches(data)), tf.nest.flatten(expected), strict=True):
            self.assertAllEqual(a, b)

    def test_images_are_the_same_and_files_are_read_once(self):
        expected = self.batches(self.load("none"))
        cached = [self.load("memory"), self.load("disk")]
        copies = {path: path.stat().st_mtime_ns for path in pathlib.Path(self.copies).rglob("*.tfrecord*")}
        self.assertLen(copies, 2)
        for path in pathlib.Path(self.root).rglob("*.tfrecord*"):
            found = path.stat()
            path.write_bytes(bytes(found.st_size))  # from here on nothing good can come from there
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        cached.append(self.load("disk"))
        self.assertEqual(copies, {path: path.stat().st_mtime_ns for path in copies})
        for data in cached:
            self.check(data, expected)

    def test_a_torn_copy_is_made_again(self):
        self.load("disk")
        copy = next(pathlib.Path(self.copies).rglob("*train.tfrecord*"))
        whole = copy.read_bytes()
        copy.write_bytes(whole[:100])
        self.load("disk")
        self.assertEqual(copy.read_bytes(), whole)

    def test_two_processes_of_one_number_copy_one_file(self):
        """Processes in two containers can have one number. The second copies while the first is in the middle."""
        source, copies = pathlib.Path(self.root, "a"), pathlib.Path(self.copies)
        source.write_bytes(b"content")
        whole = []

        def blocks(path):
            yield b"con"
            with unittest.mock.patch.object(cache_module, "_blocks", lambda path: iter([b"content"])):
                whole.extend(copy_to_local([str(source)], self.root, copies))
            yield b"tent"

        with unittest.mock.patch.object(cache_module, "_blocks", blocks):
            self.assertEqual(copy_to_local([str(source)], self.root, copies), whole)
        self.assertEqual((copies / "a").read_bytes(), b"content")
        self.assertCountEqual(copies.iterdir(), [copies / "a"])

    def test_what_killed_copies_left_is_removed(self):
        source, copies = pathlib.Path(self.root, "a"), pathlib.Path(self.copies)
        source.write_bytes(b"content")
        copies.mkdir()
        part = copies / "b.123.part"
        part.write_bytes(b"con")
        os.utime(part, (1e9, 1e9))  # about to be renamed: it has the time of its source
        copy_to_local([str(source)], self.root, copies)
        self.assertTrue(part.exists())
        source.write_bytes(b"other content")
        later = time.time() + 3600
        with unittest.mock.patch.object(time, "time", lambda: later):
            copy_to_local([str(source)], self.root, copies)
        self.assertCountEqual(copies.iterdir(), [copies / "a"])

    def test_a_file_that_changed_is_copied_again(self):
        source = pathlib.Path(self.root, "a")
        source.write_bytes(b"old")
        for content, changed in ((b"old", 1e9), (b"new", 1e9 + 60), (b"was", 1e9 - 60)):
            source.write_bytes(content)
            os.utime(source, (changed, changed))
            (copy,) = copy_to_local([str(source)], self.root, pathlib.Path(self.copies))
            self.assertEqual(pathlib.Path(copy).read_bytes(), content)

    def test_a_file_system_that_tells_no_time(self):
        source, copies = pathlib.Path(self.root, "a"), pathlib.Path(self.copies)
        source.write_bytes(b"one")
        copy_to_local([str(source)], self.root, copies)
        path = type(epath.Path(source))
        stat = path.stat
        source.write_bytes(b"two")
        with unittest.mock.patch.object(path, "stat", lambda path: dataclasses.replace(stat(path), mtime=0)):
            copy_to_local([str(source)], self.root, copies)
            self.assertEqual((copies / "a").read_bytes(), b"one")
            source.write_bytes(b"three")
            copy_to_local([str(source)], self.root, copies)
            self.assertEqual((copies / "a").read_bytes(), b"three")

    def test_a_failed_copy_leaves_nothing_and_names_its_file(self):
        (pathlib.Path(self.root) / "a").write_bytes(b"content")
        copies = pathlib.Path(self.copies)

        class Full(io.BytesIO):
            def write(self, block):
                raise OSError(errno.ENOSPC, "No space left on device")

        def open_full(path, mode):
            pathlib.Path(path).touch()
            return Full()

        class Broken(io.BytesIO):
            def read(self, size=-1):
                raise OSError(errno.EIO, "Input/output error")

        path = type(epath.Path(self.root))
        for patch, message in (
            (
                unittest.mock.patch.object(lars_keras.data.cache, "open", open_full, create=True),
                r"`cache_dir` cannot be written: .*No space left on device: '.*copies/a'. Received: cache_dir=.*copies",
            ),
            (
                unittest.mock.patch.object(path, "open", lambda *_: Broken()),
                f"^{self.root}/a cannot be read: .*Input/output error$",
            ),
        ):
            with patch, self.assertRaisesRegex(ValueError, message):
                copy_to_local([f"{self.root}/a"], self.root, copies)
            self.assertEmpty(list(copies.iterdir()))

    def test_damaged_records_are_left_out(self):
        path = pathlib.Path(self.root, "imagenet2012", "5.1.0", "imagenet2012-train.tfrecord-00000-of-00001")
        damaged = bytearray(path.read_bytes())
        damaged[-20] ^= 255
        path.write_bytes(damaged)
        for cache in "memory", "disk":
            data = self.load(cache)
            _, _, mask = next(data.train_batches(29).as_numpy_iterator())
            self.assertEqual(mask.sum(), 28)
            (found,) = data.unreadable_images.found
            self.assertStartsWith(found, "record 28 of ")

    def test_memory_keeps_the_reason_of_the_read(self):
        examples = FolderExamples([os.path.join(self.root, "gone.jpg")], np.zeros(1))
        examples.nbytes = 0
        data = ImageFileData("x", InMemory(examples), InMemory(examples), 1, image_size=24)
        pathlib.Path(self.root, "gone.jpg").touch()  # too late: the files are read once
        with self.assertLogs(level="ERROR"):
            _, _, mask = next(data.test_batches(1).as_numpy_iterator())
        self.assertAllEqual(mask, [0])
        self.assertEqual(
            data.unreadable_images.found, {examples.where(0): f"{examples.where(0)}; No such file or directory"}
        )

    def test_where_there_is_no_room(self):
        with unittest.mock.patch.object(lars_keras.data.cache, "free_memory", lambda: 1000):
            with self.assertRaisesRegex(
                ValueError, r"needs 0.\d MB of memory, and 0.0 MB are free.*Received: cache=memory"
            ):
                self.load("memory")
        with unittest.mock.patch("shutil.disk_usage", lambda path: unittest.mock.Mock(free=1000)):
            with self.assertRaisesRegex(
                ValueError, r"need 0.\d MB in `cache_dir`, and 0.0 MB are free.*cache_dir=.*copies"
            ):
                self.load("disk")
        shutil.rmtree(self.copies)
        pathlib.Path(self.copies).write_text("a file, not a folder")
        with self.assertRaisesRegex(ValueError, "`cache_dir` cannot be written.*Received: cache_dir=.*copies"):
            self.load("disk")

    def test_what_has_no_cache(self):
        with self.assertRaisesRegex(ValueError, "digits is in memory anyway.*cache=memory"):
            lars_keras.data.load("digits", data_dir=self.root, cache="memory")
        with self.assertRaisesRegex(ValueError, "not the other hosts of a pod slice.*cache=memory, remote=True"):
            self.load("memory", remote=True)


if __name__ == "__main__":
    tf.test.main()
