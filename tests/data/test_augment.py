"""Random numbers and augmentation."""

import functools
import sys
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data.augment import mix_pairs, pad_crop_flip
from lars_keras.data.keyed import keys, uniforms
from tests import prepared


class AugmentTest(tf.test.TestCase, parameterized.TestCase):
    def test_the_numbers_of_committed_results(self):
        """Results and checkpoints of earlier versions depend on these draws."""
        draws = uniforms(keys(1, np.array([3], np.uint64), np.array([5], np.uint64)), 3)
        self.assertAllEqual(draws * 2**24, [[4047589, 7001891, 7942295]])

    def test_uniforms_are_keyed_by_seed_epoch_and_id(self):
        ids, epochs = np.arange(50_000, dtype=np.uint64), np.full(50_000, 3, np.uint64)
        draws = uniforms(keys(7, epochs, ids), 4)
        shuffled = np.random.default_rng(0).permutation(50_000)
        self.assertAllEqual(uniforms(keys(7, epochs, ids[shuffled]), 4), draws[shuffled])
        self.assertAllEqual(uniforms(keys(7, epochs[:1], ids[5:6]), 4), draws[5:6])
        for other in (keys(8, epochs, ids), keys(7, epochs + np.uint64(1), ids), keys(7, ids, epochs)):
            self.assertLess(np.mean(uniforms(other, 4) == draws), 1e-3)
        self.assertAllEqual(uniforms(keys(7, tf.constant(epochs), tf.constant(ids)), 4), draws)

    def test_uniforms_are_uniform_and_independent(self):
        epochs, ids = np.divmod(np.arange(100_000, dtype=np.uint64), np.uint64(20_000))
        draws = uniforms(keys(0, epochs, ids), 3)
        self.assertEqual(draws.dtype, np.float32)
        self.assertAllInRange(draws, 0, 1, open_upper_bound=True)
        for column in draws.T:  # 99.99 % point of chi-squared with 63 degrees of freedom: 116
            counts = np.histogram(column, 64, (0, 1))[0]
            self.assertLess(((counts - 1e5 / 64) ** 2 / (1e5 / 64)).sum(), 116)
        per_example = draws.reshape(5, 20_000, 3)
        columns = [*draws.reshape(5, -1), *per_example[:, :, 0]]
        self.assertLess(abs(np.corrcoef(draws.T)[np.triu_indices(3, 1)]).max(), 0.015)
        neighbors = np.corrcoef([per_example[0, :-1, 0], per_example[0, 1:, 0]])
        epochs = np.corrcoef(columns[5:])
        self.assertLess(abs(neighbors[0, 1]), 0.03)
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
        in_a_graph = tf.function(pad_crop_flip)(tf.constant(images[:4]), tf.constant(draws))
        self.assertAllEqual(in_a_graph, [same, flipped, up, down])

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
        neighbor = np.arange(n) ^ 1
        self.assertAllClose(soft.sum(1), np.ones(n))
        other = labels != labels[neighbor]
        share = soft[np.arange(n), labels]
        self.assertAllEqual(share[6:8], [1, 1])  # what cannot be read mixes with nothing
        self.assertAllEqual(mixed[6:8], images[6:8])
        for i in np.flatnonzero(other):
            self.assertAllClose(soft[i, labels[neighbor[i]]], 1 - share[i], atol=1e-6)
            a, b = images[i].astype(np.float64), images[neighbor[i]].astype(np.float64)
            if kind == "mixup":
                self.assertAllClose(mixed[i], share[i] * a + (1 - share[i]) * b, atol=0.501)
            else:
                own = (mixed[i] == images[i]).all(-1)
                self.assertAllClose(own.mean(), share[i], atol=1e-6)
                self.assertAllEqual(mixed[i][~own], images[neighbor[i]][~own])
                rows, columns = np.flatnonzero(~own.all(1)), np.flatnonzero(~own.all(0))
                if len(rows):  # the covered part is one box
                    self.assertFalse(own[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].any())
        # Beta(0.2, 0.2) has variance 0.25 / 1.4. Of a box of side s a mean of (s - s^2/4)^2 is inside, s^2 uniform.
        if kind == "mixup":
            self.assertAllClose((share[other].mean(), share[other].std()), (0.5, (0.25 / 1.4) ** 0.5), atol=0.05)
        else:
            self.assertAllClose(1 - share[other].mean(), 1 / 2 - 1 / 5 + 1 / 48, atol=0.03)


class ImageFilesTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = prepared.imagenet()

    @classmethod
    def load(cls, augment):
        return lars_keras.data.load("imagenet2012", data_dir=cls.root, image_size=24, augment=augment)

    @classmethod
    @functools.cache
    def examples(cls, augment):
        """Return images and labels of two batches of 32."""
        batches = cls.load(augment).train_batches(32, count=2).as_numpy_iterator()
        return [np.concatenate(part) for part in list(zip(*batches, strict=True))[:2]]

    @parameterized.parameters("randaugment", "mixup")
    def test_follows_from_seed_epoch_and_example(self, augment):
        images, labels = self.examples(augment)
        plain, _ = self.examples("crop_flip")
        self.assertGreater((images != plain).any((1, 2, 3)).sum(), 25)
        # Other batches, and one of two workers.
        again, labels_again, _ = next(self.load(augment).train_batches(48, shard=(1, 2)).as_numpy_iterator())
        self.assertAllEqual(again, images[24:48])
        self.assertAllEqual(labels_again, labels[24:48])

    def test_pixels_do_not_follow_the_precision_of_the_model(self):
        images, _ = self.examples("randaugment")
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        keras.config.set_dtype_policy("mixed_float16")
        again, *_ = next(self.load("randaugment").train_batches(48).as_numpy_iterator())
        self.assertAllEqual(again, images[:48])

    def test_none_is_the_central_crop(self):
        images, labels, _ = next(self.load("none").train_batches(30).as_numpy_iterator())
        bare, bare_labels, _ = next(self.load("mixup").train_batches(30, augment=False).as_numpy_iterator())
        self.assertAllEqual(images, bare)
        self.assertAllEqual(labels, bare_labels)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "mixup mixes images in pairs.*batch_size=10, shard=\\(1, 2\\)"):
            self.load("mixup").train_batches(10, shard=(1, 2))
        with self.assertRaisesRegex(ValueError, "`augment` must be one of none, crop_flip.*Received: augment='blur'"):
            self.load("blur")
        with self.assertRaisesRegex(ValueError, "digits has no random crop and flip"):
            with prepared.without_decoding():
                lars_keras.data.load("digits", data_dir=prepared.digits(), augment="crop_flip")
        with unittest.mock.patch.dict("sys.modules", {"keras_cv": None}):
            sys.modules.pop("lars_keras.data.randaugment", None)
            with self.assertRaisesRegex(ValueError, "`augment` randaugment needs keras-cv"):
                self.load("randaugment")


if __name__ == "__main__":
    tf.test.main()
