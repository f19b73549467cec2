"""Order, augmentation, in-memory data, and errors."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data import shuffle
from lars_keras.data.augment import pad_crop_flip
from lars_keras.data.keyed import keys, uniforms
from lars_keras.data.prepare import main

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def small_arrays(crop_flip=pad_crop_flip):
    """37 train and 23 test images whose pixels name them."""
    random = np.random.default_rng(0)

    def split(n):
        return random.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n) % 10

    return lars_keras.data.ArrayData("small", split(37), split(23), 10, crop_flip=crop_flip)


class OrderTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 5, 8, 37, 64, 100)
    def test_each_id_once_an_epoch_at_any_batch_size(self, batch_size):
        data = small_arrays()
        count = -(-5 * 37 // batch_size)
        ids = data.train_ids(batch_size, count=count, seed=4).reshape(-1)[: 5 * 37].reshape(5, 37)
        self.assertAllEqual(np.sort(ids, axis=1), np.tile(np.arange(37), (5, 1)))
        self.assertLen(np.unique(ids, axis=0), 5)

    def test_the_stream_does_not_depend_on_the_batch_size(self):
        data = small_arrays()
        whole = data.train_ids(240, seed=1).reshape(-1)
        for batch_size in (1, 3, 8, 48):
            ids = data.train_ids(batch_size, count=240 // batch_size, seed=1)
            self.assertAllEqual(ids.reshape(-1), whole)
        self.assertNotAllEqual(data.train_ids(240, seed=2).reshape(-1), whole)

    def test_restart_anywhere_gives_the_same_tail(self):
        data = small_arrays()
        whole = [x for x in data.train_numpy(7, count=30, seed=3)]
        for first in range(0, 30, 4):
            tail = list(data.train_numpy(7, first=first, count=30 - first, seed=3))
            self.assertLen(tail, 30 - first)
            for expected, got in zip(whole[first:], tail, strict=True):
                for a, b in zip(expected, got, strict=True):
                    self.assertAllEqual(a, b)

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
        """Every place once, the same bits in NumPy and in a TensorFlow graph."""
        places, key = np.arange(n, dtype=np.uint64), keys(5, np.full(n, 7, np.uint64))
        ids = shuffle.permuted(places, key, n)
        self.assertAllEqual(np.sort(ids), places)
        graph = tf.function(shuffle.permuted)
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
        # Neighbours stay neighbours 2 (n - 1) / n times a permutation by chance; so does every other distance.
        for distance in (1, 7):
            steps = np.abs(ids[:, distance:] - ids[:, :-distance])
            expected = 2 * (n - 1) / (n * (n - 1)) * (n - distance)
            self.assertAllClose((steps == 1).sum(1).mean(), expected, rtol=0.05)
        # An epoch's order says nothing of the next one's.
        self.assertLess(abs(np.corrcoef(ids[:-1].reshape(-1), ids[1:].reshape(-1))[0, 1]), 0.01)

    def test_shards_merged_are_the_single_stream(self):
        data = small_arrays()
        single = list(data.train_numpy(24, count=5))
        for workers in (2, 3, 4):
            parts = [list(data.train_numpy(24, count=5, shard=(w, workers))) for w in range(workers)]
            for i, whole in enumerate(single):
                for j, expected in enumerate(whole):
                    self.assertAllEqual(np.concatenate([p[i][j] for p in parts]), expected)


class AugmentTest(tf.test.TestCase):
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
        neighbours = np.corrcoef([per_example[0, :-1, 0], per_example[0, 1:, 0]])
        epochs = np.corrcoef(columns[5:])
        self.assertLess(abs(neighbours[0, 1]), 0.03)
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

    def test_an_example_looks_the_same_at_any_batch_size_and_shard(self):
        data = small_arrays()
        by_key = {}
        for batch_size, shard in ((37, (0, 1)), (5, (0, 1)), (8, (1, 2)), (8, (0, 2))):
            count = 74 // batch_size
            ids = data.train_ids(batch_size, count=count, shard=shard)
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
        self.assertAllEqual(images, data._train[0][data.train_ids(37)[0]])
        self.assertNotAllEqual(images, augmented)


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

    def test_statistics(self):
        data = small_arrays()
        images = data._train[0].astype(np.float64)
        self.assertAllClose(data.mean, images.mean((0, 1, 2)), rtol=1e-12)
        self.assertAllClose(data.std, images.std((0, 1, 2)), rtol=1e-12)

    def test_arrays_need_neither_tensorflow_nor_tfds(self):
        program = """
import importlib, sys, types
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
package = types.ModuleType("lars_keras")  # without its __init__, which imports keras
package.__path__ = [sys.argv[1]]
sys.modules["lars_keras"] = package
data = importlib.import_module("lars_keras.data")
import numpy as np
split = np.zeros((9, 4, 4, 1), np.uint8), np.arange(9)
arrays = data.ArrayData("x", split, split, 9)
images, labels, mask = next(arrays.train_numpy(6))
assert images.shape == (6, 4, 4, 1) and len(set(labels)) == 6
assert sum(mask.sum() for _, _, mask in arrays.test_numpy(6)) == 9
"""
        package = pathlib.Path(lars_keras.data.__file__).parents[1]
        subprocess.run([sys.executable, "-c", program, package], check=True)


class ErrorTest(tf.test.TestCase, parameterized.TestCase):
    def test_unknown_dataset(self):
        with self.assertRaisesRegex(ValueError, "'mnist'.*digits, cifar10, imagenet2012"):
            lars_keras.data.load("mnist")

    @parameterized.parameters("cifar10", "imagenet2012")
    def test_not_prepared(self, name):
        root = self.get_temp_dir()
        for data_dir in (root, os.path.join(root, "absent")):
            with self.assertRaises(FileNotFoundError) as caught:
                lars_keras.data.load(name, data_dir=data_dir)
            message = str(caught.exception)
            command = f"python -m lars_keras.data.prepare --dataset={name} --data_dir={data_dir}"
            self.assertIn(command, message)
            self.assertNotIn("\n", message)
            self.assertEqual("--manual_dir" in message, name == "imagenet2012")
        self.assertEmpty(os.listdir(root))

    def test_digits_where_nothing_can_be_written(self):
        file = os.path.join(self.get_temp_dir(), "file")
        pathlib.Path(file).touch()
        with self.assertRaisesRegex(ValueError, "cannot be written to.*--data_dir"):
            lars_keras.data.load("digits", data_dir=os.path.join(file, "data"))

    def test_prepare_without_the_archives(self):
        root = self.get_temp_dir()
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(["--dataset=imagenet2012", f"--data_dir={root}"])
        self.assertEqual(code, 2)
        self.assertRegex(errors.getvalue(), "ILSVRC2012_img_train.tar does not exist.*--manual_dir")
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as caught:
            main(["--dataset=mnist"])
        self.assertEqual(caught.exception.code, 2)

    @parameterized.parameters(
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"batch_size": 6, "shard": (0, 4)}, "`batch_size`.*multiple.*batch_size=6"),
        ({"batch_size": 8, "shard": (2, 2)}, "`shard`.*shard=\\(2, 2\\)"),
        ({"batch_size": 8, "seed": -1}, "`seed`.*seed=-1"),
        ({"batch_size": 8, "first": -1}, "`first`.*first=-1"),
    )
    def test_arguments(self, options, message):
        data = small_arrays()
        for method in (data.train_batches, data.train_numpy, data.train_ids):
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
        ):
            with self.assertRaisesRegex(ValueError, message):
                lars_keras.data.ArrayData("x", train, (images, labels), 10)
        with self.assertRaisesRegex(ValueError, "--augment=randaugment needs images of 3 channels, those of x have 1"):
            lars_keras.data.ArrayData("x", (images, labels), (images, labels), 10, augment="randaugment")


if __name__ == "__main__":
    tf.test.main()
