"""Crops of images against float64 and Pillow."""

import io
import tarfile
import unittest

import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from PIL import Image, ImageOps

from lars_keras.data import decode
from lars_keras.data.keyed import keys, uniforms
from tests.data.images import (
    SHARED,
    jpeg,
    little_endian,
    photographs,
    pillow_pixels,
    reference_resize,
    reference_window,
)


class CropTest(tf.test.TestCase, parameterized.TestCase):
    def plain_jpeg(self, height, width, seed=0):
        """Return a JPEG whose every crop decodes to the same pixels: no chroma is shared by neighbors."""
        image = tf.io.decode_jpeg(jpeg(height, width, seed=seed))
        return tf.io.encode_jpeg(image, quality=95, chroma_downsampling=False)

    def test_random_crop(self):
        draws = uniforms(keys(0, np.arange(40, dtype=np.uint64)), decode.NUM_DRAWS)
        crop = tf.function(lambda file, draw: decode.random_crop(file, draw, 24))
        for height, width in (80, 120), (120, 80), (33, 400), (400, 33), (7, 5), (1, 1):
            data = self.plain_jpeg(height, width)
            pixels = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy().astype(np.float64)
            for draw in draws:
                top, left, h, w = reference_window((height, width), draw)
                expected = reference_resize(pixels[top : top + h, left : left + w], 24)
                expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
                actual = crop(data, draw)
                self.assertEqual(actual.dtype, tf.uint8)
                self.assertLess(np.abs(actual.numpy() - expected).max(), 0.51, (height, width))  # the rounding

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
        for mode, color in (("RGB", (200, 30, 30)), ("CMYK", (200, 30, 30)), ("L", (81, 81, 81))):
            file = io.BytesIO()
            red.convert(mode).save(file, format="jpeg", quality=95)
            image = decode.central_crop(file.getvalue(), 16)
            self.assertEqual(image.shape, (16, 16, 3))
            self.assertAllClose(tf.cast(image, tf.float32), np.full((16, 16, 3), color), atol=3)

    def test_turned_photographs_become_upright(self):
        for turn in range(1, 9):
            with self.subTest(turn=turn):
                self.check_turned(turn)

    def check_turned(self, turn):
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

    @parameterized.parameters("PNG", "BMP", "GIF", "WEBP")
    def test_other_formats(self, file_format):
        colors = np.array([[200, 30, 30], [30, 60, 90], [0, 255, 0]], np.uint8)
        pixels = np.kron(colors[np.random.default_rng(0).integers(0, 3, (4, 4))], np.ones((8, 8, 1), np.uint8))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
        self.assertAllEqual(decode.central_crop(file.getvalue(), 28), pixels[2:30, 2:30])

    def test_other_formats_equal_pillow(self):
        """Compare files of all modes with Pillow's pixels: equal to the bit."""
        smooth = tf.io.decode_jpeg(jpeg(32, 45)).numpy()
        see_through = np.dstack([smooth, smooth[:, :, 0]])
        gif = {"save_all": True, "append_images": [Image.fromarray(255 - smooth)]}
        for file_format, image, options in (
            ("WEBP", Image.fromarray(smooth), {"quality": 40}),
            ("WEBP", Image.fromarray(smooth).convert("L"), {}),
            ("WEBP", Image.fromarray(see_through), {"quality": 80}),
            ("WEBP", Image.fromarray(see_through), {"lossless": True, "exact": True}),
            ("PNG", Image.fromarray(see_through), {}),
            ("PNG", Image.fromarray(smooth).quantize(9), {}),
            ("BMP", Image.fromarray(smooth).quantize(9), {}),
            ("BMP", Image.fromarray(smooth).quantize(256), {}),
            ("BMP", Image.fromarray(smooth).convert("L"), {}),
            ("BMP", Image.fromarray(see_through), {}),
            ("GIF", Image.fromarray(smooth), gif),
        ):
            file = io.BytesIO()
            image.save(file, file_format, **options)
            expected = pillow_pixels(file.getvalue())[2:30, 8:36]
            with self.subTest(file_format=file_format, mode=image.mode, **options):
                self.assertAllEqual(decode.central_crop(file.getvalue(), 28), expected)

    def test_files_that_tensorflow_reads_wrongly_are_refused(self):
        smooth = tf.io.decode_jpeg(jpeg(32, 45)).numpy()
        animated, bmp = io.BytesIO(), io.BytesIO()
        more = [Image.fromarray(255 - smooth)]
        Image.fromarray(smooth).save(animated, "WEBP", save_all=True, append_images=more)
        Image.fromarray(smooth).quantize(9).save(bmp, "BMP")
        compressed = bmp.getvalue()[:30] + b"\1" + bmp.getvalue()[31:]
        crop = tf.function(lambda file: decode.central_crop(file, 28))
        for file, reason in ((animated.getvalue(), "an animated WebP"), (compressed, "a compressed BMP")):
            with self.assertRaisesRegex(tf.errors.InvalidArgumentError, reason):
                crop(tf.constant(file))


class PillowTest(tf.test.TestCase):
    """Compare crops, resized and flipped, with those of Pillow's pixels in float64: equal within rounding.

    The two outermost pixels of a window differ, because Pillow interpolates their colors from pixels outside of it.
    """

    def test_photographs(self):
        files = list(photographs(64))
        for kind in (b"\xff\xc0", b"\xff\xc2"):  # baseline and progressive
            self.assertGreater(sum(kind in file for file in files), 9)
        self.check(files)

    @unittest.skipUnless(SHARED.is_dir(), "needs ../shared/data")
    def test_imagenet(self):
        with tarfile.open(SHARED / "imagenet_manual" / "ILSVRC2012_img_val.tar") as archive:
            files = [archive.extractfile(member).read() for member in archive.getmembers()[:50]]
        self.assertLen(files, 50)
        self.check(files)

    def check(self, files, size=227):
        draws = uniforms(keys(5, np.arange(len(files), dtype=np.uint64)), decode.NUM_DRAWS)
        random_crop = tf.function(lambda file, draw: decode.random_crop(file, draw, size))
        central_crop = tf.function(lambda file: decode.central_crop(file, size))
        for i, (file, draw) in enumerate(zip(files, draws, strict=True)):
            pixels = pillow_pixels(file)
            top, left, h, w = reference_window(pixels.shape[:2], draw)
            expected = reference_resize(pixels[top : top + h, left : left + w], size)
            expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
            self.check_pixels(random_crop(tf.constant(file), draw), expected, min(h, w), i)
            side = round(min(pixels.shape[:2]) * size / 256)
            top, left = ((n - side) // 2 for n in pixels.shape[:2])
            expected = reference_resize(pixels[top : top + side, left : left + side], size)
            self.check_pixels(central_crop(tf.constant(file)), expected, side, i)

    def check_pixels(self, image, expected, side, number):
        error = np.abs(image.numpy() - expected)
        edge = 1 + -(-2 * len(expected) // side)
        self.assertLess(error[edge:-edge, edge:-edge].max(), 0.51, f"file {number}")
        self.assertLess(error.mean(), 0.26, f"file {number}")  # the mean error of rounding is 0.25


if __name__ == "__main__":
    tf.test.main()
