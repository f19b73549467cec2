"""Hold-out validation."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import data as datasets
from lars_keras.data.digits import NUM_SOURCES
from lars_keras.data.subset import Subset, holdout
from tests import prepared
from tests.data.streams import train_ids


class Numbers:
    """Examples whose content and label are their number."""

    nbytes = 1000

    def __len__(self):
        return 10

    def example(self, i):
        return tf.strings.as_string(i), 2 * i

    def where(self, i):
        return f"number {i}"


class HoldoutTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((50_000, 0.1, 5000), (1000, 0.25, 250), (7, 0.5, 3))
    def test_every_image_is_on_one_side(self, count, share, expected):
        kept, apart = holdout(count, share)
        self.assertLen(apart, expected)
        self.assertAllEqual(np.sort(np.concatenate([kept, apart])), np.arange(count))
        # Evenly, so that a data set sorted by class gives the same fraction of each class.
        self.assertLessEqual(np.diff(apart).max() - np.diff(apart).min(), 1)

    def test_copies_of_an_original_stay_together(self):
        kept, apart = holdout(1000, 0.2, group=30)
        self.assertEmpty(set(kept % 30) & set(apart % 30))
        self.assertLen(set(apart % 30), 6)

    @parameterized.parameters((3, 0.1), (1, 0.5))
    def test_nothing_left(self, count, share):
        with self.assertRaisesRegex(ValueError, f"`validation_split` must.*Received: validation_split={share}"):
            holdout(count, share)

    def test_subset(self):
        some = Subset(Numbers(), np.array([3, 8]))
        self.assertEqual((len(some), some.where(1), some.nbytes), (2, "number 8", 200))
        image, label = tf.function(some.example)(tf.constant(1, tf.int64))
        self.assertEqual((image.numpy(), label.numpy()), (b"8", 16))

    def test_digits(self):
        """Validation scores training digits. No warp of them is trained on."""
        whole = prepared.digits_data()
        data = datasets.load("digits", data_dir=prepared.digits(), validation_split=0.1)
        self.assertEqual(data.num_train + data.num_test, whole.num_train)
        kept, apart = holdout(whole.num_train, 0.1, NUM_SOURCES)
        for batches, ids in ((data.test_numpy(data.num_test), apart), (data.train_numpy(64, count=1), None)):
            images, labels, mask = next(iter(batches))
            ids = kept[train_ids(data, 64)[0]] if ids is None else ids
            self.assertAllEqual(images, whole._train[0][ids])
            self.assertAllEqual(labels, whole._train[1][ids])
            self.assertAllEqual(mask, np.ones(len(ids)))


if __name__ == "__main__":
    tf.test.main()
