"""Data sets held in memory: batches as tensors and as arrays, augmentation, and errors."""

import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data.arrays import _statistics
from tests.data.streams import small_arrays, train_ids


class ArrayDataTest(tf.test.TestCase, parameterized.TestCase):
    def test_tf_data_and_numpy_agree(self):
        data = small_arrays()
        options = {"first": 2, "count": 6, "seed": 9, "shard": (1, 2)}
        dataset = data.train_batches(10, **options)
        self.assertEqual([s.shape for s in dataset.element_spec], [(5, 8, 8, 3), (5,), (5,)])
        self.assertEqual([s.dtype for s in dataset.element_spec], [tf.uint8, tf.int32, tf.float32])
        for in_graph, in_numpy in (
            (dataset, data.train_numpy(10, **options)),
            (data.test_batches(10), data.test_numpy(10)),
        ):
            for a, b in zip(in_graph, in_numpy, strict=True):
                for x, y in zip(a, b, strict=True):
                    self.assertAllEqual(x, y)
                    self.assertEqual(x.dtype, y.dtype)

    def test_endless(self):
        self.assertEqual(small_arrays().train_batches(4).cardinality(), tf.data.INFINITE_CARDINALITY)

    @parameterized.parameters((1, 1), (7, 1), (23, 1), (64, 1), (8, 2), (20, 4), (64, 4))
    def test_every_test_image_exactly_once(self, batch_size, workers):
        data = small_arrays()
        shards = [list(data.test_batches(batch_size, shard=(w, workers))) for w in range(workers)]
        self.assertEqual({len(s) for s in shards}, {-(-23 // batch_size)})
        images = tf.concat([x for batch in zip(*shards, strict=True) for x, _, _ in batch], 0)
        labels = tf.concat([y for batch in zip(*shards, strict=True) for _, y, _ in batch], 0)
        mask = tf.concat([m for batch in zip(*shards, strict=True) for _, _, m in batch], 0)
        self.assertAllEqual(mask, np.arange(len(mask)) < 23)
        self.assertEqual(mask.dtype, tf.float32)
        self.assertAllEqual(images[:23], data._test[0])
        self.assertAllEqual(labels[:23], data._test[1])
        self.assertAllEqual(images[23:], tf.zeros_like(images[23:]))

    def test_restart_anywhere_gives_the_same_tail(self):
        data = small_arrays()
        whole = list(data.train_numpy(7, count=30, seed=3))
        for first in range(0, 30, 4):
            tail = list(data.train_numpy(7, first=first, count=30 - first, seed=3))
            self.assertLen(tail, 30 - first)
            for expected, got in zip(whole[first:], tail, strict=True):
                for a, b in zip(expected, got, strict=True):
                    self.assertAllEqual(a, b)

    def test_shards_merged_are_the_single_stream(self):
        data = small_arrays()
        single = list(data.train_numpy(24, count=5))
        for workers in (2, 3, 4):
            parts = [list(data.train_numpy(24, count=5, shard=(w, workers))) for w in range(workers)]
            for i, whole in enumerate(single):
                for j, expected in enumerate(whole):
                    self.assertAllEqual(np.concatenate([p[i][j] for p in parts]), expected)

    def test_an_example_looks_the_same_at_any_batch_size_and_shard(self):
        data = small_arrays()
        by_key = {}
        for batch_size, shard in ((37, (0, 1)), (5, (0, 1)), (8, (1, 2)), (8, (0, 2))):
            count = 74 // batch_size
            ids = train_ids(data, batch_size, count=count, shard=shard)
            rows = batch_size // shard[1]
            for i, (images, _, _) in enumerate(data.train_numpy(batch_size, count=count, shard=shard)):
                start = i * batch_size + shard[0] * rows
                for position, k, image in zip(range(start, 74), ids[i], images, strict=False):
                    key = (position // 37, int(k))
                    self.assertAllEqual(by_key.setdefault(key, image), image)
        self.assertLen(by_key, 74)
        changed = [not np.array_equal(by_key[0, k], by_key[1, k]) for k in range(37)]
        self.assertGreater(sum(changed), 30)

    def test_augmentation_can_be_switched_off(self):
        data = small_arrays()
        images, _, _ = next(data.train_numpy(37, augment=False))
        augmented, _, _ = next(data.train_numpy(37))
        self.assertAllEqual(images, data._train[0][train_ids(data, 37)[0]])
        self.assertNotAllEqual(images, augmented)

    def test_statistics(self):
        data = small_arrays()
        images = data._train[0].astype(np.float64)
        self.assertAllClose(data.mean, images.mean((0, 1, 2)), rtol=1e-12)
        self.assertAllClose(data.std, images.std((0, 1, 2)), rtol=1e-12)

    def test_the_fingerprint_is_that_of_the_contents(self):
        images, labels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8), np.arange(9)
        first = lars_keras.data.ArrayData("one", (images, labels), (images, labels), 9).fingerprint
        self.assertRegex(first, "^9 train and 9 test images in 9 classes, [0-9a-f]{16}$")
        turned = np.moveaxis(np.ascontiguousarray(np.moveaxis(images, 3, 0)), 0, 3)  # another order in memory
        other, swapped = images.copy(), labels[[1, 0, *range(2, 9)]]
        other[8, 3, 3, 2] ^= 1
        for same, train in ((True, (turned, labels)), (False, (other, labels)), (False, (images, swapped))):
            found = lars_keras.data.ArrayData("two", train, (images, labels), 9, description="other").fingerprint
            self.assertEqual(found == first, same)

    def test_arrays_need_neither_tensorflow_nor_tfds(self):
        program = """
import importlib, sys, types
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
package = types.ModuleType("lars_keras")  # without its __init__, which imports keras
package.__path__ = [sys.argv[1]]
sys.modules["lars_keras"] = package
data = importlib.import_module("lars_keras.data")
import numpy as np
split = np.full((9, 4, 4, 1), 255, np.uint8), np.arange(9)
arrays = data.ArrayData("x", split, split, 9, crop_flip=data.pad_crop_flip)
images, labels, mask = next(arrays.train_numpy(6))
assert images.shape == (6, 4, 4, 1) and len(set(labels)) == 6 and not images.all()
assert sum(mask.sum() for _, _, mask in arrays.test_numpy(6)) == 9
assert "keras" not in sys.modules
"""
        package = pathlib.Path(lars_keras.data.__file__).parents[1]
        subprocess.run([sys.executable, "-c", program, package], check=True)

    def test_mixed_in_memory(self):
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
        split = images, np.arange(20) % 4
        data = lars_keras.data.ArrayData("small", split, split, 4, augment="mixup")
        found, labels, _ = next(data.train_batches(10).as_numpy_iterator())
        self.assertEqual((found.shape, labels.shape), ((10, 8, 8, 3), (10, 4)))
        self.assertNotAllEqual(found, images[train_ids(data, 10)[0]])
        self.assertAllEqual(next(data.train_numpy(10))[0], found)
        plain, *_ = next(data.train_numpy(10, augment=False))
        self.assertAllEqual(plain, images[train_ids(data, 10)[0]])

    def test_statistics_take_little_memory(self):
        images = np.random.default_rng(0).integers(0, 256, (1024, 64, 64, 2), np.uint8)
        tracemalloc.start()
        found = _statistics(images)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 2 * images.nbytes)
        self.assertAllClose(found[0], [images[..., c].mean() for c in (0, 1)], rtol=1e-12)

    @parameterized.parameters(
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"batch_size": 6, "shard": (0, 4)}, "`batch_size`.*multiple.*batch_size=6"),
        ({"batch_size": 8, "shard": (2, 2)}, "`shard`.*shard=\\(2, 2\\)"),
        ({"batch_size": 8, "seed": -1}, "`seed`.*seed=-1"),
        ({"batch_size": 8, "first": -1}, "`first`.*first=-1"),
        ({"batch_size": 8, "count": -1}, "`count` must not be negative. Received: count=-1"),
    )
    def test_arguments(self, options, message):
        data = small_arrays()
        for method in (data.train_batches, data.train_numpy):
            with self.assertRaisesRegex(ValueError, message):
                method(**options)
        if options.keys() <= {"batch_size", "shard"}:
            for method in (data.test_batches, data.test_numpy):
                with self.assertRaisesRegex(ValueError, message):
                    method(**options)

    def test_arrays(self):
        images, labels = np.zeros((5, 4, 4, 1), np.uint8), np.arange(5)
        for train, message in (
            ((images.astype(np.float32), labels), "uint8.*Received: float32"),
            ((images[0], labels), "shape \\(4, 4, 1\\)"),
            ((images, labels[:4]), "labels of shape \\(5,\\).*\\(4,\\)"),
            ((images, labels + 6), "range\\(10\\).*6 to 10"),
            ((images, labels + 0.9), "integer labels. Received: float64"),
        ):
            with self.assertRaisesRegex(ValueError, f"^`train` must.*{message}"):
                lars_keras.data.ArrayData("x", train, (images, labels), 10)
            with self.assertRaisesRegex(ValueError, f"^`test` must.*{message}"):
                lars_keras.data.ArrayData("x", (images, labels), train, 10)
        with self.assertRaisesRegex(ValueError, r"`test` must have .* `train`, \(4, 4, 1\). Received: .* \(4, 3, 1\)"):
            lars_keras.data.ArrayData("x", (images, labels), (images[:, :, 1:], labels), 10)
        with self.assertRaisesRegex(ValueError, "`augment` must be one of none, .*Received: augment='mixupp'"):
            lars_keras.data.ArrayData("x", (images, labels), (images, labels), 10, augment="mixupp")
        with self.assertRaisesRegex(ValueError, "`augment` randaugment needs images of 3 channels, those of x have 1"):
            lars_keras.data.ArrayData("x", (images, labels), (images, labels), 10, augment="randaugment")


if __name__ == "__main__":
    tf.test.main()
