"""Malformed flags, flagfiles, images, record files, checkpoints and models: a clear error, never a traceback."""

import hashlib
import io
import os
import pathlib
import tempfile
import unittest.mock
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flags
import models
import train
from lars_keras.data.image_files import ImageFileData
from lars_keras.data.records import TFRecords
from lars_keras.runtime import checkpoint
from lars_keras.runtime.checkpoint import CheckpointManager
from lars_keras.runtime.errors import UsageError
from running.model import load_model
from tests.data.images import jpeg

# The database of examples would make a run depend on the ones before it.
EXAMPLES = {"database": None, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NAMES = [field.name for field in flags.config.dataclasses.fields(flags.RunConfig)]
VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-1", "0", "1e400", "1.5", "none", "true", "(", "[", "\\", ",", "a,b", "8192"]),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
)


def damaged(data, draw):
    """Return text with some bytes cut off, flipped, put in or left out."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "replace"]))
    if not data or kind == "replace":
        return draw(st.binary(max_size=64))
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:place]
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    some = draw(st.binary(min_size=1, max_size=50))
    return data[:place] + (some + data[place:] if kind == "insert" else data[place + len(some) :])


class MemoryExamples:
    """A split in memory; all labels are 3."""

    def __init__(self, jpegs):
        self._jpegs = jpegs
        self.nbytes = sum(map(len, jpegs))

    def __len__(self):
        return len(self._jpegs)

    def example(self, i):
        return tf.constant(self._jpegs)[i], tf.constant(3, tf.int64)

    def where(self, i):
        return f"number {i}"


class MalformedTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def run_flags(self, arguments):
        """Run train.py up to its main path; returns the exit code and stderr."""
        out, err = io.StringIO(), io.StringIO()
        seen = []
        with (
            unittest.mock.patch.object(train, "main", seen.append),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = train.run(["train.py", *arguments])
        if code == 0:
            self.assertLen(seen, 0 if "usage" in out.getvalue().lower() or "--help" in str(arguments) else 1)
        else:
            self.assertEqual(code, 2)
            self.assertRegex(err.getvalue(), "^train.py: error: .")
        return code, err.getvalue()

    def test_flags(self):
        codes = []

        @settings(max_examples=150, **EXAMPLES)
        @given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3))
        def check(values):
            with unittest.mock.patch.object(os, "getcwd", lambda: str(self.dir)):
                code, err = self.run_flags([f"--{name}={value}" for name, value in values.items()])
            if code:  # it names a flag that was given
                self.assertTrue(any(name in err for name in values), (values, err))
            codes.append(code)

        check()
        self.assertGreater(codes.count(2), 50)

    def test_flagfiles(self):
        path = self.dir / "f.flags"

        @settings(max_examples=60, **EXAMPLES)
        @given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda t: ("--seed=1\n" + t).encode())))
        def check(content):
            path.write_bytes(content)
            self.run_flags([f"--flagfile={path}"])

        check()
        for arguments in ([f"--flagfile={self.dir}"], ["--flagfile="], [f"--run_dir={path}/x"], ["--flagfile"]):
            self.run_flags(arguments)

    def test_images(self):
        """Deliver each image whole with mask 1, or in the mean color with mask 0 and named."""
        jpegs = []

        @settings(max_examples=80, **EXAMPLES)
        @given(st.data())
        def collect(data):
            shape = data.draw(st.sampled_from([(40, 60, 3), (7, 9, 3), (1, 1, 3), (30, 30, 1)]))
            jpegs.append(damaged(jpeg(*shape), data.draw))

        collect()
        examples = MemoryExamples(jpegs)
        data = ImageFileData("m", examples, examples, 5, image_size=16)
        with self.assertLogs(level="ERROR"):
            batches = [*data.train_batches(20, count=len(jpegs) // 20), *data.test_batches(20)]
        mean = np.broadcast_to(np.round(data.mean), data.image_shape)
        masks = set()
        for images, labels, mask in batches:
            for image, label, one in zip(images.numpy(), labels.numpy(), mask.numpy(), strict=True):
                masks.add(float(one))
                self.assertEqual(label, 3 if one else 0)
                if not one and image.any():
                    self.assertAllEqual(image, mean)
        self.assertEqual(masks, {0.0, 1.0})
        unreadable = [i for i, jpeg in enumerate(jpegs) if not self.decodes(jpeg)]
        self.assertContainsSubset([f"number {i}" for i in unreadable], data.unreadable_images.found)
        self.assertGreater(len(unreadable), 10)
        self.assertGreater(len(data.unreadable_images.found), len(unreadable))

    def decodes(self, jpeg):
        """Whether there is anything of it; of an image that is cut off, a window may still be whole."""
        try:
            tf.image.extract_jpeg_shape(jpeg)
        except tf.errors.InvalidArgumentError:
            return False
        return True

    def test_record_files(self):
        path = self.dir / "a.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(4):
                writer.write(bytes([i]) * (20 + i))
        whole = path.read_bytes()
        told = []

        @settings(max_examples=60, **EXAMPLES)
        @given(st.data())
        def check(data):
            path.write_bytes(damaged(whole, data.draw))
            try:
                records = TFRecords([str(path)], [4])
            except ValueError as e:
                self.assertIn("a.tfrecord", str(e))
                told.append("file")
                return
            for i in range(4):
                try:
                    self.assertEqual(records.record(tf.constant(i)).numpy(), bytes([i]) * (20 + i))
                except (tf.errors.DataLossError, tf.errors.InvalidArgumentError):
                    told.append("record")

        check()
        self.assertEqual(set(told), {"file", "record"})

    def test_checkpoints(self):
        """Also files whose checksum is right and whose content is not a checkpoint."""
        folder = CheckpointManager(self.dir / "c")
        folder.save(1, {"a": np.arange(9)}, {"k": 1})
        folder.wait()
        whole = folder.latest().path.read_bytes()

        @settings(max_examples=60, **EXAMPLES)
        @given(st.data())
        def check(data):
            content = damaged(whole, data.draw)
            path = self.dir / "c" / f"update-00000002-{hashlib.sha256(content).hexdigest()[:16]}.npz"
            path.write_bytes(content)
            try:
                with unittest.mock.patch.object(checkpoint.logging, "error") as error:
                    found = folder.latest()
            finally:
                path.unlink()
            if found.update == 1:
                self.assertIn(path.name, str(error.call_args))
            else:  # what was damaged is of no use to anybody: the archive's own checksums hold
                self.assertAllEqual(found.arrays["a"], np.arange(9))

        check()
        self.assertEqual(folder.latest().update, 1)

    def test_models(self):
        model = models.get("lenet1989", num_classes=3, input_shape=(16, 16, 1), seed=0)
        path = self.dir / "model.keras"
        model.save(path)
        whole = path.read_bytes()
        refused = []

        @settings(max_examples=25, **EXAMPLES)
        @given(st.data())
        def check(data):
            path.write_bytes(damaged(whole, data.draw))
            try:
                load_model(self.dir, flags.RunConfig(), None)
            except UsageError as e:
                refused.append(str(e))
                self.assertIn("model.keras cannot be loaded: ", str(e))

        check()
        self.assertGreater(len(refused), 5)


if __name__ == "__main__":
    tf.test.main()
