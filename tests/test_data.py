"""Order, augmentation, coverage, record files, and the ways to get them wrong."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl.testing import parameterized
from PIL import Image

import lars_keras.data
from lars_keras.data import jpegs, order
from lars_keras.data.augment import pad_crop_flip, uniforms
from lars_keras.data.prepare import main
from lars_keras.data.records import TFRecords

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


def small_arrays(augment=pad_crop_flip):
    """37 train and 23 test images whose pixels name them."""
    random = np.random.default_rng(0)

    def split(n):
        return random.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n) % 10

    return lars_keras.data.ArrayData("small", split(37), split(23), 10, augment=augment)


def jpeg(height, width, channels=3, seed=0):
    """A smooth random JPEG."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3, 4, channels))
    image = tf.image.resize(coarse, (height, width), method="bicubic")
    return tf.io.encode_jpeg(tf.saturate_cast(image, tf.uint8), quality=95).numpy()


def write_jpegs(root, file_format):
    """Writes 29 train and 11 validation JPEGs of many sizes as the data set `imagenet2012`."""
    shapes = [(80, 120, 3), (120, 80, 3), (50, 50, 1), (90, 300, 3), (9, 7, 3), (1, 1, 3)]

    def split(n, seed):
        for i in range(n):
            data = jpeg(*shapes[i % len(shapes)], seed=seed + i)
            yield i, {"image": data, "label": i % 7, "file_name": f"{seed + i}.JPEG"}

    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet2012",
        version="5.1.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=7),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={"train": split(29, 0), "validation": split(11, 1000)},
        data_dir=root,
        file_format=file_format,
    )


class OrderTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 5, 8, 37, 64, 100)
    def test_each_id_once_an_epoch_at_any_batch_size(self, batch_size):
        data = small_arrays()
        count = -(-5 * 37 // batch_size)
        ids = data.train_ids(batch_size, count=count, seed=4).reshape(-1)[: 5 * 37].reshape(5, 37)
        self.assertAllEqual(np.sort(ids, axis=1), np.tile(np.arange(37), (5, 1)))
        self.assertLen(np.unique(ids, axis=0), 5)

    def test_the_stream_does_not_depend_on_the_batch_size(self):
        data = small_arrays()
        whole = data.train_ids(240, seed=1).reshape(-1)
        for batch_size in (1, 3, 8, 48):
            ids = data.train_ids(batch_size, count=240 // batch_size, seed=1)
            self.assertAllEqual(ids.reshape(-1), whole)
        self.assertNotAllEqual(data.train_ids(240, seed=2).reshape(-1), whole)

    def test_restart_anywhere_gives_the_same_tail(self):
        data = small_arrays()
        whole = [x for x in data.train_numpy(7, count=30, seed=3)]
        for first in range(0, 30, 4):
            order.permutation.cache_clear()
            tail = list(data.train_numpy(7, first=first, count=30 - first, seed=3))
            self.assertLen(tail, 30 - first)
            for (a, b), (c, d) in zip(whole[first:], tail, strict=True):
                self.assertAllEqual(a, c)
                self.assertAllEqual(b, d)

    def test_positions_far_away(self):
        ids, epochs = order.example_ids(np.array([10**15, 10**15 + 1]), 1_281_167, 0)
        self.assertAllEqual(epochs, [10**15 // 1_281_167] * 2)
        place = 10**15 % 1_281_167
        expected = np.random.default_rng([0, epochs[0]]).permutation(1_281_167)
        self.assertAllEqual(ids, expected[place : place + 2])

    def test_shards_merged_are_the_single_stream(self):
        data = small_arrays()
        single = list(data.train_numpy(24, count=5))
        for workers in (2, 3, 4):
            parts = [list(data.train_numpy(24, count=5, shard=(w, workers))) for w in range(workers)]
            for i, (images, labels) in enumerate(single):
                self.assertAllEqual(np.concatenate([p[i][0] for p in parts]), images)
                self.assertAllEqual(np.concatenate([p[i][1] for p in parts]), labels)


class AugmentTest(tf.test.TestCase):
    def test_uniforms_are_keyed_by_seed_epoch_and_id(self):
        ids, epochs = np.arange(50_000), np.full(50_000, 3)
        draws = uniforms(7, epochs, ids, 4)
        shuffled = np.random.default_rng(0).permutation(50_000)
        self.assertAllEqual(uniforms(7, epochs, shuffled, 4), draws[shuffled])
        self.assertAllEqual(uniforms(7, epochs[:1], ids[5:6], 4), draws[5:6])
        for other in (uniforms(8, epochs, ids, 4), uniforms(7, epochs + 1, ids, 4)):
            self.assertLess(np.mean(other == draws), 1e-3)

    def test_uniforms_are_uniform_and_independent(self):
        draws = uniforms(0, np.repeat(np.arange(5), 20_000), np.tile(np.arange(20_000), 5), 3)
        self.assertEqual(draws.dtype, np.float32)
        self.assertAllInRange(draws, 0, 1, open_upper_bound=True)
        for column in draws.T:  # 99.99 % point of chi-squared with 63 degrees of freedom: 116
            counts = np.histogram(column, 64, (0, 1))[0]
            self.assertLess(((counts - 1e5 / 64) ** 2 / (1e5 / 64)).sum(), 116)
        per_example = draws.reshape(5, 20_000, 3)
        columns = [*draws.reshape(5, -1), *per_example[:, :, 0]]
        self.assertLess(abs(np.corrcoef(draws.T)[np.triu_indices(3, 1)]).max(), 0.015)
        neighbours = np.corrcoef([per_example[0, :-1, 0], per_example[0, 1:, 0]])
        epochs = np.corrcoef(columns[5:])
        self.assertLess(abs(neighbours[0, 1]), 0.03)
        self.assertLess(abs(epochs[np.triu_indices(5, 1)]).max(), 0.03)

    def test_pad_crop_flip(self):
        images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
        draws = np.array(
            [[4.5 / 9, 4.5 / 9, 0.5], [4.5 / 9, 4.5 / 9, 0.49], [0, 0, 0.9], [0.999, 0.999, 0.9]],
            np.float32,
        )
        same, flipped, up, down = pad_crop_flip(images[:4], draws)
        self.assertAllEqual(same, images[0])
        self.assertAllEqual(flipped, images[1, :, ::-1])
        self.assertAllEqual(up, np.pad(images[2, :4, :4], ((4, 0), (4, 0), (0, 0))))
        self.assertAllEqual(down, np.pad(images[3, 4:, 4:], ((0, 4), (0, 4), (0, 0))))

    def test_an_example_looks_the_same_at_any_batch_size_and_shard(self):
        data = small_arrays()
        by_key = {}
        for batch_size, shard in ((37, (0, 1)), (5, (0, 1)), (8, (1, 2)), (8, (0, 2))):
            count = 74 // batch_size
            ids = data.train_ids(batch_size, count=count, shard=shard)
            rows = batch_size // shard[1]
            for i, (images, _) in enumerate(data.train_numpy(batch_size, count=count, shard=shard)):
                start = i * batch_size + shard[0] * rows
                for position, k, image in zip(range(start, 74), ids[i], images, strict=False):
                    key = (position // 37, int(k))
                    self.assertAllEqual(by_key.setdefault(key, image), image)
        self.assertLen(by_key, 74)
        changed = [not np.array_equal(by_key[0, k], by_key[1, k]) for k in range(37)]
        self.assertGreater(sum(changed), 30)

    def test_augmentation_can_be_switched_off(self):
        data = small_arrays()
        images, _ = next(data.train_numpy(37, augment=False))
        augmented, _ = next(data.train_numpy(37))
        self.assertAllEqual(images, data._train[0][data.train_ids(37)[0]])
        self.assertNotAllEqual(images, augmented)


class ArrayDataTest(tf.test.TestCase, parameterized.TestCase):
    def test_tf_data_and_numpy_agree(self):
        data = small_arrays()
        options = {"first": 2, "count": 6, "seed": 9, "shard": (1, 2)}
        dataset = data.train_batches(10, **options)
        self.assertEqual([s.shape for s in dataset.element_spec], [(5, 8, 8, 3), (5,)])
        self.assertEqual([s.dtype for s in dataset.element_spec], [tf.uint8, tf.int32])
        pairs = zip(dataset, data.train_numpy(10, **options), strict=True)
        for a, b in pairs:
            self.assertAllEqual(a[0], b[0])
            self.assertAllEqual(a[1], b[1])
        for a, b in zip(data.test_batches(10), data.test_numpy(10), strict=True):
            for x, y in zip(a, b, strict=True):
                self.assertAllEqual(x, y)

    def test_endless(self):
        self.assertEqual(small_arrays().train_batches(4).cardinality(), tf.data.INFINITE_CARDINALITY)

    @parameterized.parameters((1, 1), (7, 1), (23, 1), (64, 1), (8, 2), (20, 4), (64, 4))
    def test_every_test_image_exactly_once(self, batch_size, workers):
        data = small_arrays()
        shards = [list(data.test_batches(batch_size, shard=(w, workers))) for w in range(workers)]
        self.assertEqual({len(s) for s in shards}, {-(-23 // batch_size)})
        images = tf.concat([x for batch in zip(*shards, strict=True) for x, _, _ in batch], 0)
        labels = tf.concat([y for batch in zip(*shards, strict=True) for _, y, _ in batch], 0)
        mask = tf.concat([m for batch in zip(*shards, strict=True) for _, _, m in batch], 0)
        self.assertAllEqual(mask, np.arange(len(mask)) < 23)
        self.assertEqual(mask.dtype, tf.float32)
        self.assertAllEqual(images[:23], data._test[0])
        self.assertAllEqual(labels[:23], data._test[1])
        self.assertAllEqual(images[23:], tf.zeros_like(images[23:]))

    def test_statistics(self):
        data = small_arrays()
        images = data._train[0].astype(np.float64)
        self.assertAllClose(data.mean, images.mean((0, 1, 2)), rtol=1e-12)
        self.assertAllClose(data.std, images.std((0, 1, 2)), rtol=1e-12)

    def test_arrays_need_neither_tensorflow_nor_tfds(self):
        program = """
import importlib, sys, types
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
package = types.ModuleType("lars_keras")  # without its __init__, which imports keras
package.__path__ = [sys.argv[1]]
sys.modules["lars_keras"] = package
data = importlib.import_module("lars_keras.data")
import numpy as np
split = np.zeros((9, 4, 4, 1), np.uint8), np.arange(9)
arrays = data.ArrayData("x", split, split, 9)
images, labels = next(arrays.train_numpy(6))
assert images.shape == (6, 4, 4, 1) and len(set(labels)) == 6
assert sum(mask.sum() for _, _, mask in arrays.test_numpy(6)) == 9
"""
        package = pathlib.Path(lars_keras.data.__file__).parents[1]
        subprocess.run([sys.executable, "-c", program, package], check=True)


def reference_window(shape, draws):
    """The window of `random_crop`, one try at a time: (top, left, height, width)."""
    height, width = shape
    tries = [
        (height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * ratio - 1))
        for area, ratio in zip(draws[:10], draws[10:20], strict=True)
    ]
    sides = [(round((a / r) ** 0.5), round((a * r) ** 0.5)) for a, r in tries]
    fitting = [(h, w) for h, w in sides if h <= height and w <= width]
    h, w = fitting[0] if fitting else np.clip(sides[0], 1, shape)
    h, w = max(h, 1), max(w, 1)
    return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w


def reference_resize(image, size):
    """Bilinear, sampled at pixel centres, float64."""

    def along(length):
        points = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(points).astype(int)
        matrix = np.zeros((size, length))
        matrix[np.arange(size), low] = 1 - (points - low)
        matrix[np.arange(size), np.minimum(low + 1, length - 1)] += points - low
        return matrix

    columns = np.tensordot(along(image.shape[0]), image, 1)
    return np.tensordot(along(image.shape[1]), columns, (1, 1)).swapaxes(0, 1)


class CropTest(tf.test.TestCase, parameterized.TestCase):
    def plain_jpeg(self, height, width, seed=0):
        """A JPEG whose every crop decodes to the same pixels: no chroma is shared by neighbours."""
        image = tf.io.decode_jpeg(jpeg(height, width, seed=seed))
        return tf.io.encode_jpeg(image, quality=95, chroma_downsampling=False)

    @parameterized.parameters((80, 120), (120, 80), (33, 400), (400, 33), (7, 5), (1, 1))
    def test_random_crop(self, height, width):
        data = self.plain_jpeg(height, width)
        pixels = tf.io.decode_jpeg(data).numpy().astype(np.float64)
        draws = uniforms(0, np.arange(40), np.arange(40), jpegs.NUM_DRAWS)
        crop = tf.function(lambda d: jpegs.random_crop(data, d, 24))
        for draw in draws:
            top, left, h, w = reference_window((height, width), draw)
            expected = reference_resize(pixels[top : top + h, left : left + w], 24)
            expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
            actual = crop(draw)
            self.assertEqual(actual.dtype, tf.uint8)
            self.assertLess(np.abs(actual.numpy() - expected).max(), 0.51)  # the rounding

    def test_random_crops_are_as_the_source_says(self):
        draws = uniforms(1, np.zeros(4000, int), np.arange(4000), jpegs.NUM_DRAWS)
        top, left, h, w = np.array([reference_window((375, 500), d) for d in draws]).T
        area, ratio = h * w / (375 * 500), w / h
        self.assertAllInRange(area, 0.075, 1.0)
        self.assertAllInRange(ratio, 0.74, 1.35)
        self.assertLess(area.min(), 0.09)
        self.assertGreater(area.max(), 0.95)
        self.assertAllClose(np.mean(top / np.maximum(375 - h, 1)), 0.5, atol=0.03)
        self.assertAllClose(np.mean(draws[:, -1] < 0.5), 0.5, atol=0.03)

    @parameterized.parameters((227, 227), (224, 224), (256, 256))
    def test_central_crop_of_256_needs_no_resize(self, size, side):
        data = self.plain_jpeg(256, 300)
        pixels = tf.io.decode_jpeg(data)
        top, left = (256 - side) // 2, (300 - side) // 2
        self.assertAllEqual(jpegs.central_crop(data, size), pixels[top : top + side, left : left + side])

    @parameterized.parameters((500, 375, 227, 333), (375, 500, 64, 328), (30, 60, 320, 30))
    def test_central_crop(self, height, width, size, side):
        data = self.plain_jpeg(height, width)
        pixels = tf.io.decode_jpeg(data).numpy().astype(np.float64)
        top, left = (height - side) // 2, (width - side) // 2
        expected = reference_resize(pixels[top : top + side, left : left + side], size)
        actual = jpegs.central_crop(data, size).numpy()
        self.assertLess(np.abs(actual - expected).max(), 0.51)

    def test_every_kind_of_jpeg_becomes_rgb(self):
        red = Image.new("RGB", (40, 30), (200, 30, 30))
        for mode, colour in (("RGB", (200, 30, 30)), ("CMYK", (200, 30, 30)), ("L", (81, 81, 81))):
            file = io.BytesIO()
            red.convert(mode).save(file, format="jpeg", quality=95)
            image = jpegs.central_crop(file.getvalue(), 16)
            self.assertEqual(image.shape, (16, 16, 3))
            self.assertAllClose(tf.cast(image, tf.float32), np.full((16, 16, 3), colour), atol=3)


class JpegDataTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = tempfile.TemporaryDirectory()
        cls.addClassCleanup(root.cleanup)
        cls.roots = {}
        for file_format in ("tfrecord", "array_record"):
            cls.roots[file_format] = os.path.join(root.name, file_format)
            write_jpegs(cls.roots[file_format], file_format)

    def load(self, file_format="tfrecord", image_size=24):
        return lars_keras.data.load("imagenet2012", data_dir=self.roots[file_format], image_size=image_size)

    def test_attributes(self):
        data = self.load()
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (29, 11, 7))
        self.assertEqual(data.image_shape, (24, 24, 3))
        self.assertEqual(self.load(image_size=None).image_shape, (227, 227, 3))

    @parameterized.parameters("tfrecord", "array_record")
    def test_random_access_finds_what_tfds_wrote(self, file_format):
        written = read_with_tfds(self.roots["tfrecord"])
        self.assertLen(written, 40)
        data = self.load(file_format)
        found = [(*parse(data, r), s) for s in ("_train", "_test") for r in read_all(data, s)]
        self.assertCountEqual([(jpeg, label) for jpeg, label, _ in found], written)
        ids = np.random.default_rng(0).permutation(29)
        records = read_all(data, "_train")
        self.assertEqual(data._train.read(ids), [records[i] for i in ids])

    def test_static_shapes(self):
        data = self.load()
        for augment in (True, False):
            images, labels = data.train_batches(8, shard=(1, 2), augment=augment).element_spec
            self.assertEqual(images, tf.TensorSpec((4, 24, 24, 3), tf.uint8))
            self.assertEqual(labels, tf.TensorSpec((4,), tf.int32))
        images, labels, mask = data.test_batches(8, shard=(1, 2)).element_spec
        self.assertEqual(images, tf.TensorSpec((4, 24, 24, 3), tf.uint8))
        self.assertEqual(labels, tf.TensorSpec((4,), tf.int32))
        self.assertEqual(mask, tf.TensorSpec((4,), tf.float32))

    def test_an_example_looks_the_same_at_any_batch_size_and_shard(self):
        data = self.load()
        single = list(data.train_numpy(58, count=1))[0]
        images, labels = (np.concatenate(parts) for parts in zip(*data.train_numpy(5, count=11), strict=True))
        self.assertAllEqual(images, single[0][:55])
        self.assertAllEqual(labels, single[1][:55])
        shards = [next(data.train_numpy(29, first=1, shard=(w, 29))) for w in (0, 7, 28)]
        for worker, (image, label) in zip((0, 7, 28), shards, strict=True):
            self.assertAllEqual(image[0], single[0][29 + worker])
            self.assertEqual(label[0], single[1][29 + worker])
        # In another epoch it looks different, but for the five images of one pixel.
        ids = data.train_ids(58)[0]
        first = single[0][:29][np.argsort(ids[:29])]
        second = single[0][29:][np.argsort(ids[29:])]
        self.assertGreaterEqual(sum((first != second).any((1, 2, 3))), 20)

    def test_without_augmentation_images_are_those_of_evaluation(self):
        data = self.load()
        images, labels = next(data.train_numpy(29, augment=False))
        for i, image, label in zip(data.train_ids(29)[0], images, labels, strict=True):
            jpeg, expected = parse(data, data._train.read([i])[0])
            self.assertAllEqual(image, jpegs.central_crop(jpeg, 24))
            self.assertEqual(label, expected)

    @parameterized.parameters((1, 1), (4, 1), (11, 1), (16, 1), (6, 2), (32, 4))
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
            self.assertAllEqual(image, jpegs.central_crop(jpeg, 24))
            self.assertEqual(label, expected)
        for image, label, _ in rows[11:]:
            self.assertEqual((image.max(), label), (0, 0))


class RecordsTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.get_temp_dir(), "a.tfrecord")
        with tf.io.TFRecordWriter(self.path) as writer:
            for record in (b"one", b"", b"three" * 1000):
                writer.write(record)

    def test_read(self):
        records = TFRecords([self.path, self.path], [3, 3])
        self.assertLen(records, 6)
        expected = [b"three" * 1000, b"one", b"", b"three" * 1000]
        self.assertEqual(records.read([5, 0, 1, 2]), expected)

    def test_a_truncated_file_is_named(self):
        size = os.path.getsize(self.path)
        for new_size in (size - 1, size - 4, size - 4990, 30):
            os.truncate(self.path, new_size)
            with self.assertRaisesRegex(ValueError, "a.tfrecord is damaged"):
                TFRecords([self.path], [3])

    def test_a_file_that_lacks_records_is_named(self):
        with self.assertRaisesRegex(ValueError, "a.tfrecord holds 3 records.* says 4"):
            TFRecords([self.path], [4])

    def test_a_file_that_shrinks_or_vanishes_is_named(self):
        records = TFRecords([self.path], [3])
        os.truncate(self.path, 100)
        with self.assertRaisesRegex(ValueError, "a.tfrecord is truncated: record 2"):
            records.read([2])
        os.remove(self.path)
        with self.assertRaisesRegex(FileNotFoundError, "a.tfrecord"):
            records.read([0])


class ErrorTest(tf.test.TestCase, parameterized.TestCase):
    def test_unknown_dataset(self):
        with self.assertRaisesRegex(ValueError, "'mnist'.*digits, cifar10, imagenet2012"):
            lars_keras.data.load("mnist")

    @parameterized.parameters("cifar10", "imagenet2012")
    def test_not_prepared(self, name):
        root = self.get_temp_dir()
        for data_dir in (root, os.path.join(root, "absent")):
            with self.assertRaises(FileNotFoundError) as caught:
                lars_keras.data.load(name, data_dir=data_dir)
            message = str(caught.exception)
            command = f"python -m lars_keras.data.prepare --dataset={name} --data_dir={data_dir}"
            self.assertIn(command, message)
            self.assertNotIn("\n", message)
            self.assertEqual("--manual_dir" in message, name == "imagenet2012")
        self.assertEmpty(os.listdir(root))

    def test_digits_where_nothing_can_be_written(self):
        file = os.path.join(self.get_temp_dir(), "file")
        pathlib.Path(file).touch()
        with self.assertRaisesRegex(ValueError, "cannot be written to.*--data_dir"):
            lars_keras.data.load("digits", data_dir=os.path.join(file, "data"))

    def test_prepare_without_the_archives(self):
        root = self.get_temp_dir()
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(["--dataset=imagenet2012", f"--data_dir={root}"])
        self.assertEqual(code, 2)
        self.assertRegex(errors.getvalue(), "ILSVRC2012_img_train.tar does not exist.*--manual_dir")
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as caught:
            main(["--dataset=mnist"])
        self.assertEqual(caught.exception.code, 2)

    @parameterized.parameters(
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"batch_size": 6, "shard": (0, 4)}, "`batch_size`.*multiple.*batch_size=6"),
        ({"batch_size": 8, "shard": (2, 2)}, "`shard`.*shard=\\(2, 2\\)"),
        ({"batch_size": 8, "seed": -1}, "`seed`.*seed=-1"),
        ({"batch_size": 8, "first": -1}, "`first`.*first=-1"),
    )
    def test_arguments(self, options, message):
        data = small_arrays()
        for method in (data.train_batches, data.train_numpy, data.train_ids):
            with self.assertRaisesRegex(ValueError, message):
                method(**options)
        if options.keys() <= {"batch_size", "shard"}:
            for method in (data.test_batches, data.test_numpy):
                with self.assertRaisesRegex(ValueError, message):
                    method(**options)

    def test_arrays(self):
        images, labels = np.zeros((5, 4, 4, 1), np.uint8), np.arange(5)
        for train, message in (
            ((images.astype(np.float32), labels), "uint8.*Received: float32"),
            ((images[0], labels), "shape \\(4, 4, 1\\)"),
            ((images, labels[:4]), "labels of shape \\(5,\\).*\\(4,\\)"),
            ((images, labels + 6), "range\\(10\\).*6 to 10"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                lars_keras.data.ArrayData("x", train, (images, labels), 10)


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
        images, labels = next(data.train_numpy(201))
        self.assertEqual(images.shape, (201, 227, 227, 3))
        ids = data.train_ids(201)[0]
        self.assertAllEqual(labels, [found[i][1] for i in ids])
        gray = [int(tf.image.extract_jpeg_shape(found[i][0])[2]) == 1 for i in ids]
        self.assertBetween(sum(gray), 1, 20)
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 1])
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 2])
        self.assertAllInRange(images.mean((0, 1, 2)) - data.mean, -12, 12)
        self.assertEqual(sum(mask.sum() for _, _, mask in data.test_numpy(20)), 51)

    def test_cifar10(self):
        data = lars_keras.data.load("cifar10", data_dir=SHARED / "tfds")
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (50000, 10000, 10))
        self.assertEqual(data.image_shape, (32, 32, 3))
        self.assertAllClose(data.mean, (125.307, 122.950, 113.865), atol=1e-3)
        self.assertAllClose(data.std, (62.993, 62.089, 66.705), atol=1e-3)
        self.assertAllEqual(np.bincount(data._train[1]), np.full(10, 5000))
        with self.assertRaisesRegex(ValueError, "`image_size` of cifar10 is 32.*image_size=64"):
            lars_keras.data.load("cifar10", data_dir=SHARED / "tfds", image_size=64)


def read_all(data, split):
    records = getattr(data, split)
    return records.read(np.arange(len(records)))


def parse(data, record):
    image, label = data._parse(record)
    return image.numpy(), int(label)


def read_with_tfds(root):
    """Returns (JPEG bytes, label) of both splits, as tfds itself reads them."""
    builder = tfds.builder_from_directory(os.path.join(root, "imagenet2012", "5.1.0"))
    examples = []
    for split in ("train", "validation"):
        dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        examples += [(e["image"], int(e["label"])) for e in dataset.as_numpy_iterator()]
    return examples


if __name__ == "__main__":
    tf.test.main()
