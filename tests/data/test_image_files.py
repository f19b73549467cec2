"""JPEG data: crops, records, and the real archives."""

import contextlib
import io
import os
import pathlib
import tarfile
import tempfile
import unittest

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl.testing import parameterized
from PIL import Image, ImageOps

import lars_keras.data
import models
from lars_keras.data import decode
from lars_keras.data.keyed import keys, uniforms
from lars_keras.data.prepare import main
from lars_keras.data.records import TFRecords

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


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


def read_all(data, split):
    records = getattr(data, split).records
    return records.read(np.arange(len(records)))


def parse(data, record):
    image, label = data._train.parse(record)
    return image.numpy(), int(label)


def read_with_tfds(root):
    """Returns (JPEG bytes, label) of both splits, as tfds itself reads them."""
    builder = tfds.builder_from_directory(os.path.join(root, "imagenet2012", "5.1.0"))
    examples = []
    for split in ("train", "validation"):
        dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        examples += [(e["image"], int(e["label"])) for e in dataset.as_numpy_iterator()]
    return examples


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


def little_endian(data):
    """The same JPEG with its EXIF tags, as Pillow writes them, in the other order of bytes."""
    start = data.index(b"MM\x00*")
    count = int.from_bytes(data[start + 8 : start + 10], "big")
    tags = b"II*\x00" + (8).to_bytes(4, "little") + count.to_bytes(2, "little")
    for i in range(count):
        entry = data[start + 10 + 12 * i :][:12]
        tag, kind, n = (int.from_bytes(entry[a:b], "big") for a, b in ((0, 2), (2, 4), (4, 8)))
        value = int.from_bytes(entry[8:10], "big") if kind == 3 else int.from_bytes(entry[8:12], "big")
        tags += b"".join(x.to_bytes(size, "little") for x, size in ((tag, 2), (kind, 2), (n, 4), (value, 4)))
    return data[:start] + tags + data[start + len(tags) :]


class CropTest(tf.test.TestCase, parameterized.TestCase):
    def plain_jpeg(self, height, width, seed=0):
        """A JPEG whose every crop decodes to the same pixels: no chroma is shared by neighbours."""
        image = tf.io.decode_jpeg(jpeg(height, width, seed=seed))
        return tf.io.encode_jpeg(image, quality=95, chroma_downsampling=False)

    @parameterized.parameters((80, 120), (120, 80), (33, 400), (400, 33), (7, 5), (1, 1))
    def test_random_crop(self, height, width):
        data = self.plain_jpeg(height, width)
        pixels = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy().astype(np.float64)
        draws = uniforms(keys(0, np.arange(40, dtype=np.uint64)), decode.NUM_DRAWS)
        crop = tf.function(lambda d: decode.random_crop(data, d, 24))
        for draw in draws:
            top, left, h, w = reference_window((height, width), draw)
            expected = reference_resize(pixels[top : top + h, left : left + w], 24)
            expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
            actual = crop(draw)
            self.assertEqual(actual.dtype, tf.uint8)
            self.assertLess(np.abs(actual.numpy() - expected).max(), 0.51)  # the rounding

    def test_random_crops_are_as_the_source_says(self):
        draws = uniforms(keys(1, np.arange(4000, dtype=np.uint64)), decode.NUM_DRAWS)
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
        pixels = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE")
        top, left = (256 - side) // 2, (300 - side) // 2
        self.assertAllEqual(decode.central_crop(data, size), pixels[top : top + side, left : left + side])

    @parameterized.parameters((500, 375, 227, 333), (375, 500, 64, 328), (30, 60, 320, 30))
    def test_central_crop(self, height, width, size, side):
        data = self.plain_jpeg(height, width)
        pixels = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy().astype(np.float64)
        top, left = (height - side) // 2, (width - side) // 2
        expected = reference_resize(pixels[top : top + side, left : left + side], size)
        actual = decode.central_crop(data, size).numpy()
        self.assertLess(np.abs(actual - expected).max(), 0.51)

    def test_every_kind_of_jpeg_becomes_rgb(self):
        red = Image.new("RGB", (40, 30), (200, 30, 30))
        for mode, colour in (("RGB", (200, 30, 30)), ("CMYK", (200, 30, 30)), ("L", (81, 81, 81))):
            file = io.BytesIO()
            red.convert(mode).save(file, format="jpeg", quality=95)
            image = decode.central_crop(file.getvalue(), 16)
            self.assertEqual(image.shape, (16, 16, 3))
            self.assertAllClose(tf.cast(image, tf.float32), np.full((16, 16, 3), colour), atol=3)

    @parameterized.parameters(*range(1, 9))
    def test_turned_photographs_become_upright(self, turn):
        pixels = np.kron(np.random.default_rng(turn).integers(0, 255, (4, 6, 3)), np.ones((16, 16, 1)))
        tags = Image.Exif()
        tags[0x010F], tags[0x0112] = "a maker", turn
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", exif=tags, quality=98, subsampling=0)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
        for data in (file.getvalue(), little_endian(file.getvalue())):
            self.assertEqual(decode.orientation(data), turn)
            size = min(expected.shape[:2])
            top, left = ((n - round(size * 7 / 8)) // 2 for n in expected.shape[:2])
            square = expected[top : top + round(size * 7 / 8), left : left + round(size * 7 / 8)]
            self.assertAllEqual(decode.central_crop(data, 56), square)

    def test_a_thumbnail_turns_nothing(self):
        for first, second in ((1, 6), (6, 1)):
            tags = [bytes([0x12, 1, 3, 0, 1, 0, 0, 0, turn, 0]) for turn in (first, second)]
            self.assertEqual(decode.orientation(b"012345Exif" + tags[0] + bytes(20) + tags[1]), first)

    def test_damaged_tags_mean_no_turn(self):
        for data in (b"", b"Exif", b"012345Exif", b"012345Exif" + bytes([0x12, 1, 3, 0, 1, 0, 0, 0, 9, 0])):
            self.assertEqual(decode.orientation(data), 1)

    @parameterized.parameters("PNG", "BMP", "GIF")
    def test_other_formats(self, file_format):
        colours = np.array([[200, 30, 30], [30, 60, 90], [0, 255, 0]], np.uint8)
        pixels = np.kron(colours[np.random.default_rng(0).integers(0, 3, (4, 4))], np.ones((8, 8, 1), np.uint8))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, file_format)
        self.assertAllEqual(decode.central_crop(file.getvalue(), 28), pixels[2:30, 2:30])


class ImageFileDataTest(tf.test.TestCase, parameterized.TestCase):
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
        self.assertEqual(data._train.records.read(ids), [records[i] for i in ids])

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
        single = list(data.train_numpy(58, count=1))[0]
        images, labels, mask = (np.concatenate(parts) for parts in zip(*data.train_numpy(5, count=11), strict=True))
        self.assertAllEqual(images, single[0][:55])
        self.assertAllEqual(labels, single[1][:55])
        self.assertAllEqual(mask, np.ones(55))
        shards = [next(data.train_numpy(29, first=1, shard=(w, 29))) for w in (0, 7, 28)]
        for worker, (image, label, _) in zip((0, 7, 28), shards, strict=True):
            self.assertAllEqual(image[0], single[0][29 + worker])
            self.assertEqual(label[0], single[1][29 + worker])
        # In another epoch it looks different, but for the five images of one pixel.
        ids = data.train_ids(58)[0]
        first = single[0][:29][np.argsort(ids[:29])]
        second = single[0][29:][np.argsort(ids[29:])]
        self.assertGreaterEqual(sum((first != second).any((1, 2, 3))), 20)

    def test_without_augmentation_images_are_those_of_evaluation(self):
        data = self.load()
        images, labels, _ = next(data.train_numpy(29, augment=False))
        for i, image, label in zip(data.train_ids(29)[0], images, labels, strict=True):
            jpeg, expected = parse(data, data._train.records.read([i])[0])
            self.assertAllEqual(image, decode.central_crop(jpeg, 24))
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
            self.assertAllEqual(image, decode.central_crop(jpeg, 24))
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
        images, labels, mask = next(data.train_numpy(201))
        self.assertAllEqual(mask, np.ones(201))
        self.assertEqual(images.shape, (201, 227, 227, 3))
        ids = data.train_ids(201)[0]
        self.assertAllEqual(labels, [found[i][1] for i in ids])
        gray = [int(tf.image.extract_jpeg_shape(found[i][0])[2]) == 1 for i in ids]
        self.assertBetween(sum(gray), 1, 20)
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 1])
        self.assertAllEqual(images[gray][..., 0], images[gray][..., 2])
        self.assertAllInRange(images.mean((0, 1, 2)) - data.mean, -12, 12)
        self.assertEqual(sum(mask.sum() for _, _, mask in data.test_numpy(20)), 51)

    def test_pixels_are_those_of_pillow(self):
        """50 real JPEGs, cropped, resized and flipped, against Pillow and float64: within rounding.

        But for the two outermost pixels of a window, whose colours Pillow interpolates from pixels outside of it.
        """
        with tarfile.open(SHARED / "imagenet_manual" / "ILSVRC2012_img_val.tar") as archive:
            files = [archive.extractfile(member).read() for member in archive.getmembers()[:50]]
        self.assertLen(files, 50)
        model = models.get(
            "alexnet_bn", num_classes=2, input_shape=(227, 227, 3), mean=(123.675, 116.28, 103.53), std=58.0
        )
        normalize = keras.Model(model.inputs, model.get_layer("normalize").output)
        draws = uniforms(keys(5, np.arange(50, dtype=np.uint64)), decode.NUM_DRAWS)
        random_crop = tf.function(lambda file, draw: decode.random_crop(file, draw, 227))
        central_crop = tf.function(lambda file: decode.central_crop(file, 227))
        for file, draw in zip(files, draws, strict=True):
            pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")).astype(np.float64)
            top, left, h, w = reference_window(pixels.shape[:2], draw)
            expected = reference_resize(pixels[top : top + h, left : left + w], 227)
            expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
            self.check(random_crop(tf.constant(file), draw), expected, min(h, w))
            side = round(min(pixels.shape[:2]) * 227 / 256)
            top, left = ((n - side) // 2 for n in pixels.shape[:2])
            expected = reference_resize(pixels[top : top + side, left : left + side], 227)
            image = central_crop(tf.constant(file))
            self.check(image, expected, side)
            self.assertAllClose(
                normalize(image[None])[0],
                (image.numpy() - np.array([123.675, 116.28, 103.53])) / 58.0,
                rtol=1e-6,
                atol=1e-6,
            )

    def check(self, image, expected, side):
        error = np.abs(image.numpy() - expected)
        edge = 1 + -(-2 * 227 // side)
        self.assertLess(error[edge:-edge, edge:-edge].max(), 0.51)
        self.assertLess(error.mean(), 0.26)  # that of rounding is 0.25

    def test_cifar10(self):
        data = lars_keras.data.load("cifar10", data_dir=SHARED / "tfds")
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (50000, 10000, 10))
        self.assertEqual(data.image_shape, (32, 32, 3))
        self.assertAllClose(data.mean, (125.307, 122.950, 113.865), atol=1e-3)
        self.assertAllClose(data.std, (62.993, 62.089, 66.705), atol=1e-3)
        self.assertAllEqual(np.bincount(data._train[1]), np.full(10, 5000))
        with self.assertRaisesRegex(ValueError, "`image_size` of cifar10 is 32.*image_size=64"):
            lars_keras.data.load("cifar10", data_dir=SHARED / "tfds", image_size=64)


if __name__ == "__main__":
    tf.test.main()
