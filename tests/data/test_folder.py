"""Folders of images, and the same images in all three forms."""

import collections
import io
import os
import pathlib
import shutil
import tarfile
import tempfile
import unittest
import unittest.mock

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl.testing import parameterized
from PIL import Image

import lars_keras.data
from lars_keras.data.folder import read_folder
from lars_keras.data.prepare import main
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
        expected = contents(tfrecord)
        for data in (array_record, folder):
            self.assertEqual(contents(data), expected)
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
            arguments += ["--resize=crop24"] if file_format == "tfrecord" else []  # prepares them first
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

    def load(self, **options):
        return lars_keras.data.load("folder", data_dir=self.root, image_size=16, **options)

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
        self.assertEqual((self.load().num_classes, self.load().class_names), (3, ("a", "b", "c d")))
        (self.root / "val" / "b" / "1.jpg").unlink()
        self.write("val/b/1.tiff")
        with self.assertRaisesRegex(FileNotFoundError, "val has no images.*It has: 1 x .tiff file, which cannot"):
            self.load()
        with self.assertRaisesRegex(ValueError, "folder needs `data_dir`.*Received: data_dir=None"):
            lars_keras.data.load("folder")

    def test_held_out_images_need_no_folder_of_their_own(self):
        self.write(*(f"train/{name}/{i}.jpg" for name in "ab" for i in range(4)))
        for cache in ("none", "memory", "disk"):
            data = self.load(validation_split=0.25, cache=cache, cache_dir=self.root / "copies")
            self.assertEqual((data.num_train, data.num_test, data.num_classes), (6, 2, 2))

    def test_hidden_folders_are_no_classes(self):
        self.write("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
        hidden = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found")
        for name in hidden:
            self.write(f"train/{name}/1.jpg", f"val/{name}/1.jpg", f"train/a/{name}/1.jpg")
        for labels in (None, "\ufeffb\na\n"):  # some editors begin a file so
            if labels:
                (self.root / "labels.txt").write_text(labels, encoding="utf-8")
            train, test, classes = read_folder(self.root)
            self.assertEqual(classes, ["b", "a"] if labels else ["a", "b"])
            self.assertEqual((train.labels.tolist(), test.labels.tolist()), ([1, 0] if labels else [0, 1],) * 2)
            self.assertEqual(train.left_out, {"hidden folder": 8})
            self.assertIn("; left out: 12 x hidden folder", self.load().description)
        (self.root / "labels.txt").write_text("a\nb\n@eaDir\n")  # unless the user says so
        self.assertEqual(read_folder(self.root)[0].labels.tolist(), [2, 0, 1])

    def test_only_hidden_in_one_split(self):
        self.write("train/a/1.jpg", "val/a/1.jpg", "val/.ipynb_checkpoints/1.jpg")
        self.assertEqual((self.load().num_test, self.load().num_classes), (1, 1))

    def test_what_is_left_out_is_counted(self):
        self.write("train/a/1.jpg", "val/a/1.jpg", "train/a/._1.jpg", "val/a/.DS_Store", "train/stray.jpg")
        self.write("train/a/2.tiff", "train/a/3.TIF", "train/a/notes.txt", "train/a/README", "train/.hidden.png")
        self.write("train/a/sub/1.jpg", "train/a/sub/deep/1.jpg", "train/a/sub/.2.jpg")
        (self.root / "train/a/folder.jpg").mkdir()
        (self.root / "train/a/gone.jpg").symlink_to("/nonexistent")
        (self.root / "train/a/loop.png").symlink_to("loop.png")
        (self.root / "train/a/good.JPE").symlink_to(self.root / "val/a/1.jpg")
        data = self.load()
        self.assertEqual((data.num_train, data.num_test), (2, 1))
        self.assertEqual(
            data.description.partition("; left out: ")[2],
            "1 x .tif file, which cannot be decoded, 1 x .tiff file, which cannot be decoded, 1 x .txt file, "
            "2 x broken link, 1 x empty folder inside the folder of a class, 1 x file beside the folders of the "
            "classes, 2 x file in a folder inside the folder of a class, 1 x file without a suffix, 3 x hidden file",
        )
        _, _, mask = next(data.train_batches(2).as_numpy_iterator())
        self.assertAllEqual(mask, [1, 1])
        self.assertEmpty(data.unreadable_images.found)

    def test_every_suffix_that_can_be_read(self):
        self.write("val/a/1.jpg", *(f"train/a/{s}.{s}" for s in ("jpg", "JPEG", "jpe", "Jfif")))
        image = Image.fromarray(np.full((20, 30, 3), 9, np.uint8))
        for suffix in ("png", "bmp", "gif", "webp", "WEBP"):
            image.save(self.root / "train" / "a" / f"2.{suffix}")
        data = self.load()
        _, _, mask = next(data.train_batches(9).as_numpy_iterator())
        self.assertAllEqual(mask, np.ones(9))
        self.assertNotIn("left out", data.description)

    def test_classes_without_images_are_named(self):
        self.write("train/a/1.jpg", "val/a/1.jpg", "val/c/1.jpg", "train/d/1.tiff")
        (self.root / "train" / "c").mkdir()
        data = self.load()
        self.assertIn("; no training images of c, d", data.description)
        self.assertEqual(data.warnings, ("2 of 3 classes have no training images: c, d.",))
        (self.root / "labels.txt").write_text("a\nc\nd\n" + "\n".join(map(str, range(7))))
        self.assertIn("9 of 10 classes have no training images: c, d, 0, 1, 2 and 4 more.", self.load().warnings)
        self.write("train/c/1.jpg", *(f"train/{name}/{i}.jpg" for name in "ad" for i in range(7)))
        (self.root / "labels.txt").unlink()
        warnings = [self.load(validation_split=s).warnings for s in (0.1, 0.125)]
        self.assertEqual(warnings, [(), ("1 of 3 classes have no training images: c.",)])
        with self.assertRaisesRegex(ValueError, "`image_size` must be positive. Received: image_size=0"):
            lars_keras.data.load("folder", data_dir=self.root, image_size=0)
        (self.root / "labels.txt").write_text("a\nb\na\n")
        with self.assertRaisesRegex(ValueError, "labels.txt lists a class twice: a"):
            self.load()

    def test_the_fingerprint_is_that_of_the_images(self):
        """It differs where a run would go on with others, and not where they only are in another place."""
        self.write("train/a/1.jpg", "train/a/22.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/333.jpg")
        image = tf.io.encode_jpeg(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).numpy()
        (self.root / "train/b/1.jpg").write_bytes(image)
        first = self.load().fingerprint
        self.assertRegex(first, "^3 train and 2 test images in 2 classes, [0-9a-f]{16}$")
        elsewhere = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for path in sorted(self.root.glob("*/*/*.jpg"), reverse=True):  # in another order on the disk
            copy = elsewhere / path.relative_to(self.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        for options in (
            {"cache": "memory"},
            {"cache": "disk", "cache_dir": elsewhere / "copies"},
            {"validation_split": 0.4},
            {"data_dir": os.path.relpath(elsewhere)},
        ):
            data = lars_keras.data.load("folder", **{"data_dir": self.root} | options)
            self.assertEqual(data.fingerprint, first, options)
        found = {first}
        (self.root / "labels.txt").write_text("b\na\n")
        found.add(self.load().fingerprint)
        (self.root / "labels.txt").unlink()
        for old, new in (("a", "c"), ("b", "a"), ("c", "b")):  # two classes change places
            (self.root / "train" / old).rename(self.root / "train" / new)
        found.add(self.load().fingerprint)
        (self.root / "train/a/1.jpg").write_bytes(image + b" ")
        found.add(self.load().fingerprint)
        self.write("train/a/4444.jpg")
        found.add(self.load().fingerprint)
        self.assertLen(found, 5)

    def test_names_that_are_not_utf_8(self):
        self.write("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
        root = os.fsencode(self.root)
        for old, new in ((b"train/a", b"train/caf\xe9"), (b"val/a", b"val/caf\xe9")):
            os.rename(os.path.join(root, old), os.path.join(root, new))
        shutil.copy(os.path.join(root, b"train/b/1.jpg"), os.path.join(root, b"train/b/\xff.jpg"))
        with open(os.path.join(root, b"train/caf\xe9/\xe8.jpg"), "wb") as file:
            file.write(b"damaged")
        os.mkdir(os.path.join(root, b"train/\xfc"))
        renamed = pathlib.Path(f"{self.root}-\udce9")
        self.root = self.root.rename(renamed)
        self.addCleanup(shutil.rmtree, renamed)
        for cache in ("none", "disk"):
            copies = {"cache": cache, "cache_dir": self.root / "copies"} if cache == "disk" else {}
            data = lars_keras.data.load("folder", data_dir=self.root, image_size=16, **copies)
            with self.assertLogs(level="ERROR") as logs:
                _, labels, mask = next(data.train_batches(4).as_numpy_iterator())
            self.assertEqual((sum(labels), sum(mask)), (1, 3))  # of b twice, of the other once
            found = list(data.unreadable_images.found)
            self.assertRegex(found[0], r"caf\\xe9/\\xe8\.jpg$")
            for text in (data.description, *data.warnings, *found, *logs.output):
                text.encode()  # any stream takes it
            self.assertIn(r"\xfc", data.warnings[0])
            data.unreadable_images.save(self.root / "bad.json")
            data.unreadable_images.load(self.root / "bad.json")


if __name__ == "__main__":
    tf.test.main()
