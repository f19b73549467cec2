"""`Trainer` takes shapes, sizes and objects as `model.fit` does: unknown sizes, NumPy's numbers, no config, an EMA.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer
from tests.training.test_data_forms import BATCH, RNG, X, Y, dataset, trainer_of, weights
from tests.training.test_meaning import replicas

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    from lars_keras.training.tensorflow import engine


class WithoutConfigTest(tf.test.TestCase):
    def test_nothing_is_serialized(self):
        """A schedule, loss, metric and optimizer without a config train and are evaluated."""

        class Schedule(keras.optimizers.schedules.LearningRateSchedule):
            def __call__(self, step):
                return 0.1

        def refuse(self):
            raise NotImplementedError("no config")

        loss = type("Loss", (keras.losses.MeanSquaredError,), {"get_config": refuse})
        metric = type("Metric", (keras.metrics.MeanAbsoluteError,), {"get_config": refuse})
        optimizer = type("Optimizer", (keras.optimizers.SGD,), {"get_config": refuse})
        trainer = trainer_of()
        trainer.model.compile(optimizer(Schedule()), loss(), weighted_metrics=[metric(name="mae")])
        trainer = Trainer(trainer.model, batch_size=40)
        expected = trainer.model.evaluate(X, Y, batch_size=40, verbose=0, return_dict=True)
        history = trainer.fit(X, Y, validation_data=(X, Y), verbose=0).history
        self.assertAllClose([history["loss"][0], history["mae"][0]], [expected["loss"], expected["mae"]], rtol=1e-5)
        self.assertAllClose(history["val_loss"][0], trainer.evaluate(X, Y)["loss"], rtol=1e-6)


class ContextTest(tf.test.TestCase):
    def test_functions_are_told_where_they_run(self):
        """Also for the shapes: by itself, each of many hosts would make a whole global batch for them."""
        told = []

        def place(context):
            told.append((context.num_input_pipelines, context.input_pipeline_id, context.num_replicas_in_sync))

        def train(context, first_update):
            place(context)
            return dataset().repeat()

        def test(context):
            place(context)
            return dataset()

        for method, data in (("fit", train), ("evaluate", test)):
            with replicas(2):
                trainer = trainer_of()
            options = {"epochs": 1, "steps_per_epoch": 2, "verbose": 0} if method == "fit" else {}
            getattr(trainer, method)(data, **options)
        self.assertGreaterEqual(len(told), 4)
        self.assertEqual(set(told), {(1, 0, 2)})


def tokens_model():
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )


class ShapesTest(parameterized.TestCase, tf.test.TestCase):
    """Sizes that are not known, and sizes that vary."""

    WIDTHS = (3, 5, 4, 7, 2)

    def tokens(self):
        rng = np.random.default_rng(1)
        return [(rng.integers(1, 9, (8, width), "int32"), Y[8 * i : 8 * i + 8]) for i, width in enumerate(self.WIDTHS)]

    def datasets(self):
        x = X.astype("float32")
        types, wide = (tf.float32, tf.float32), (tf.TensorSpec((None,)), tf.TensorSpec((1,)))
        return {
            "sizes": tf.data.Dataset.from_generator(lambda: zip(x, Y, strict=True), output_signature=wide).batch(8),
            "ranks": dataset().map(lambda *b: tf.numpy_function(lambda *b: b, b, types)),
        }

    def test_not_known(self):
        for name, data in self.datasets().items():
            with self.subTest(name):
                model, reference = trainer_of().model, trainer_of().model
                trainer = Trainer(model, batch_size=BATCH, microbatch_size=4)
                history = trainer.fit(data, steps_per_epoch=5, verbose=0).history
                expected = reference.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0).history
                self.assertAllClose(history["loss"], expected["loss"], rtol=1e-5)
                self.assertEqual(trainer.evaluate(data)["n"], 40)

    def test_varying(self):
        """Training works if each batch is a micro-batch. Else the message says what to do."""
        data, padded = self.tokens(), [np.pad(x, [(0, 0), (0, 7 - x.shape[1])]) for x, _ in self.tokens()]
        signature = (tf.TensorSpec((None, None), tf.int32), tf.TensorSpec((None, 1)))
        of_tf = tf.data.Dataset.from_generator(lambda: data, output_signature=signature)
        model = trainer_of(tokens_model()).model
        start = weights(model)
        reference = trainer_of(tokens_model()).model
        reference.set_weights(start)
        expected = reference.fit(np.concatenate(padded), Y, batch_size=8, shuffle=False, verbose=0).history
        trainer, cut = Trainer(model, batch_size=8), Trainer(model, batch_size=16)
        for batches in (data, of_tf):
            model.set_weights(start)
            self.assertAllClose(trainer.fit(batches, steps_per_epoch=5, verbose=0).history["loss"], expected["loss"])
            self.assertEqual(trainer.evaluate(batches)["n"], 40)
            with self.assertRaisesRegex(ValueError, "Pad all examples to one shape, or give batches of exactly"):
                cut.fit(batches, steps_per_epoch=2, verbose=0)

    def test_text(self):
        words = np.array([["a"], ["b"], ["c"], ["a"]] * 10)
        layers = [keras.layers.StringLookup(vocabulary=["a", "b", "c"]), keras.layers.Embedding(5, 1)]
        layers += [keras.layers.Flatten(), keras.layers.Dense(1)]
        if BACKEND == "jax":
            with self.assertRaisesRegex(ValueError, "Text goes into a model with KERAS_BACKEND=tensorflow only"):
                trainer_of().fit(words, Y, verbose=0)
            return
        model = keras.Sequential([keras.Input((1,), dtype="string"), *layers])
        trainer = trainer_of(model)
        expected = trainer.evaluate(words, Y)
        self.assertAllClose(expected["loss"], model.evaluate(tf.constant(words), Y, batch_size=40, verbose=0)[0])
        for data in ([(words.astype(object), Y)], tf.data.Dataset.from_tensor_slices((words, Y)).batch(7)):
            self.assertAllClose(trainer.evaluate(data), expected, rtol=1e-5)
        trainer.fit(data, verbose=0)

    def test_sparse_and_ragged_are_refused(self):
        sparse = tf.sparse.from_dense(X)
        ragged = tf.data.Dataset.from_tensor_slices(tf.RaggedTensor.from_row_lengths(np.ones(10), [1, 2, 3, 4]))
        for data in ((sparse, Y), (ragged.batch(2),), (tf.data.Dataset.from_tensors(1.0),)):
            with self.assertRaisesRegex(ValueError, "dense arrays|first dimension"):
                trainer_of().fit(*data, verbose=0)


class AverageTest(tf.test.TestCase):
    """At the end of an epoch the model is the one that was scored."""

    def run_epochs(self, *callbacks):
        trainer = trainer_of()
        trainer.model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), "mse")
        trainer = Trainer(trainer.model, batch_size=20)
        seen = []

        class Watch(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                state, _ = trainer.snapshot()
                seen.append((weights(self.model), state["model/0"], logs["val_loss"]))

        history = trainer.fit(X, Y, epochs=3, validation_data=(X, Y), verbose=0, callbacks=[*callbacks, Watch()])
        return trainer, seen, history.history["val_loss"]

    def test_scored_weights(self):
        trainer, seen, scores = self.run_epochs()
        reference = trainer_of().model
        raw = [state for _, state, _ in seen]
        for values, _, score in seen:
            reference.set_weights(values)
            self.assertAllClose(reference.evaluate(X, Y, batch_size=40, verbose=0)[0], score, rtol=1e-5)
        for values, state in zip([values for values, _, _ in seen], raw, strict=True):
            self.assertNotAllClose(values[0], state)  # a checkpoint still has the weights that go on
        _, _, swapped = self.run_epochs(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
        self.assertAllClose(swapped, scores, rtol=1e-6)
        best = keras.callbacks.EarlyStopping(start_from_epoch=0, restore_best_weights=True)
        trainer, _, scores = self.run_epochs(best)
        best = trainer.model.evaluate(X, Y, batch_size=40, verbose=0, return_dict=True)
        self.assertAllClose(best["loss"], min(scores), rtol=1e-5)

    def test_weights_that_a_callback_sets_stay(self):
        ones = [np.ones((4, 1)), np.ones(1)]
        found = []

        class Set(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.model.set_weights(ones)

            def on_epoch_begin(self, epoch, logs=None):
                found.append(weights(self.model)[0])

        self.run_epochs(Set())
        self.assertAllEqual(found[1:], [ones[0]] * 2)


class SizesTest(parameterized.TestCase, tf.test.TestCase):
    def test_numbers_of_other_libraries(self):
        sizes = {"batch_size": np.int64(16), "microbatch_size": np.int32(8), "steps_per_execution": np.array(2)}
        trainer = trainer_of(**sizes)
        numbers = {"epochs": np.int64(1), "steps_per_epoch": np.float32(2.5), "validation_freq": np.int64(1)}
        trainer.fit(X, Y, verbose=0, validation_data=(X, Y), **numbers)
        self.assertEqual(trainer.snapshot()[1]["update"], 3)
        trainer.fit(X, Y, validation_data=(X, Y), validation_freq=[2], epochs=3, verbose=0)
        self.assertLen(trainer.model.history.history["val_loss"], 2)

    def test_refused(self):
        trainer = trainer_of()
        for call, message in (
            (lambda: trainer_of(batch_size=2.5), "batch_size=2.5"),
            (lambda: trainer_of(batch_size=-8), "batch_size=-8"),
            (lambda: trainer_of(batch_size="8"), "batch_size='8'"),
            (lambda: trainer_of(batch_size=True), "batch_size=True"),
            (lambda: trainer_of(microbatch_size=0.5), "microbatch_size=0.5"),
            (lambda: trainer_of(steps_per_execution=0), "steps_per_execution=0"),
            (lambda: trainer_of(steps_per_execution=np.nan), "steps_per_execution=nan"),
            (lambda: trainer.fit(X, Y, epochs=-1), "epochs=-1"),
            (lambda: trainer.fit(X, Y, epochs=float("nan")), "epochs=nan"),
            (lambda: trainer.fit(X, Y, epochs="2"), "epochs='2'"),
            (lambda: trainer.fit(X, Y, steps_per_epoch=0), "steps_per_epoch=0"),
            (lambda: trainer.fit(X, Y, validation_freq=0), "validation_freq=0"),
            (lambda: trainer.fit(X, Y, validation_freq=[0]), "validation_freq=0"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                call()


if BACKEND == "tensorflow":

    class JitTest(tf.test.TestCase):
        def test_auto_asks_the_layers(self):
            """XLA compiles a model on an accelerator, simulated, unless one of its layers does not allow it."""
            images = RNG.random((8, 8, 8, 3), dtype="float32")
            first = {"rotation": keras.layers.RandomRotation(0.1), "conv": keras.layers.Conv2D(2, 3)}
            with unittest.mock.patch.object(engine, "has_accelerator", lambda: True):
                for name, layer in first.items():
                    rest = [keras.layers.Flatten(), keras.layers.Dense(1)]
                    model = keras.Sequential([keras.Input((8, 8, 3)), layer, *rest])
                    trainer = trainer_of(model)
                    history = trainer.fit(images, Y[:8], verbose=0).history
                    self.assertTrue(np.isfinite(history["loss"][0]))
                    self.assertEqual(hasattr(trainer.engine.step.gradient, "get_concrete_function"), name == "conv")


if __name__ == "__main__":
    tf.test.main()
