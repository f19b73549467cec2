"""One data set in three forms, caches, and augmentation."""

import collections
import functools
import io
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import unittest
import unittest.mock

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data.augment import mix_pairs
from lars_keras.data.prepare import main
from lars_keras.training import Trainer
from tests.data.test_image_files import SHARED, write_jpegs


def examples_of(root):
    """(split, bytes, class, name of the file) of the prepared `imagenet2012`, as tfds reads them."""
    builder = tfds.builder_from_directory(next(pathlib.Path(root, "imagenet2012").glob("5.*")))
    names = builder.info.features["label"].names
    for folder, split in (("train", "train"), ("val", "validation")):
        dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        for e in dataset.as_numpy_iterator():
            yield folder, e["image"], names[int(e["label"])], e["file_name"].decode()


def write_folder(root, prepared):
    """Writes the prepared data set as image files in folders of their classes, with its numbering of classes."""
    for folder, image, label, name in examples_of(prepared):
        path = pathlib.Path(root, folder, label, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    builder = tfds.builder_from_directory(next(pathlib.Path(prepared, "imagenet2012").glob("5.*")))
    pathlib.Path(root, "labels.txt").write_text("\n".join(builder.info.features["label"].names) + "\n")


def score(data):
    """Loss and accuracy of a fixed linear model over the test images."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(data.num_classes)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")])
    return Trainer(model, batch_size=16).evaluate(lambda worker: data.test_batches(16))


def contents(data):
    """How often each image and label comes in an epoch without augmentation, and in the test split."""
    epoch = data.train_batches(data.num_train, count=1, augment=False)
    images = collections.Counter()
    for batch in (*epoch, *data.test_batches(data.num_test)):
        for image, label, mask in zip(*(part.numpy() for part in batch), strict=True):
            images[image.tobytes(), int(label), float(mask)] += 1
    return images


class FormsTest(tf.test.TestCase, parameterized.TestCase):
    def check(self, roots, image_size):
        tfrecord, array_record, folder = (
            lars_keras.data.load(name, data_dir=root, image_size=image_size)
            for name, root in zip(("imagenet2012", "imagenet2012", "folder"), roots, strict=True)
        )
        expected, scores = contents(tfrecord), score(tfrecord)
        for data in (array_record, folder):
            self.assertEqual(contents(data), expected)
            found = score(data)
            self.assertEqual((found["top1"], found["n"]), (scores["top1"], scores["n"]))
            self.assertAllClose(found["loss"], scores["loss"], rtol=1e-6)
            ids = data.train_ids(data.num_train)[0]
            self.assertAllEqual(ids, tfrecord.train_ids(data.num_train)[0])  # the order is one of numbers

    def test_small_images(self):
        roots = [self.enterContext(tempfile.TemporaryDirectory()) for _ in range(3)]
        write_jpegs(roots[0], "tfrecord")
        write_jpegs(roots[1], "array_record")
        write_folder(roots[2], roots[0])
        self.check(roots, 24)

    @pytest.mark.slow
    @unittest.skipUnless(SHARED.is_dir(), "needs ../shared/data")
    def test_imagenet_archives(self):
        roots = [self.enterContext(tempfile.TemporaryDirectory()) for _ in range(3)]
        archives = SHARED / "imagenet_manual"
        for root, file_format in zip(roots[:2], ("tfrecord", "array_record"), strict=True):
            arguments = ["--dataset=imagenet2012", f"--manual_dir={archives}", f"--data_dir={root}"]
            with unittest.mock.patch("sys.stdout", io.StringIO()):
                self.assertEqual(main([*arguments, f"--file_format={file_format}"]), 0)
        write_folder(roots[2], roots[0])
        with tarfile.open(archives / "ILSVRC2012_img_val.tar") as archive:
            in_archive = {member.name for member in archive.getmembers()}
        self.assertEqual({path.name for path in pathlib.Path(roots[2], "val").glob("*/*")}, in_archive)
        self.check(roots, 96)


class FolderTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, *paths):
        for path in paths:
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            image = np.full((20, 30, 3), len(path), np.uint8)
            file.write_bytes(
                tf.io.encode_jpeg(image).numpy() if "j" in file.suffix.lower() else tf.io.encode_png(image).numpy()
            )

    def load(self):
        return lars_keras.data.load("folder", data_dir=self.root, image_size=16)

    def test_classes_are_numbered_by_name(self):
        self.write("train/b/1.jpg", "train/a/2.JPEG", "train/a/1.png", "train/c/9.jpg", "test/c/1.jpg", "test/a/1.jpg")
        (self.root / "train" / "a" / "notes.txt").write_text("no image")
        data = self.load()
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (4, 2, 3))
        names = [pathlib.Path(data._train.where(i)).relative_to(self.root).as_posix() for i in range(4)]
        self.assertEqual(names, ["train/a/1.png", "train/a/2.JPEG", "train/b/1.jpg", "train/c/9.jpg"])
        images, labels, mask = next(data.test_numpy(2))
        self.assertAllEqual(labels, [0, 2])
        self.assertAllEqual(mask, [1, 1])
        self.assertAllClose(images.astype(float), np.full(images.shape, len("test/a/1.jpg")), atol=1)

    def test_errors_say_what_is_expected(self):
        with self.assertRaisesRegex(FileNotFoundError, "train/CLASS.*without a folder train"):
            self.load()
        self.write("train/a/1.jpg")
        with self.assertRaisesRegex(FileNotFoundError, "without a folder val"):
            self.load()
        self.write("val/b/1.jpg")
        with self.assertRaisesRegex(ValueError, "val/b is no class of the training split"):
            self.load()
        (self.root / "labels.txt").write_text("a\n b \n\nc d\n")
        self.assertEqual(self.load().num_classes, 3)
        (self.root / "val" / "b" / "1.jpg").unlink()
        with self.assertRaisesRegex(FileNotFoundError, "val has no images"):
            self.load()
        with self.assertRaisesRegex(ValueError, "--dataset=folder needs --data_dir"):
            lars_keras.data.load("folder")


class CacheTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.root = self.enterContext(tempfile.TemporaryDirectory())
        self.copies = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "copies")
        write_jpegs(self.root, "tfrecord")

    def load(self, cache, **options):
        options = {"cache_dir": self.copies} if cache == "disk" else options
        return lars_keras.data.load("imagenet2012", data_dir=self.root, image_size=24, cache=cache, **options)

    def batches(self, data):
        return [*data.train_numpy(29, count=2), *data.test_numpy(11)]

    def check(self, data, expected):
        for a, b in zip(tf.nest.flatten(self.batches(data)), tf.nest.flatten(expected), strict=True):
            self.assertAllEqual(a, b)

    def test_images_are_the_same_and_files_are_read_once(self):
        expected = self.batches(self.load("none"))
        cached = [self.load("memory"), self.load("disk")]
        copies = {path: path.stat().st_mtime_ns for path in pathlib.Path(self.copies).rglob("*.tfrecord*")}
        self.assertLen(copies, 2)
        for path in pathlib.Path(self.root).rglob("*.tfrecord*"):
            path.write_bytes(bytes(path.stat().st_size))  # from here on nothing good can come from there
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

    def test_damaged_records_are_left_out(self):
        path = next(pathlib.Path(self.root).rglob("*train.tfrecord*"))
        damaged = bytearray(path.read_bytes())
        damaged[-20] ^= 255
        path.write_bytes(damaged)
        data = self.load("memory")
        with self.assertLogs(level="ERROR"):
            _, _, mask = next(data.train_numpy(29))
        self.assertEqual(mask.sum(), 28)

    def test_where_there_is_no_room(self):
        with unittest.mock.patch.object(psutil, "virtual_memory", lambda: unittest.mock.Mock(available=1000)):
            with self.assertRaisesRegex(ValueError, "--cache=memory would take .* GB .* are free"):
                self.load("memory")
        with unittest.mock.patch("shutil.disk_usage", lambda path: unittest.mock.Mock(free=1000)):
            with self.assertRaisesRegex(ValueError, "--cache=disk needs .* GB in --cache_dir=.*copies"):
                self.load("disk")
        shutil.rmtree(self.copies)
        pathlib.Path(self.copies).write_text("a file, not a folder")
        with self.assertRaisesRegex(ValueError, "--cache_dir=.*copies.* cannot be written to"):
            self.load("disk")

    def test_what_has_no_cache(self):
        with self.assertRaisesRegex(ValueError, "digits is in memory anyway.*--cache=memory"):
            lars_keras.data.load("digits", data_dir=self.root, cache="memory")
        with self.assertRaisesRegex(ValueError, "not the other hosts of a pod slice.*--cache=memory"):
            self.load("memory", remote=True)


class AugmentTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = tempfile.TemporaryDirectory()
        cls.addClassCleanup(root.cleanup)
        cls.root = root.name
        write_jpegs(cls.root, "tfrecord")

    @classmethod
    def load(cls, augment):
        return lars_keras.data.load("imagenet2012", data_dir=cls.root, image_size=24, augment=augment)

    @classmethod
    @functools.cache
    def examples(cls, augment):
        """Returns images and labels of two batches of 32."""
        batches = cls.load(augment).train_numpy(32, count=2)
        return [np.concatenate(part) for part in list(zip(*batches, strict=True))[:2]]

    @parameterized.parameters("randaugment", "mixup")
    def test_follows_from_seed_epoch_and_example(self, augment):
        images, labels = self.examples(augment)
        plain, _ = self.examples("crop_flip")
        self.assertGreater((images != plain).any((1, 2, 3)).sum(), 25)
        # Other batches, and one of two workers.
        again, labels_again, _ = next(self.load(augment).train_numpy(48, shard=(1, 2)))
        self.assertAllEqual(again, images[24:48])
        self.assertAllEqual(labels_again, labels[24:48])

    def test_pixels_do_not_follow_the_precision_of_the_model(self):
        images, _ = self.examples("randaugment")
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        keras.config.set_dtype_policy("mixed_float16")
        again, *_ = next(self.load("randaugment").train_numpy(48))
        self.assertAllEqual(again, images[:48])

    def test_none_is_the_central_crop(self):
        images, labels, _ = next(self.load("none").train_numpy(30))
        bare, bare_labels, _ = next(self.load("mixup").train_numpy(30, augment=False))
        self.assertAllEqual(images, bare)
        self.assertAllEqual(labels, bare_labels)

    @parameterized.parameters("mixup", "cutmix")
    def test_mix(self, kind):
        rng = np.random.default_rng(0)
        n, size, classes = 400, 12, 5
        images = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
        labels = rng.integers(0, classes, n).astype(np.int32)
        mask = np.ones(n, np.float32)
        mask[6] = 0
        draws = rng.uniform(size=(n, 3)).astype(np.float32)
        mixed, soft = (x.numpy() for x in mix_pairs(kind, *map(tf.constant, (images, labels, mask, draws)), classes))
        neighbour = np.arange(n) ^ 1
        self.assertAllClose(soft.sum(1), np.ones(n))
        other = labels != labels[neighbour]
        share = soft[np.arange(n), labels]
        self.assertAllEqual(share[6:8], [1, 1])  # what cannot be read mixes with nothing
        self.assertAllEqual(mixed[6:8], images[6:8])
        for i in np.flatnonzero(other):
            self.assertAllClose(soft[i, labels[neighbour[i]]], 1 - share[i], atol=1e-6)
            a, b = images[i].astype(np.float64), images[neighbour[i]].astype(np.float64)
            if kind == "mixup":
                self.assertAllClose(mixed[i], share[i] * a + (1 - share[i]) * b, atol=0.501)
            else:
                own = (mixed[i] == images[i]).all(-1)
                self.assertAllClose(own.mean(), share[i], atol=1e-6)
                self.assertAllEqual(mixed[i][~own], images[neighbour[i]][~own])
                rows, columns = np.flatnonzero(~own.all(1)), np.flatnonzero(~own.all(0))
                if len(rows):  # the covered part is one box
                    self.assertFalse(own[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].any())
        # Beta(0.2, 0.2) has variance 0.25 / 1.4. Of a box of side s a mean of (s - s^2/4)^2 is inside, s^2 uniform.
        if kind == "mixup":
            self.assertAllClose((share[other].mean(), share[other].std()), (0.5, (0.25 / 1.4) ** 0.5), atol=0.05)
        else:
            self.assertAllClose(1 - share[other].mean(), 1 / 2 - 1 / 5 + 1 / 48, atol=0.03)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "mixup mixes two and two.*batch_size=10, shard=\\(1, 2\\)"):
            self.load("mixup").train_batches(10, shard=(1, 2))
        with self.assertRaisesRegex(ValueError, "Unknown augment. Received: 'blur'. Accepted: none, crop_flip"):
            self.load("blur")
        with self.assertRaisesRegex(ValueError, "digits has no random crop and flip"):
            lars_keras.data.load("digits", data_dir=self.root, augment="crop_flip")
        with unittest.mock.patch.dict("sys.modules", {"keras_cv": None}):
            sys.modules.pop("lars_keras.data.randaugment", None)
            with self.assertRaisesRegex(ValueError, "--augment=randaugment needs keras-cv"):
                self.load("randaugment")

    def test_images_in_memory(self):
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
        split = images, np.arange(20) % 4
        data = lars_keras.data.ArrayData("small", split, split, 4, augment="mixup")
        found, labels, _ = next(data.train_numpy(10))
        self.assertEqual((found.shape, labels.shape), ((10, 8, 8, 3), (10, 4)))
        self.assertAllEqual(found, next(iter(data.train_batches(10)))[0])


if __name__ == "__main__":
    tf.test.main()
