"""The order of training examples."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.data import shuffle
from lars_keras.data.keyed import keys
from tests.data.streams import small_arrays, train_ids


class ShuffleTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 5, 8, 37, 64, 100)
    def test_each_id_once_an_epoch_at_any_batch_size(self, batch_size):
        count = -(-5 * 37 // batch_size)
        ids = train_ids(small_arrays(), batch_size, count=count, seed=4).reshape(-1)[: 5 * 37].reshape(5, 37)
        self.assertAllEqual(np.sort(ids, axis=1), np.tile(np.arange(37), (5, 1)))
        self.assertLen(np.unique(ids, axis=0), 5)

    def test_the_stream_does_not_depend_on_the_batch_size(self):
        data = small_arrays()
        whole = train_ids(data, 240, seed=1).reshape(-1)
        for batch_size in (1, 3, 8, 48):
            ids = train_ids(data, batch_size, count=240 // batch_size, seed=1)
            self.assertAllEqual(ids.reshape(-1), whole)
        self.assertNotAllEqual(train_ids(data, 240, seed=2).reshape(-1), whole)

    def test_the_order_of_committed_results(self):
        """Results and checkpoints of earlier versions depend on these ids."""
        ids, epochs = shuffle.example_ids(np.arange(35, 40, dtype=np.uint64), 37, 1)
        self.assertAllEqual(epochs, [0, 0, 1, 1, 1])
        self.assertAllEqual(ids, [21, 12, 6, 29, 25])
        far = shuffle.example_ids(np.arange(10**12, 10**12 + 3, dtype=np.uint64), 1_281_167, 7)[0]
        self.assertAllEqual(far, [268615, 26770, 895724])

    def test_positions_far_away(self):
        n = 1_281_167
        positions = np.arange(10**15 // n * n, 10**15 // n * n + 1000, dtype=np.uint64)
        ids, epochs = shuffle.example_ids(positions, n, 0)
        self.assertAllEqual(epochs, np.full(1000, 10**15 // n))
        self.assertLen(set(ids), 1000)
        self.assertLess(ids.max(), n)
        self.assertGreater(ids.max(), 0.98 * n)

    @parameterized.parameters(1, 2, 3, 10, 450, 1024, 49_153)
    def test_permutation(self, n):
        """Contains every place once, with the same bits in NumPy and in TensorFlow."""
        places, key = np.arange(n, dtype=np.uint64), keys(5, np.full(n, 7, np.uint64))
        ids = shuffle.permute(places, key, n)
        self.assertAllEqual(np.sort(ids), places)
        self.assertAllEqual(shuffle.permute(tf.constant(places), tf.constant(key), n), ids)
        if n == 49_153:
            graph = tf.function(shuffle.permute)
            self.assertAllEqual(graph(tf.constant(places), tf.constant(key), n), ids)

    def test_permutations_are_like_random_ones(self):
        n, epochs = 60, 6000
        positions = np.arange(n * epochs, dtype=np.uint64)
        ids = shuffle.example_ids(positions, n, 3)[0].astype(int).reshape(epochs, n)
        self.assertLen(np.unique(ids, axis=0), epochs)
        # Each id is in each place equally often: (n - 1)^2 = 3481 degrees of freedom, standard deviation 83.
        counts = np.zeros((n, n))
        np.add.at(counts, (np.arange(n), ids), 1)
        self.assertBetween(((counts - epochs / n) ** 2 / (epochs / n)).sum(), 3481 - 4 * 83, 3481 + 4 * 83)
        # By chance, 2 (n - 1) / n pairs of neighbors stay neighbors in a permutation. So do pairs at any distance.
        for distance in (1, 7):
            steps = np.abs(ids[:, distance:] - ids[:, :-distance])
            expected = 2 * (n - 1) / (n * (n - 1)) * (n - distance)
            self.assertAllClose((steps == 1).sum(1).mean(), expected, rtol=0.05)
        # The order of an epoch does not predict that of the next.
        self.assertLess(abs(np.corrcoef(ids[:-1].reshape(-1), ids[1:].reshape(-1))[0, 1]), 0.01)


if __name__ == "__main__":
    tf.test.main()
