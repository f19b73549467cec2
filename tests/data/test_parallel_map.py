"""Parallel maps over rows."""

import collections
import threading

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.data.parallel_map import map_rows


class MapRowsTest(tf.test.TestCase, parameterized.TestCase):
    def in_python(self, function):
        return lambda i: tf.ensure_shape(tf.numpy_function(function, [i], tf.int64), [])

    @parameterized.parameters(1, 3, None)
    def test_rows_that_fail_take_the_fallback(self, threads):
        replaced = []

        def function(i):
            if i % 5 == 3:
                raise ValueError
            return 10 * i

        def fallback(i):
            replaced.append(int(i))
            return -i

        rows = np.arange(40)
        found = map_rows(self.in_python(function), (tf.constant(rows),), threads, self.in_python(fallback))
        self.assertAllEqual(found, np.where(rows % 5 == 3, -rows, 10 * rows))
        self.assertCountEqual(replaced, rows[rows % 5 == 3])

    def test_rows_are_mapped_again_at_the_same_time(self):
        calls = collections.Counter()
        meet = threading.Barrier(2)

        def function(i):
            calls[int(i)] += 1
            if i == 0:
                raise ValueError
            if calls[int(i)] == 2:
                meet.wait(60)  # for the other row; breaks if that comes only afterwards
            return 10 * i

        found = map_rows(self.in_python(function), (tf.range(3, dtype=tf.int64),), 3, self.in_python(lambda i: -1 - i))
        self.assertAllEqual(found, [-1, 10, 20])


if __name__ == "__main__":
    tf.test.main()
