"""Batches by index, generators and loaders: their threads, hooks and sizes.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import functools
import threading
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer, batch_data, inputs
from lars_keras.training.given_data import GivenData
from lars_keras.training.inputs import InputContext
from tests.training.test_data_forms import DataLoader, Files, W, X, Y, batches, feed_of, generator, trainer_of, weights
from tests.training.test_meaning import replicas


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

    def test_processes_are_not_used(self):
        for read in (feed_of, trainer_of().evaluate):
            with unittest.mock.patch("absl.logging.log_first_n") as warn:
                read(Watched(8, use_multiprocessing=True))
            self.assertIn("with threads, not with processes", "".join(call.args[1] for call in warn.call_args_list))

    def test_hooks(self):
        data, trainer = Watched(8), trainer_of()
        trainer.evaluate(data)
        self.assertEqual(data.hooks, ["begin", "end"])
        data.hooks.clear()
        for epochs in (2, 1):
            trainer.fit(data, epochs=epochs, verbose=0)
            self.assertEqual(data.hooks, ["begin", "end"] * epochs)
            data.hooks.clear()

    def test_hooks_of_a_training_that_stops(self):
        """End each epoch that began to be read."""
        data, trainer = Watched(8, workers=2), trainer_of()

        class Stop(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.model.stop_training = True

        trainer.fit(data, epochs=9, verbose=0, callbacks=[Stop()])
        self.assertIn(data.hooks, (["begin", "end"], ["begin", "end"] * 2))  # the next may be read ahead

    def test_class_weights_need_batches_without_weights(self):
        with self.assertRaisesRegex(ValueError, "needs batches of .*Received: batches of length 3"):
            batch_data.Indexed(batches(10, X, Y, W), 4, "PyDataset", {0: 1.0})


def images(*parts, size=10, **options):
    return tf.data.Dataset.from_tensor_slices(parts).batch(size, **options)


class TensorFlowDataTest(parameterized.TestCase, tf.test.TestCase):
    CLASSES = np.arange(40) % 3

    @parameterized.parameters(
        ("sparse_categorical_crossentropy", CLASSES),
        ("sparse_categorical_crossentropy", CLASSES[:, None].astype("float32")),
        ("categorical_crossentropy", np.eye(3, dtype="float32")[CLASSES]),
    )
    def test_class_weights_as_keras(self, loss, targets):
        results = []
        for in_trainer in (True, False):
            outputs = keras.layers.Dense(3, "softmax", kernel_initializer="ones")
            model = keras.Sequential([keras.Input((4,)), outputs])
            model.compile(keras.optimizers.SGD(0.1), loss)
            data, options = images(X.astype("float32"), targets), {"class_weight": {0: 0.2, 2: 5}, "verbose": 0}
            if in_trainer:
                history = Trainer(model, batch_size=10, microbatch_size=5).fit(data, epochs=2, **options)
            else:
                history = model.fit(data, epochs=2, shuffle=False, **options)
            results.append([history.history["loss"], *map(np.array, model.get_weights())])
        for actual, expected in zip(*results, strict=True):
            self.assertAllClose(actual, expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(
        ((X, Y, W), {0: 1.0}, "needs batches of `.x, y.`"),
        ((X, {"a": Y}), {0: 1.0}, "one output"),
        ((X, np.ones((40, 2, 3))), {0: 1.0}, "a class for each example"),
        ((X, Y), [1.0], "must be a dictionary"),
    )
    def test_class_weights_that_are_refused(self, parts, class_weight, message):
        with self.assertRaisesRegex(ValueError, message):
            feed_of(images(*parts), class_weight=class_weight)
        with self.assertRaisesRegex(ValueError, "one output"):
            feed_of(images(X).map(lambda x: (x, None)), class_weight={0: 1.0})

    @parameterized.parameters(True, False)
    def test_examples_are_counted_without_reading_where_that_can_be(self, drop):
        read = []
        watched = images(X[:35], drop_remainder=drop).map(
            lambda x: tf.ensure_shape(tf.numpy_function(lambda a: read.append(len(a)) or a, [x], x.dtype), x.shape)
        )
        self.assertEqual((inputs.count_examples(watched), sum(read)), (30, 0) if drop else (35, 35))


class GeneratorTest(parameterized.TestCase, tf.test.TestCase):
    @staticmethod
    def make():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), "mse", weighted_metrics=["mae"])
        return model

    @classmethod
    @functools.cache
    def fitted_by_keras(cls):
        """Return history and weights after an epoch of Keras."""
        model = cls.make()
        history = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history
        return history, [np.array(value) for value in model.get_weights()]

    @parameterized.parameters((1, 8, None), (3, 4, None), (1, 8, 2), (2, 4, 5), (1, 4, 5, 2))
    def test_it_ends_early(self, steps_per_execution, microbatch_size, steps_per_epoch, devices=1):
        """Five updates are there. The run ends as Keras's would, but at the end of the last whole global batch."""
        options = {"steps_per_execution": steps_per_execution, "microbatch_size": microbatch_size}
        with replicas(devices):
            model = self.make()
            trainer, calls = Trainer(model, batch_size=8, **options), []
        callback = keras.callbacks.LambdaCallback(on_train_end=lambda logs: calls.append(logs))
        data = (batch for batch in [*batches(7, X[:35].astype("float32"), Y[:35]), (X[35:], Y[35:]), (X[:5], Y[:5])])
        with self.assertLogs(level="WARNING") as logs:
            history = trainer.fit(
                data,
                steps_per_epoch=steps_per_epoch or 9,
                epochs=9,
                validation_data=(X, Y),
                callbacks=callback,
                verbose=0,
            ).history
        self.assertRegex("".join(logs.output), "have ended .* ends with update 5 of")
        updates = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        self.assertEqual((trainer.position.update, updates, len(calls)), (5, 5, 1))
        expected, values = self.fitted_by_keras()
        for actual, value in zip(model.get_weights(), values, strict=True):
            self.assertAllClose(np.array(actual), value, rtol=1e-5)
        self.assertLen(history["val_loss"], {None: 1, 2: 3, 5: 2}[steps_per_epoch])
        self.assertLen(history["loss"], {None: 1, 2: 3, 5: 1}[steps_per_epoch])  # none of an epoch without an update
        if steps_per_epoch != 2:
            for name in expected:
                self.assertAllClose(history[name], expected[name], rtol=1e-5)

    def test_each_fit_takes_the_next_batch(self):
        def batches_of_an_update():
            for i in range(4):
                yield X[8 * i :][:8], Y[8 * i :][:8]

        whole, cut, stream = trainer_of(), trainer_of(), batches_of_an_update()
        whole.fit(batches_of_an_update(), steps_per_epoch=4, verbose=0)
        for _ in range(4):
            cut.fit(stream, steps_per_epoch=1, verbose=0)
        for actual, expected in zip(weights(cut.model), weights(whole.model), strict=True):
            self.assertAllEqual(actual, expected)

    def test_it_goes_on_where_it_is(self):
        feed = feed_of(generator())
        read = feed(InputContext(), 0)
        for _ in range(3):
            next(read)
        with self.assertLogs(level="WARNING") as logs:
            x, _ = next(feed(InputContext(), 2))
        self.assertIn("cannot go back to the examples of update 2", logs.output[0])
        self.assertAllEqual(x, batches()[3][0])


class Broken(Exception):
    """An error of a user's data."""


class ErrorTest(parameterized.TestCase, tf.test.TestCase):
    """The error of the data themselves is raised, also if it happens while they are read ahead."""

    FORMS = {
        "iterable": lambda read: type("Batches", (), {"__iter__": lambda self: read()})(),
        "function": lambda read: lambda context, *first_update: read(),
        "generator": lambda read: read(),
    }

    @parameterized.parameters(1, 2)
    def test_in_training(self, devices):
        broken = threading.Event()

        def read():
            yield from batches(8)[:2]
            broken.set()
            raise Broken("the third batch")

        with replicas(devices):
            trainer = trainer_of()
        wait = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: batch < 2 or broken.wait(60))
        for name, form in self.FORMS.items():
            broken.clear()
            with self.subTest(name), self.assertRaisesRegex(Broken, "the third batch"):
                trainer.fit(form(read), steps_per_epoch=9, callbacks=wait, verbose=0)
            self.assertEqual(trainer.position.update, 2)

    def test_of_another_reader(self):
        """An evaluation has its own errors, not one of the training data, which were read ahead."""
        broken = threading.Event()

        def read():
            yield from batches(8)[:2]
            broken.set()
            raise Broken("training")

        def scored():
            yield from batches(8)[:3]
            self.assertTrue(broken.wait(60), "the training data were not read ahead")
            raise KeyError("evaluation")

        evaluated = type("Batches", (), {"__iter__": lambda self: scored()})()
        options = {"steps_per_epoch": 2, "epochs": 9, "validation_data": evaluated, "verbose": 0}
        with self.assertRaisesRegex(KeyError, "evaluation"):
            trainer_of().fit(read(), **options)


class SizesTest(tf.test.TestCase):
    def test_a_list_without_its_last_partial_update(self):
        given = GivenData(batch_size=8, microbatch_size=4, replicas=1, hosts=1)
        data, updates = given.whole_updates(batches(10)[:3])
        self.assertEqual((sum(len(x) for x, _ in data), updates), (24, 3))

    def test_an_iterable_with_names_of_ours(self):
        """Its attributes mean what they mean to its own class."""

        class Own:
            examples, order, first, look, element_spec, without_hooks = batches(), {}, 1, 2, None, None

            def __init__(self):
                self.read = 0

            def __len__(self):
                return 4

            def __iter__(self):
                self.read += 1
                return iter(batches())

        own, expected = Own(), trainer_of().fit(batches(), validation_data=batches(), verbose=0).history
        trainer = trainer_of()
        self.assertAllClose(trainer.fit(own, validation_data=own, verbose=0).history, expected)
        read = own.read
        trainer.fit(own, validation_data=own, verbose=0)
        self.assertLess(own.read, 2 * read)  # its examples are counted once

    def test_a_torch_loader(self):
        loader = DataLoader()
        loader.dataset = range(45)
        self.assertEqual(batch_data.TorchBatches(loader).examples, 45)
        loader.drop_last = True
        self.assertEqual(batch_data.TorchBatches(loader).examples, 40)
        loader.sampler = range(25)
        self.assertEqual(batch_data.TorchBatches(loader).examples, 20)
        loader.batch_size = None  # its batches are those of the data set
        self.assertIsNone(batch_data.TorchBatches(loader).examples)

    def test_a_series_of_pandas_is_a_column(self):
        series = type("Series", (np.ndarray,), {})
        self.assertEqual(inputs.to_array(np.arange(3.0).view(series)).shape, (3, 1))


if __name__ == "__main__":
    tf.test.main()
