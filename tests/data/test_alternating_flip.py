"""Reflected shifts and alternating flips as functions of seed, epoch and example."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data import ArrayData
from lars_keras.data.augment import shift_flip
from lars_keras.data.keyed import keys, uniforms
from tests.data.streams import train_ids
from tests.pictures import pictures, small_pictures


class AlternatingFlipTest(tf.test.TestCase, parameterized.TestCase):
    def test_shift_flip(self):
        images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
        draws = np.array([[0.5, 0.5, 0.9], [0.0, 0.999, 0.9], [0.5, 0.5, 0.1]], np.float32)
        same, moved, flipped = shift_flip(images, draws)
        self.assertAllEqual(same, images[0])
        rows, columns = [2, 1, 0, 1, 2, 3], [2, 3, 4, 5, 4, 3]
        self.assertAllEqual(moved, images[1][rows][:, columns])
        self.assertAllEqual(flipped, images[2, :, ::-1])
        in_a_graph = tf.function(shift_flip)(tf.constant(images), tf.constant(draws))
        self.assertAllEqual(in_a_graph, [same, moved, flipped])

    def flips(self, data, seed, epochs):
        """Return whether each example was flipped, by epoch: the twin takes the shifts from the draws."""
        images = data._train[0]
        stream = data.train_numpy(40, count=epochs, seed=seed)
        found = np.zeros((epochs, 40), int)
        for epoch, (batch, _, _) in enumerate(stream):
            ids = train_ids(data, 40, first=epoch, seed=seed)[0]
            draws = uniforms(keys(seed, np.full(40, epoch, np.uint64), ids.astype(np.uint64)), 3)
            for k, image, (row, column, _) in zip(ids, batch, draws, strict=True):
                padded = np.pad(images[k], ((2, 2), (2, 2), (0, 0)), "reflect")
                cut = padded[int(row * 5) :, int(column * 5) :][:12, :12]
                if np.array_equal(image, cut[:, ::-1]):
                    found[epoch, k] = 1
                else:
                    self.assertAllEqual(image, cut)
        return found

    def test_every_image_is_flipped_every_other_epoch(self):
        found = self.flips(small_pictures("alternating_flip"), 3, 5)
        self.assertBetween(found[0].sum(), 10, 30)
        for epoch in range(1, 5):
            self.assertAllEqual(found[epoch], 1 - found[epoch - 1])
        self.assertNotAllEqual(found[0], self.flips(small_pictures("alternating_flip"), 4, 1)[0])

    def test_epoch_0_is_that_of_independent_draws(self):
        data = small_pictures("alternating_flip")
        ids = train_ids(data, 40, seed=5)[0].astype(np.uint64)
        draws = uniforms(keys(5, ids * np.uint64(0), ids), 3)
        images, *_ = next(data.train_numpy(40, seed=5))
        self.assertAllEqual(images, shift_flip(data._train[0][ids], draws))

    @parameterized.parameters((7, (0, 1)), (8, (1, 2)))
    def test_follows_from_seed_epoch_and_example(self, batch_size, shard):
        data = small_pictures("alternating_flip")
        whole = np.concatenate([images for images, *_ in data.train_numpy(40, count=3, seed=1)])
        rows = batch_size // shard[1]
        for first in (0, 9):
            options = {"first": first, "count": 5, "seed": 1, "shard": shard}
            parts = zip(data.train_numpy(batch_size, **options), data.train_batches(batch_size, **options), strict=True)
            for i, ((images, *_), (tensors, *_)) in enumerate(parts):
                start = (first + i) * batch_size + shard[0] * rows
                self.assertAllEqual(images, whole[start : start + rows])
                self.assertAllEqual(tensors, images)

    def test_refused_where_images_are_not_cropped(self):
        with self.assertRaisesRegex(ValueError, "x has no random crop and flip. Received: augment='alternating_flip'"):
            ArrayData("x", pictures(4), pictures(4), 4, augment="alternating_flip")
        with self.assertRaisesRegex(ValueError, "alternating_flip is for images in memory"):
            lars_keras.data.load("imagenet2012", augment="alternating_flip")
