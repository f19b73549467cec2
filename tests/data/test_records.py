"""Record files of tensorflow-datasets."""

import os

import tensorflow as tf

from lars_keras.data.records import TFRecords


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


if __name__ == "__main__":
    tf.test.main()
