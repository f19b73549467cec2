"""Batches by index, generators and loaders: their threads, hooks and sizes.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import threading

import numpy as np
import tensorflow as tf

from lars_keras.training import batch_data, inputs
from lars_keras.training.given_data import GivenData
from lars_keras.training.inputs import InputContext
from tests.training.test_data_forms import DataLoader, Files, W, X, Y, batches, feed_of, generator, trainer_of


class Watched(Files):
    """Batches that note the threads which read them, and the hooks that are called."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.threads, self.hooks = set(), []

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name.split("_")[0])
        return super().__getitem__(index)

    def on_epoch_begin(self):
        self.hooks.append("begin")

    def on_epoch_end(self):
        self.hooks.append("end")


class PyDatasetTest(tf.test.TestCase):
    def test_threads(self):
        data = Watched(8, workers=3)
        feed = feed_of(data)
        data.threads.clear()  # the first batch was looked at
        next(iter(feed(InputContext(), 0)))
        self.assertEqual(data.threads, {"read"})

    def test_hooks(self):
        data, trainer = Watched(8), trainer_of()
        trainer.evaluate(data)
        self.assertEqual(data.hooks, ["begin", "end"])
        data.hooks.clear()
        trainer.fit(data, epochs=2, verbose=0)
        self.assertEqual(data.hooks[:3], ["begin", "end", "begin"])

    def test_class_weights_need_batches_without_weights(self):
        with self.assertRaisesRegex(ValueError, "needs batches of .*Received: batches of length 3"):
            batch_data.Indexed(batches(10, X, Y, W), 4, "PyDataset", {0: 1.0})


class GeneratorTest(tf.test.TestCase):
    def test_it_goes_on_where_it_is(self):
        feed = feed_of(generator())
        read = feed(InputContext(), 0)
        for _ in range(3):
            next(read)
        with self.assertLogs(level="WARNING") as logs:
            x, _ = next(feed(InputContext(), 2))
        self.assertIn("cannot go back to the examples of update 2", logs.output[0])
        self.assertAllEqual(x, batches()[3][0])


class SizesTest(tf.test.TestCase):
    def test_a_list_without_its_last_partial_update(self):
        given = GivenData(batch_size=8, microbatch_size=4, replicas=1, hosts=1)
        data, updates = given.whole_updates(batches(10)[:3])
        self.assertEqual((sum(len(x) for x, _ in data), updates), (24, 3))

    def test_a_torch_loader(self):
        loader = DataLoader()
        loader.dataset = range(45)
        self.assertEqual(batch_data.TorchBatches(loader).examples, 45)
        loader.drop_last = True
        self.assertEqual(batch_data.TorchBatches(loader).examples, 40)
        loader.batch_size = None  # its batches are those of the data set
        self.assertIsNone(batch_data.TorchBatches(loader).examples)

    def test_a_series_of_pandas_is_a_column(self):
        series = type("Series", (np.ndarray,), {})
        self.assertEqual(inputs.to_array(np.arange(3.0).view(series)).shape, (3, 1))


if __name__ == "__main__":
    tf.test.main()
