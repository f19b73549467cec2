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
        contents = 2 * [b"one", b"", b"three" * 1000]
        self.assertEqual(list(records.dataset().as_numpy_iterator()), contents)
        for i in (5, 0, 1, 2):
            self.assertEqual(records.record(i).numpy(), contents[i])

    def test_a_changed_byte_is_told(self):
        with open(self.path, "r+b") as file:
            file.seek(12)
            self.assertEqual(file.read(3), b"one")
            file.seek(12)
            file.write(b"two")
        records = TFRecords([self.path], [3])
        with self.assertRaisesRegex(tf.errors.DataLossError, "corrupted record at 12"):
            list(records.dataset().as_numpy_iterator())
        with self.assertRaisesRegex(tf.errors.DataLossError, "corrupted record at 12"):
            records.record(0)

    def test_a_truncated_file_is_named(self):
        size = os.path.getsize(self.path)
        for new_size in (size - 1, size - 4, size - 4990, 30):
            os.truncate(self.path, new_size)
            with self.assertRaisesRegex(ValueError, "a.tfrecord is damaged"):
                TFRecords([self.path], [3])

    def test_a_file_that_lacks_records_is_named(self):
        with self.assertRaisesRegex(ValueError, "a.tfrecord holds 3 records.* says 4"):
            TFRecords([self.path], [4])

    def test_a_file_that_shrinks_or_vanishes(self):
        records = TFRecords([self.path], [3])
        os.truncate(self.path, 100)
        with self.assertRaisesRegex(tf.errors.DataLossError, "truncated record at 35"):
            records.record(2)
        os.remove(self.path)
        with self.assertRaisesRegex(tf.errors.NotFoundError, "a.tfrecord"):
            records.record(0)


if __name__ == "__main__":
    tf.test.main()
