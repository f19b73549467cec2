"""Encoded images: random access, batches, and evaluation."""

import os

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data import decode
from lars_keras.data.folder import FolderExamples
from lars_keras.data.image_files import ImageFileData
from tests import prepared
from tests.data.images import parse, read_all, read_with_tfds
from tests.data.streams import train_ids


class ImageFileDataTest(tf.test.TestCase, parameterized.TestCase):
    def load(self, file_format="tfrecord", image_size=24):
        return lars_keras.data.load("imagenet2012", data_dir=prepared.imagenet(file_format), image_size=image_size)

    def test_attributes(self):
        data = self.load()
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (29, 11, 7))
        self.assertEqual(data.image_shape, (24, 24, 3))
        self.assertEqual(self.load(image_size=None).image_shape, (227, 227, 3))
        self.assertRegex(data.fingerprint, "^29 train and 11 test images in 7 classes, [0-9a-f]{16}$")
        self.assertEqual(self.load(image_size=None).fingerprint, data.fingerprint)

    @parameterized.parameters("tfrecord", "array_record")
    def test_random_access_finds_what_tfds_wrote(self, file_format):
        written = read_with_tfds(prepared.imagenet())
        self.assertLen(written, 40)
        data = self.load(file_format)
        found = [(*parse(data, r), s) for s in ("_train", "_test") for r in read_all(data, s)]
        self.assertCountEqual([(jpeg, label) for jpeg, label, _ in found], written)
        ids = np.random.default_rng(0).permutation(29)
        records = read_all(data, "_train")
        self.assertEqual([data._train.records.record(i).numpy() for i in ids], [records[i] for i in ids])

    def test_labels_out_of_range_are_unreadable(self):
        paths = [os.path.join(self.get_temp_dir(), f"{i}.png") for i in range(4)]
        for path in paths:
            tf.io.write_file(path, tf.io.encode_png(tf.fill((8, 8, 3), tf.constant(9, tf.uint8))))
        examples = FolderExamples(paths, np.array([1, 5, -1, 0]))
        for remote in (False, True):
            data = ImageFileData("x", examples, examples, 2, image_size=8, remote=remote)
            images, labels, mask = next(data.test_batches(4).as_numpy_iterator())
            self.assertAllEqual(mask, [1, 0, 0, 1])
            self.assertAllEqual(labels, [1, 0, 0, 0])
            self.assertAllEqual(images[:, 0, 0, 0], [9, 124, 124, 9])
            ids = train_ids(data, 4)[0]
            self.assertAllEqual(next(data.train_batches(4).as_numpy_iterator())[2], np.isin(ids, [0, 3]))
            reasons = {paths[i]: f"its label {label} is not in range(2)" for i, label in ((1, 5), (2, -1))}
            self.assertEqual(data.unreadable_images.found, {} if remote else reasons)

    def test_static_shapes(self):
        data = self.load()
        for augment in (True, False):
            images, labels, mask = data.train_batches(8, shard=(1, 2), augment=augment).element_spec
            self.assertEqual(mask, tf.TensorSpec((4,), tf.float32))
            self.assertEqual(images, tf.TensorSpec((4, 24, 24, 3), tf.uint8))
            self.assertEqual(labels, tf.TensorSpec((4,), tf.int32))
        images, labels, mask = data.test_batches(8, shard=(1, 2)).element_spec
        self.assertEqual(images, tf.TensorSpec((4, 24, 24, 3), tf.uint8))
        self.assertEqual(labels, tf.TensorSpec((4,), tf.int32))
        self.assertEqual(mask, tf.TensorSpec((4,), tf.float32))

    def test_an_example_looks_the_same_at_any_batch_size_and_shard(self):
        data = self.load()
        single = list(data.train_batches(58, count=1).as_numpy_iterator())[0]
        images, labels, mask = (
            np.concatenate(parts) for parts in zip(*data.train_batches(5, count=11).as_numpy_iterator(), strict=True)
        )
        self.assertAllEqual(images, single[0][:55])
        self.assertAllEqual(labels, single[1][:55])
        self.assertAllEqual(mask, np.ones(55))
        shards = [next(data.train_batches(29, first=1, shard=(w, 29)).as_numpy_iterator()) for w in (7, 28)]
        for worker, (image, label, _) in zip((7, 28), shards, strict=True):
            self.assertAllEqual(image[0], single[0][29 + worker])
            self.assertEqual(label[0], single[1][29 + worker])
        # In another epoch it looks different, but for the five images of one pixel.
        ids = train_ids(data, 58)[0]
        first = single[0][:29][np.argsort(ids[:29])]
        second = single[0][29:][np.argsort(ids[29:])]
        self.assertGreaterEqual(sum((first != second).any((1, 2, 3))), 20)

    def test_without_augmentation_images_are_those_of_evaluation(self):
        data = self.load()
        images, labels, _ = next(data.train_batches(29, augment=False).as_numpy_iterator())
        for i, image, label in zip(train_ids(data, 29)[0], images, labels, strict=True):
            jpeg, expected = parse(data, data._train.records.record(i).numpy())
            self.assertAllEqual(image, decode.central_crop(jpeg, 24))
            self.assertEqual(label, expected)

    @parameterized.parameters(
        (4, 1), (11, 1), (24, 2)
    )  # test_arrays.py has more: shards and padding are those of `base`
    def test_every_test_image_exactly_once(self, batch_size, workers):
        data = self.load()
        shards = [list(data.test_batches(batch_size, shard=(w, workers))) for w in range(workers)]
        self.assertEqual({len(s) for s in shards}, {-(-11 // batch_size)})
        rows = [
            example
            for batch in zip(*shards, strict=True)
            for part in batch
            for example in zip(*(x.numpy() for x in part), strict=True)
        ]
        self.assertAllEqual([mask for _, _, mask in rows], np.arange(len(rows)) < 11)
        for record, (image, label, _) in zip(read_all(data, "_test"), rows, strict=False):
            jpeg, expected = parse(data, record)
            self.assertAllEqual(image, decode.central_crop(jpeg, 24))
            self.assertEqual(label, expected)
        for image, label, _ in rows[11:]:
            self.assertEqual((image.max(), label), (0, 0))


if __name__ == "__main__":
    tf.test.main()
