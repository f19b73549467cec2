"""Arguments of `Trainer` that are refused by name, and what its progress bar shows."""

import contextlib
import io
import re

import keras
import numpy as np
import tensorflow as tf

from lars_keras import LARS
from lars_keras.report.noise import NoiseScaleLog
from lars_keras.training import Trainer

X = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
Y = np.arange(100) % 3


def compiled(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(LARS(1.0), loss, weighted_metrics=["accuracy"], **options)
    return model


class MisuseTest(tf.test.TestCase):
    def test_arguments(self):
        cases = (
            ("`jit_compile` must be .*Received: jit_compile='off'", {}, {"jit_compile": "off"}),
            ("`batch_size` must be .* at least 1. Received: batch_size=0", {}, {"batch_size": 0}),
            ("`microbatch_size` must be .* at least 1", {}, {"microbatch_size": 0}),
            ("Received: run_eagerly=True", {"run_eagerly": True}, {}),
        )
        for message, of_compile, of_trainer in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                Trainer(compiled(**of_compile), **{"batch_size": 16, **of_trainer})

    def test_data_without_targets(self):
        trainer = Trainer(compiled(), batch_size=16)
        for call in (trainer.fit, trainer.evaluate):
            with self.subTest(call.__name__), self.assertRaisesRegex(ValueError, "The loss needs targets: pass `y`"):
                call(X)

    def test_callbacks(self):
        trainer = Trainer(compiled(), batch_size=16, microbatch_size=8)
        with self.assertRaisesRegex(ValueError, "`callbacks` must be Keras callbacks. Received: <built-in"):
            trainer.fit(X, Y, callbacks=[print], verbose=0)
        with self.assertRaisesRegex(ValueError, r"needs .*`Trainer\(noise_scale=True\)`"):
            trainer.fit(X, Y, callbacks=[NoiseScaleLog(trainer)], verbose=0)

    def test_updates_of_a_call_are_those_of_compile(self):
        model = compiled(steps_per_execution=3)
        self.assertEqual(Trainer(model, batch_size=16).steps_per_execution, 3)
        self.assertEqual(Trainer(model, batch_size=16, steps_per_execution=2).steps_per_execution, 2)


class ProgressBarTest(tf.test.TestCase):
    def test_each_epoch_begins_at_0(self):
        trainer = Trainer(compiled(), batch_size=16, steps_per_execution=2)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            trainer.fit(X, Y, epochs=2, validation_data=(X, Y))
        text = re.sub(r"\x1b\[\d+m", "", shown.getvalue())
        first, second = text.split("Epoch 2/2")
        for epoch in (first, second):
            counts = re.findall(r"(\d)/(\d) ", epoch)
            self.assertEqual({total for _, total in counts}, {"6"})
            self.assertEqual((counts[0][0], counts[-1][0]), ("2", "6"))
            self.assertRegex(epoch, "accuracy: .*loss: .*val_loss: ")
        self.assertNotRegex(text, "step_loss|data_wait")


if __name__ == "__main__":
    tf.test.main()
