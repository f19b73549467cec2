"""Loading and preparing of data sets by name."""

import contextlib
import io
import os
import pathlib
import shutil
import tarfile
import unittest

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data.prepare import main
from tests import prepared
from tests.data.images import SHARED, parse, read_all, read_with_tfds
from tests.data.streams import train_ids


class ErrorTest(tf.test.TestCase, parameterized.TestCase):
    def test_unknown_dataset(self):
        with self.assertRaisesRegex(ValueError, "digits, cifar10, imagenet2012, folder. Received: 'mnist'"):
            lars_keras.data.load("mnist")

    @parameterized.parameters("cifar10", "imagenet2012")
    def test_not_prepared(self, name):
        root = self.get_temp_dir()
        for data_dir in (root, os.path.join(root, "absent")):
            with self.assertRaises(FileNotFoundError) as caught:
                lars_keras.data.load(name, data_dir=data_dir)
            message = str(caught.exception)
            command = f"python -m lars_keras.data.prepare -n {name} -d {data_dir}"
            self.assertIn(command, message)
            self.assertNotIn("\n", message)
            self.assertEqual(" -m FOLDER" in message, name == "imagenet2012")
        self.assertEmpty(os.listdir(root))

    def test_digits_where_nothing_can_be_written(self):
        file = os.path.join(self.get_temp_dir(), "file")
        pathlib.Path(file).touch()
        with self.assertRaisesRegex(ValueError, "not writable. Set `data_dir`"):
            lars_keras.data.load("digits", data_dir=os.path.join(file, "data"))

    def test_a_changed_byte_of_data_in_memory(self):
        root = self.get_temp_dir()
        shutil.copytree(prepared.digits(), root, dirs_exist_ok=True)
        (path,) = pathlib.Path(root, "digits").rglob("*train.tfrecord*")
        with open(path, "r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
        with self.assertRaisesRegex(ValueError, f"^A file in {path.parent} cannot be read: corrupted record at "):
            lars_keras.data.load("digits", data_dir=root)

    def test_prepare_without_the_archives(self):
        root = self.get_temp_dir()
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            self.assertEqual(main(["--dataset=imagenet2012", f"--data_dir={root}"]), 2)
        self.assertRegex(errors.getvalue(), "ILSVRC2012_img_train.tar does not exist. Set `manual_dir`")
        with contextlib.redirect_stderr(io.StringIO()) as errors:  # prepared before its images are stored
            arguments = ["--dataset=imagenet2012", f"--data_dir={root}", "--resize=crop24", f"--manual_dir={root}/tars"]
            self.assertEqual(main(arguments), 2)
        self.assertRegex(errors.getvalue(), "tars/ILSVRC2012_img_train.tar does not exist. Set `manual_dir`")
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            for other in ("--dataset=folder", "--dataset=cifar10"):
                self.assertEqual(main([other, f"--data_dir={root}", "--manual_dir=tars", "--resize=crop24"]), 2)
        self.assertEqual(errors.getvalue().count("`manual_dir` is for imagenet2012. Received: manual_dir=tars"), 2)
        for message, *arguments in (
            ("`out_dir` needs `resize`. Received: out_dir=there, no `resize`", "digits", "--out_dir=there"),
            ("`file_format` is not for a folder.", "folder", "--file_format=tfrecord", "--resize=crop24"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                self.assertEqual(main(["--dataset", *arguments]), 2)
            self.assertStartsWith(errors.getvalue(), message)
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as caught:
            main(["--dataset=mnist"])
        self.assertEqual(caught.exception.code, 2)

    def test_prepare_from_a_truncated_archive(self):
        root = pathlib.Path(self.get_temp_dir())
        with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as archive:
            archive.add(__file__, "n01440764.tar")  # a file that is no archive
        whole = (root / "ILSVRC2012_img_train.tar").read_bytes()
        (root / "ILSVRC2012_img_val.tar").write_bytes(whole)
        (root / "ILSVRC2012_img_train.tar").write_bytes(whole[:700])
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(main(["--dataset=imagenet2012", f"--data_dir={root}/out", f"--manual_dir={root}"]), 2)
        self.assertRegex(errors.getvalue(), "ILSVRC2012_img_train.tar is damaged or truncated: ")


@unittest.skipUnless(SHARED.is_dir(), "needs ../shared/data")
class RealDataTest(tf.test.TestCase):
    def test_imagenet(self):
        root = self.get_temp_dir()
        archives = SHARED / "imagenet_manual"
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = ["--dataset=imagenet2012", f"--manual_dir={archives}", f"--data_dir={root}"]
            self.assertEqual(main(arguments), 0)
        data = lars_keras.data.load("imagenet2012", data_dir=root)
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (201, 51, 1000))
        records = read_all(data, "_train")
        found = [parse(data, r) for r in [*records, *read_all(data, "_test")]]
        self.assertCountEqual(found, read_with_tfds(root))
        images, labels, mask = next(data.train_batches(201).as_numpy_iterator())
        self.assertAllEqual(mask, np.ones(201))
        self.assertEqual(images.shape, (201, 227, 227, 3))
        ids = train_ids(data, 201)[0]
        self.assertAllEqual(labels, [found[i][1] for i in ids])
        gray = [int(tf.image.extract_jpeg_shape(found[i][0])[2]) == 1 for i in ids]
        self.assertBetween(sum(gray), 1, 20)
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 1])
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 2])
        self.assertAllInRange(images.mean((0, 1, 2)) - data.mean, -12, 12)
        self.assertEqual(sum(mask.sum() for _, _, mask in data.test_batches(20).as_numpy_iterator()), 51)

    def test_cifar10(self):
        data = lars_keras.data.load("cifar10", data_dir=SHARED / "tfds")
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (50000, 10000, 10))
        self.assertEqual(data.image_shape, (32, 32, 3))
        self.assertAllClose(data.mean, (125.307, 122.950, 113.865), atol=1e-3)
        self.assertAllClose(data.std, (62.993, 62.089, 66.705), atol=1e-3)
        self.assertAllEqual(np.bincount(data._train[1]), np.full(10, 5000))
        self.assertEqual(data.class_names[:3], ("airplane", "automobile", "bird"))
        with self.assertRaisesRegex(ValueError, "`image_size` of cifar10 is 32.*image_size=64"):
            lars_keras.data.load("cifar10", data_dir=SHARED / "tfds", image_size=64)


if __name__ == "__main__":
    tf.test.main()
