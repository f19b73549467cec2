"""Batches of any size become the micro-batches of hosts and replicas, from NumPy as from `tf.data`."""

import functools
import itertools
import os
import threading
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer, batch_data, inputs, sources
from lars_keras.training.inputs import InputContext, TensorSpec
from lars_keras.training.tensorflow import inputs as tensorflow_inputs
from tests import step_cases as cases
from tests.data.streams import small_arrays


def numbers(n, size):
    """Return the numbers below `n` as `(x, y)` batches of NumPy arrays."""
    x = np.arange(n, dtype="float32")
    return [(x[i : i + size, None], x[i : i + size]) for i in range(0, n, size)]


def dataset(batches):
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(len(batches[0][0]))


def listed(batches):
    """Return the arrays of batches as lists."""
    return [[part.tolist() for part in batch] for batch in batches]


class Numbers:
    """The numbers below `n` in batches by index; remembers which were read, and whether threads did it."""

    def __init__(self, n, size):
        self.batches, self.read, self.threads = numbers(n, size), [], set()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        self.read.append(index)
        self.threads.add(threading.current_thread().name.split("_")[0])
        return self.batches[index]


class MapDataset(Numbers):
    """Batches of Grain by index."""


MapDataset.__module__ = "grain._src.python.dataset.dataset"


class HostsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((1, 0, 2, 3), (2, 0, 2, 3), (2, 1, 4, 1), (3, 2, 3, 2))
    def test_training_as_tf_data(self, hosts, host, replicas, accumulation_steps):
        """Hosts read the same data, and each keeps its part, from any update on, across the end of the data."""
        context = InputContext(hosts, host, replicas)
        batches = numbers(23, 5)
        for first_update in (0, 2):
            arguments = (context, 2, accumulation_steps, first_update)
            expected = tensorflow_inputs.numpy_training_batches(dataset(batches), *arguments, updates=20)
            actual = inputs.training_batches(batches, *arguments)
            self.assertEqual(listed(itertools.islice(actual, 20)), listed(itertools.islice(expected, 20)))

    @parameterized.parameters((1, 0, 2, 23), (2, 0, 2, 23), (2, 1, 4, 23), (2, 1, 2, 1), (1, 0, 1, 24))
    def test_scoring_as_tf_data(self, hosts, host, replicas, n):
        context = InputContext(hosts, host, replicas)
        batches = numbers(n, 5)
        expected = tensorflow_inputs.numpy_scoring_batches(dataset(batches), context, 3)
        self.assertEqual(listed(inputs.scoring_batches(batches, context, 3)), listed(expected))

    def test_hosts_score_every_example_once(self):
        seen = []
        for host in range(2):
            for x, _, weight in inputs.scoring_batches(numbers(23, 5), InputContext(2, host, 4), 3):
                self.assertEqual((x.shape, weight.dtype), ((6, 1), np.float32))
                seen += x[weight > 0, 0].tolist()
        self.assertCountEqual(seen, range(23))

    def test_a_function_gives_a_host_its_own(self):
        """It is told which host asks, and from which update on; its batches are not divided again."""
        asked = []

        def feed(context, *first_update):
            asked.append((context.input_pipeline_id, *first_update))
            return iter(numbers(12, 5))

        context = InputContext(2, 1, 4)
        batches = list(inputs.training_batches(feed, context, 2, 3, 7))
        self.assertEqual([x[:, 0].tolist() for x, _ in batches], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
        batches = list(inputs.scoring_batches(feed, context, 4))
        self.assertEqual([weight.tolist() for *_, weight in batches], [[1.0] * 8, [1.0] * 4 + [0.0] * 4])
        self.assertEqual(asked, [(1, 7), (1,)])

    def test_weights_are_kept(self):
        batches = [(x, y, np.full(len(x), 0.5)) for x, y in numbers(5, 5)]
        ((_, _, weight),) = inputs.scoring_batches(batches, InputContext(2, 0, 2), 8)
        self.assertEqual(weight.tolist(), [0.5] * 5 + [0.0] * 3)

    def test_padding_is_a_copy_of_a_real_example(self):
        """Zeros may give a NaN, which no weight of 0 takes back."""
        for batches in (inputs.scoring_batches, tensorflow_inputs.numpy_scoring_batches):
            data = dataset(numbers(5, 5)) if batches is tensorflow_inputs.numpy_scoring_batches else numbers(5, 5)
            data = (
                data.map(lambda x, y: (x + 3, y))
                if isinstance(data, tf.data.Dataset)
                else [(data[0][0] + 3, data[0][1])]
            )
            ((x, y, weight),) = batches(data, InputContext(2, 0, 2), 8)
            self.assertEqual(x[:, 0].tolist(), [3, 4, 5, 6, 7, 3, 3, 3])
            self.assertEqual(y.tolist(), [0, 1, 2, 3, 4, 0, 0, 0])
            self.assertEqual(weight.tolist(), [1.0] * 5 + [0.0] * 3)

    def test_replicas_score_every_example_once(self):
        """Also where the number of examples is static, and none is left for some replicas in the last step."""
        strategy, x = cases.strategy("mirrored2"), np.arange(12.0, dtype="float32")[:, None]
        for parts in ((x,), (x, x), (x, None), (x, x, None), ({"a": x, "b": x}, x)):
            static = tf.data.Dataset.from_tensor_slices(parts).batch(4, drop_remainder=True)
            for data in (static, lambda context, static=static: static):
                seen = []
                for batch in tensorflow_inputs.scoring_batches(data, strategy, 4):
                    for part in strategy.experimental_local_results(keras.tree.flatten(batch)[0]):
                        seen += part[:, 0].numpy().tolist()
                self.assertEqual(seen, [*range(12)])

    def test_a_single_host_pads_nothing(self):
        for batches in (inputs.scoring_batches, tensorflow_inputs.numpy_scoring_batches):
            data = numbers(5, 5) if batches is inputs.scoring_batches else dataset(numbers(5, 5))
            self.assertEqual([len(x) for x, _ in batches(data, InputContext(1, 0, 2), 2)], [4, 1])


class MemoryTest(parameterized.TestCase, tf.test.TestCase):
    def test_arrays_of_a_user_are_left_alone(self):
        """TensorFlow computes in the memory of arrays that a generator gives it: it gets copies."""
        y = np.ones((16, 4), "float32")
        given = unittest.mock.Mock(side_effect=tf.data.Dataset.from_generator)
        for data in ([(y,)], iter([(y,)])):
            with unittest.mock.patch.object(tf.data.Dataset, "from_generator", given):
                tensorflow_inputs.as_dataset(data)
            (array,) = next(given.call_args.args[0]())
            self.assertAllEqual(array, y)
            self.assertFalse(np.shares_memory(array, y))

    def test_what_is_copied(self):
        """Copy only examples that wait for those of the next batch; all batches are in the same memory."""
        memory = np.zeros(6, np.float32)

        def batches():
            for i in range(4):
                memory[:] = np.arange(6 * i, 6 * i + 6)
                yield (memory,)

        found = []
        for (x,) in inputs.rebatch(batches(), 4, drop_remainder=True):
            found.append((x.tolist(), np.shares_memory(x, memory)))
        values = np.arange(24).reshape(-1, 4).tolist()
        self.assertEqual(found, list(zip(values, [True, False, True, True, False, True], strict=True)))

    @parameterized.parameters("uint8", "float32", "int64", "S3")
    def test_copies_are_aligned(self, dtype):
        """XLA would copy other memory once more."""
        memory = np.arange(99).astype(dtype)
        for start in range(3):
            x, nothing, empty = inputs.copied((memory[start::3], None, memory[:0]))
            np.testing.assert_array_equal(x, memory[start::3])
            self.assertEqual((x.ctypes.data % 64, x.dtype, nothing), (0, memory.dtype, None))
            self.assertFalse(np.shares_memory(x, memory))
            self.assertEqual(empty.shape, (0,))


class ByIndexTest(parameterized.TestCase, tf.test.TestCase):
    """Read on each host those batches by index that hold its own examples."""

    def feed(self, data, seed=None, workers=1, endless=False):
        source = batch_data.Indexed(data, None if endless else len(data), "PyDataset")
        data.read.clear()
        return batch_data.IndexedFeed(source, seed, batch_size=64, microbatch_size=4, workers=workers)

    def first(self, feed, context, update, count):
        rows = itertools.chain.from_iterable(x[:, 0].tolist() for x, _ in feed(context, update))
        return list(itertools.islice(rows, count))

    @parameterized.parameters(1, 3)
    def test_nothing_else_is_read(self, workers):
        data = Numbers(256, 4)
        self.assertLen(data, 64)
        rows = self.first(self.feed(data, workers=workers), InputContext(16, 3, 16), 0, 16)
        self.assertEqual(rows, [64 * block + i for block in range(4) for i in range(12, 16)])
        self.assertEqual(sorted(data.read), [3, 19, 35, 51])

    @parameterized.parameters(
        (256, 4, None), (256, 4, 7), (250, 6, 7), (250, 6, None), (300, 100, 1), (40, 9, 3), (21, 8, 3), (256, 64, 1)
    )
    def test_same_examples_as_if_all_were_read(self, n, size, seed):
        """Keep the order of one host, from any update on, across the ends of epochs, shortened ones too."""
        data = Numbers(n, size)
        for feed in (self.feed(data, seed), self.feed(data, seed).first(n - 1), self.feed(data, seed, workers=2)):
            whole = np.array(self.first(feed, InputContext(1, 0, 16), 0, 64 * 8)).reshape(8, 16, 4)
            for hosts, host, update in ((16, 3, 0), (16, 15, 5), (2, 1, 1), (4, 0, 3)):
                expected = whole[update:, host * 16 // hosts : (host + 1) * 16 // hosts].flatten().tolist()
                self.assertEqual(self.first(feed, InputContext(hosts, host, 16), update, len(expected)), expected)

    def test_without_an_end(self):
        data = Numbers(64 * 12, 6)
        feed = self.feed(data, endless=True)
        expected = [64 * update + i for update in range(5, 11) for i in range(20, 24)]
        self.assertEqual(self.first(feed, InputContext(16, 5, 16), 5, 24), expected)
        self.assertLess(len(data.read), 13)

    def test_batches_of_other_sizes(self):
        """Hosts still divide the examples of an epoch among them."""
        data = Numbers(256, 4)
        data.batches[7], data.batches[20] = numbers(2, 4)[0], numbers(9, 9)[0]
        expected = np.concatenate([x[:, 0] for x, _ in data.batches])
        seen = []
        with unittest.mock.patch.object(batch_data.logging, "log_first_n") as warned:
            for host in range(16):
                count = 16 - 2 * (host == 7) + 5 * (host == 4)
                seen += self.first(self.feed(data), InputContext(16, host, 16), 0, count)
        self.assertCountEqual(seen, expected.tolist())
        self.assertEqual({call.args[3] for call in warned.call_args_list}, {7, 20})

    def test_threads_read_grain(self):
        with unittest.mock.patch.object(os, "cpu_count", return_value=8):
            data = MapDataset(256, 4)
            feed = sources.training_data(data, batch_size=64, microbatch_size=4)
        data.threads.clear()
        self.assertEqual(self.first(feed, InputContext(1, 0, 16), 0, 600), [*range(256), *range(256), *range(88)])
        self.assertEqual(data.threads, {"read"})
        data.batches[9] = None  # a batch that cannot be read
        with self.assertRaisesRegex(ValueError, "A batch must be"):
            self.first(feed, InputContext(1, 0, 16), 0, 600)


class EndTest(tf.test.TestCase):
    def test_an_epoch_ends_at_once(self):
        """The end of a tuned iterator waits for as long as it was in use."""
        batches = [(np.zeros((4, 2), "float32"), np.zeros(4))] * 3
        arrays = tensorflow_inputs.ghost_batches(batches, InputContext(1, 0, 1), 4, 1, 0, 1)
        images = small_arrays().train_batches(4)
        ghosts = tensorflow_inputs.ghost_batches(lambda *_: images, InputContext(1, 0, 1), 4, 1, 0, 1)
        for dataset in (arrays, ghosts):
            self.assertIs(dataset.options().autotune.enabled, False)


class SpecTest(tf.test.TestCase):
    def test_shapes_and_dtypes(self):
        expected = (TensorSpec((None, 1), "float32"), TensorSpec((None,), "float32"))
        for data in (numbers(5, 2), dataset(numbers(5, 2)), lambda *_: iter(numbers(5, 2))):
            self.assertEqual(inputs.element_spec(data, InputContext(), 0), expected)

    def test_what_is_refused(self):
        for data, message in (([], "at least one batch"), (iter(numbers(5, 2)), "again and again"), (5, "int")):
            with self.assertRaisesRegex(ValueError, message):
                inputs.element_spec(data, InputContext())
        for data, message in (([], "at least one batch"), (iter(()), "at least one batch"), (5, "int")):
            with self.assertRaisesRegex(ValueError, message):
                tensorflow_inputs.as_dataset(data)


class NumpyTest(parameterized.TestCase, tf.test.TestCase):
    """`Trainer` on TensorFlow takes NumPy batches, too."""

    @classmethod
    @functools.cache
    def expected(cls):
        """Return the weights after the same updates from a `tf.data.Dataset`."""
        trainer, _ = cases.trained(cases.hidden, cases.OPTIMIZERS["lars"], microbatch_size=16)
        return trainer.model.get_weights()

    @parameterized.parameters("none", "mirrored2")
    def test_same_update_from_numpy(self, strategy):
        x, y = cases.examples()
        batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)]
        for data in (batches, lambda context, first_update: itertools.chain.from_iterable(itertools.repeat(batches))):
            keras.utils.set_random_seed(1)
            with cases.strategy(strategy).scope():
                model = cases.hidden()
                model.compile(
                    cases.OPTIMIZERS["lars"](),
                    keras.losses.CategoricalCrossentropy(from_logits=True),
                    weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
                )
            trainer = Trainer(model, batch_size=cases.BATCH, microbatch_size=16)
            trainer.fit(data, epochs=1, steps_per_epoch=None if data is batches else cases.UPDATES, verbose=0)
            self.assertEqual(trainer.position.update, cases.UPDATES)
            for actual, value in zip(model.get_weights(), self.expected(), strict=True):
                self.assertAllClose(actual, value, rtol=1e-5, atol=1e-7)
            for test in (batches, lambda context: iter(batches)):
                self.assertEqual(trainer.evaluate(test)["n"], len(x))


if __name__ == "__main__":
    tf.test.main()
