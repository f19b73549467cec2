"""The digits: their content, their split, and their preparation by several processes."""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from scipy import ndimage
from sklearn.datasets import load_digits

from lars_keras.data.digits import NUM_TRAIN, Digits, split_sources, warp
from lars_keras.data.locate import prepared_dir
from lars_keras.data.prepare import prepare
from tests import prepared
from tests.data.streams import train_ids


class WarpTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.digits = load_digits().images.astype(np.float32)

    def test_without_a_warp_is_the_cubic_enlargement(self):
        which = np.array([0, 5, 1796])
        expected = ndimage.zoom(
            self.digits[which].astype(np.float64),
            (1, 2, 2),
            order=3,
            mode="nearest",
            grid_mode=True,
        )
        expected = np.clip(expected * 255 / 16, 0, 255)
        actual = warp(self.digits, which)
        self.assertEqual((actual.shape, actual.dtype), ((3, 16, 16, 1), np.uint8))
        # Between the points of the 64x64 copy the interpolation is linear.
        self.assertLess(np.abs(actual[..., 0] - expected).mean(), 1.0)

    def test_warps_follow_the_seed_and_differ(self):
        which = np.zeros(64, int)
        once, again = (warp(self.digits, which, np.random.default_rng(3)) for _ in range(2))
        self.assertAllEqual(once, again)
        self.assertLen(np.unique(once.reshape(64, -1), axis=0), 64)

    def test_warps_keep_the_digit_in_place(self):
        which = np.arange(1797)
        plain = warp(self.digits, which).astype(np.float64)
        warped = warp(self.digits, which, np.random.default_rng(0)).astype(np.float64)
        # Same ink, but for what a shift pushes over the edge; same center on the average.
        self.assertBetween(warped.mean() / plain.mean(), 0.9, 1.0)
        grid = np.arange(16.0)
        for axis in (1, 2):
            ink = [x.sum(axis=(3 - axis, 3)) for x in (plain, warped)]
            centers = [(x @ grid) / x.sum(1) for x in ink]
            self.assertLess(abs((centers[1] - centers[0]).mean()), 0.1)
            self.assertBetween((centers[1] - centers[0]).std(), 0.5, 1.5)


class DigitsTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = prepared.digits_data()
        builder = tfds.builder_from_directory(os.path.join(prepared.digits(), "digits", "1.0.0"))
        cls.train, cls.test = (
            tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1)) for split in ("train", "test")
        )

    def test_no_test_digit_is_in_training_and_all_are_used(self):
        train, test = self.train, self.test
        sources = set(train["source"]), set(test["source"])
        self.assertEmpty(sources[0] & sources[1])
        self.assertEqual(sources[0] | sources[1], set(range(1797)))
        self.assertLen(test["source"], len(sources[1]))
        uses = np.bincount(train["source"])
        self.assertEqual(set(uses) - {0}, {36, 37})
        original = load_digits()
        for split in (train, test):
            self.assertAllEqual(split["label"], original.target[split["source"]])

    def test_test_split_is_stratified_and_untouched(self):
        test = self.test
        original = load_digits()
        share = np.bincount(test["label"]) / np.bincount(original.target)
        self.assertAllClose(share, np.full(10, 0.25), atol=0.005)
        plain = warp(original.images.astype(np.float32), test["source"])
        self.assertAllEqual(test["image"], plain)
        _, expected = split_sources(original.target)
        self.assertAllEqual(test["source"], expected)

    def test_training_images_follow_from_the_seed(self):
        train = self.train
        digits = load_digits().images.astype(np.float32)
        block = train["source"][:8192]
        expected = warp(digits, block, np.random.default_rng(1797))
        self.assertAllEqual(train["image"][:8192], expected)

    def test_another_process_that_is_faster_does_no_harm(self):
        generate = Digits._generate_examples
        with tempfile.TemporaryDirectory() as root:

            def overtaken(builder, digits, sources, random):
                final = os.path.join(root, "digits", "1.0.0")
                if not os.path.exists(final):
                    shutil.copytree(os.path.join(prepared.digits(), "digits", "1.0.0"), final)
                yield from generate(builder, digits, sources[:10], random)

            said = io.StringIO()
            with mock.patch.object(Digits, "_generate_examples", overtaken), contextlib.redirect_stdout(said):
                prepare("digits", root)
            self.assertRegex(said.getvalue(), r"\AMaking the digits data set in .*\n\Z")  # no word of a download
            splits = tfds.builder_from_directory(prepared_dir(pathlib.Path(root), "digits")).info.splits
            self.assertEqual((splits["train"].num_examples, splits["test"].num_examples), (NUM_TRAIN, 450))
            self.assertEqual(os.listdir(os.path.join(root, "digits")), ["1.0.0"])

    def test_load_has_what_the_builder_wrote(self):
        data = self.data
        self.assertEqual(data.image_shape, (16, 16, 1))
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (49152, 450, 10))
        train, test = self.train, self.test
        self.assertAllClose(data.mean, [train["image"].mean()], rtol=1e-12)
        self.assertAllClose(data.std, [train["image"].std(dtype=np.float64)], rtol=1e-9)
        images, labels, _ = next(data.train_numpy(512))
        ids = train_ids(data, 512)[0]
        self.assertAllEqual(images, train["image"][ids])
        self.assertAllEqual(labels, train["label"][ids])
        images, labels, mask = next(data.test_numpy(512))
        self.assertAllEqual(images[:450], test["image"])
        self.assertAllEqual(labels[:450], test["label"])
        self.assertEqual(mask.sum(), 450)


if __name__ == "__main__":
    tf.test.main()
