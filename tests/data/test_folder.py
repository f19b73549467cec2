"""Folders of images, and the same images in all three forms."""

import collections
import io
import pathlib
import tarfile
import tempfile
import unittest
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data.prepare import main
from lars_keras.training import Trainer
from tests import prepared
from tests.data.images import SHARED
from tests.data.streams import train_ids


def examples_of(root):
    """Yield (split, bytes, class, name of the file) of the prepared `imagenet2012`, as tfds reads them."""
    builder = tfds.builder_from_directory(next(pathlib.Path(root, "imagenet2012").glob("5.*")))
    names = builder.info.features["label"].names
    for folder, split in (("train", "train"), ("val", "validation")):
        dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        for e in dataset.as_numpy_iterator():
            yield folder, e["image"], names[int(e["label"])], e["file_name"].decode()


def write_folder(root, source):
    """Write a prepared data set as image files in one folder per class, with the same numbering of classes."""
    for folder, image, label, name in examples_of(source):
        path = pathlib.Path(root, folder, label, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    builder = tfds.builder_from_directory(next(pathlib.Path(source, "imagenet2012").glob("5.*")))
    pathlib.Path(root, "labels.txt").write_text("\n".join(builder.info.features["label"].names) + "\n")


def score(data):
    """Return loss and accuracy of a fixed linear model over the test images."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(data.num_classes)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")])
    return Trainer(model, batch_size=16).evaluate(lambda worker: data.test_batches(16))


def contents(data):
    """Count each image with its label in an epoch without augmentation and in the test split."""
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
            ids = train_ids(data, data.num_train)[0]
            self.assertAllEqual(ids, train_ids(tfrecord, data.num_train)[0])  # the order is one of numbers

    def test_small_images(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        write_folder(folder, prepared.imagenet())
        self.check([prepared.imagenet(), prepared.imagenet("array_record"), folder], 24)

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
        images, labels, mask = next(data.test_batches(2).as_numpy_iterator())
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
        with self.assertRaisesRegex(ValueError, "val/b is not one of the 1 classes of the training split"):
            self.load()
        (self.root / "labels.txt").write_text("a\n b \n\nc d\n")
        self.assertEqual(self.load().num_classes, 3)
        (self.root / "val" / "b" / "1.jpg").unlink()
        with self.assertRaisesRegex(FileNotFoundError, "val has no images"):
            self.load()
        with self.assertRaisesRegex(ValueError, "folder needs `data_dir`.*Received: data_dir=None"):
            lars_keras.data.load("folder")


if __name__ == "__main__":
    tf.test.main()
