"""Unreadable images and damaged records: they have mask 0 and are named once, and nothing else changes."""

import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import lars_keras.data
import train
from lars_keras.data.unreadable import reason_of
from lars_keras.runtime.errors import TooManyUnreadableImages
from lars_keras.runtime.unreadable_images import UnreadableImageLimit
from tests import prepared
from tests.data.streams import train_ids

ROOT = pathlib.Path(__file__).parents[2]


class UnreadableImagesTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.good = cls.batches(lars_keras.data.load("imagenet2012", data_dir=prepared.imagenet(), image_size=24))

    def setUp(self):
        super().setUp()
        self.root = self.enterContext(tempfile.TemporaryDirectory())
        shutil.copytree(prepared.imagenet(), self.root, dirs_exist_ok=True)
        self.path = pathlib.Path(self.root, "imagenet2012", "5.1.0", "imagenet2012-train.tfrecord-00000-of-00001")

    def load(self, **options):
        return lars_keras.data.load("imagenet2012", data_dir=self.root, image_size=24, **options)

    @staticmethod
    def batches(data):
        """Return two epochs of training, in batches that do not divide them, then the test images."""
        train = data.train_batches(8, count=-(-2 * 29 // 8))
        return [tuple(x.numpy() for x in batch) for batch in [*train, *data.test_batches(4)]]

    def rewrite(self, changes):
        """Replace the JPEGs of the training records in `changes`. The checksums stay right."""
        records = list(tf.data.TFRecordDataset([str(self.path)]).as_numpy_iterator())
        with tf.io.TFRecordWriter(str(self.path)) as writer:
            for i, record in enumerate(records):
                example = tf.train.Example.FromString(record)
                if i in changes:
                    image = example.features.feature["image"].bytes_list
                    image.value[0] = changes[i](image.value[0])
                writer.write(example.SerializeToString())

    def check(self, bad, **options):
        """Check that nothing changed except the training images `bad`. Return the unreadable images found."""
        data = self.load(**options)
        ids = train_ids(data, 8, count=len(self.good) - 3)
        for number, (before, after) in enumerate(zip(self.good, self.batches(data), strict=True)):
            gone = np.isin(ids[number], list(bad)) if number < len(ids) else np.zeros(4, bool)
            for a, b in zip(before, after, strict=True):
                self.assertAllEqual(a[~gone], b[~gone])
            images, labels, mask = (part[gone] for part in after)
            self.assertAllEqual(mask, np.zeros(gone.sum()))
            self.assertAllEqual(labels, np.zeros(gone.sum()))
            self.assertAllEqual(images, np.broadcast_to(np.round(data.mean), images.shape))
        return data.unreadable_images.found

    def test_damaged_images_are_named_once(self):
        png = tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy()
        damage = {
            3: lambda jpeg: jpeg[: len(jpeg) // 2],
            4: lambda jpeg: b"",
            12: lambda jpeg: b"no image",
            20: lambda jpeg: png[:40],
            28: lambda jpeg: jpeg[:2] + bytes(len(jpeg) - 2),
        }
        self.rewrite(damage)
        with self.assertLogs(level="ERROR") as logs:
            found = self.check(damage)
        self.assertCountEqual(found, [f"record {i} of {self.path}" for i in damage])
        self.assertLen(logs.output, len(damage))
        self.assertIn(f"record 3 of {self.path}: jpeg::Uncompress failed", "".join(logs.output))
        reasons = {
            3: "jpeg::Uncompress failed",
            4: "Input is empty",
            12: "Unknown image file format",
            20: "Invalid PNG",
        }
        for i, reason in reasons.items():
            self.assertStartsWith(found[f"record {i} of {self.path}"], reason)
            self.assertNotRegex(found[f"record {i} of {self.path}"], r"\n|\{\{|\[\[|\[Op")

    def test_a_damaged_record_is_told_by_its_checksum(self):
        self.load()
        offset = 3000
        with open(self.path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 4]))
        starts = self.load()._train.records._start
        hit = int(np.searchsorted(starts, offset, side="right")) - 1
        with self.assertLogs(level="ERROR"):
            found = self.check({hit})
        self.assertIn("corrupted record", found[f"record {hit} of {self.path}"])

    def test_a_file_that_vanishes(self):
        data = self.load()
        batches = data.train_batches(8, count=2)
        os.remove(self.path)
        with self.assertLogs(level="ERROR"):
            masks = [mask.numpy() for _, _, mask in batches]
        self.assertAllEqual(masks, np.zeros((2, 8)))
        self.assertLen(data.unreadable_images.found, 16)
        for reason in data.unreadable_images.found.values():
            self.assertEqual(reason, f"{self.path}; No such file or directory")

    def test_the_reason_of_an_error_in_python(self):
        self.assertEqual(reason_of(ValueError("first\nlast")), "last")
        self.assertEqual(reason_of(KeyError()), "KeyError")
        with self.assertRaises(tf.errors.OpError) as caught:
            tf.function(lambda: tf.numpy_function(lambda: {}["x"], [], tf.string))()
        self.assertEqual(reason_of(caught.exception), "KeyError: 'x'")

    def test_other_hosts_run_no_python(self):
        self.rewrite({5: lambda jpeg: b""})
        self.assertEmpty(self.check({5}, remote=True))

    def test_those_without_a_name_are_bounded(self):
        self.check_bound(maximum=0, code=5)

    @pytest.mark.slow
    def test_those_without_a_name_are_counted(self):
        self.check_bound(maximum=1, code=0)

    def check_bound(self, maximum, code):
        """Run train.py where only the number of unreadable images is known, as for the other hosts of a pod."""
        self.rewrite({i: lambda jpeg: b"" for i in (5, 9)})
        load = functools.partial(lars_keras.data.load, remote=True)
        flags = "--dataset=imagenet2012 --model=alexnet_small --image_size=24 --batch_size=8 --epochs=2"
        run_dir = pathlib.Path(self.root, "run")
        arguments = [
            *flags.split(),
            f"--data_dir={self.root}",
            f"--run_dir={run_dir}",
            f"--max_unreadable_images={maximum}",
        ]
        err = io.StringIO()
        with (
            unittest.mock.patch.object(train.datasets, "load", lambda *a, **o: load(*a, **{**o, "remote": True})),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(err),
        ):
            self.assertEqual(train.run(["train.py", *arguments]), code, err.getvalue())
        if code:
            self.assertIn("1 image is unreadable, more than --max_unreadable_images=0. The logs of the", err.getvalue())
        else:  # two, each in one of an epoch's permutations or the next: one at least
            self.assertEqual(json.loads((run_dir / "results.json").read_text())["bad_images"], 1)

    def test_an_evaluation_that_misses_images(self):
        data = self.load()
        bound = UnreadableImageLimit(data, data.num_test - 1)
        bound.set_model(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
        bound.on_epoch_end(0, {"val_n": 1.0})
        self.assertEqual(bound.count, data.num_test - 1)
        with self.assertRaisesRegex(TooManyUnreadableImages, f"^{data.num_test} images are unreadable"):
            bound.on_epoch_end(1, {"val_n": 0.0})

    def test_another_host_makes_the_same_batches(self):
        """Make batches on a TensorFlow server on loopback, in place of the other hosts of a TPU pod."""
        self.rewrite({5: lambda jpeg: b""})
        command = [sys.executable, "-m", "tests.remote_input", self.root]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        self.assertEqual((run.returncode, run.stdout.split()[-1:]), (0, ["equal"]), run.stderr)


if __name__ == "__main__":
    tf.test.main()
