"""`DivergenceGuard` finds losses and norms that are not finite or explode."""

import math
import types

import keras
import numpy as np
import tensorflow as tf

from lars_keras.runtime.divergence import DivergenceGuard
from lars_keras.runtime.errors import Diverged


class GuardTest(tf.test.TestCase):
    def check(self, losses, in_a_call=1):
        trainer = types.SimpleNamespace(measures={})
        guard = DivergenceGuard(trainer)
        guard.on_train_begin()
        for i in range(0, len(losses), in_a_call):
            trainer.step_losses = losses[i : i + in_a_call]
            guard.on_train_batch_end(i + len(trainer.step_losses) - 1, {})

    def test_loss(self):
        self.check([3.0] * 30 + [250.0, 0.1, 0.0])
        for bad in (np.nan, np.inf, -np.inf):
            with self.assertRaisesRegex(Diverged, "loss is .* in update 3"):
                self.check([1.0, 1.0, bad])
        with self.assertRaisesRegex(Diverged, "loss is 301 in update 31, 100 times its median"):
            self.check([3.0] * 30 + [301.0])
        self.check([3.0] * 5 + [301.0])  # too early to say what is usual
        self.check([1e-6] * 30 + [9.0])  # it can be learned again
        with self.assertRaisesRegex(Diverged, "loss is 11 in update 31"):
            self.check([1e-6] * 30 + [11.0])

    def test_a_trainer_that_it_does_not_know(self):
        guard = DivergenceGuard()
        guard.on_train_begin()
        for i in range(30):
            guard.on_train_batch_end(i, {"step_loss": 3.0, "loss": 9.0 / (i + 1)})
        with self.assertRaisesRegex(Diverged, "loss is 301 in update 31, 100 times its median"):
            guard.on_train_batch_end(30, {"step_loss": 301.0, "loss": 3.0})

    def test_options_out_of_range(self):
        for name, value in (("explosion_factor", 1), ("explosion_factor", math.nan), ("window", 0), ("window", 2.5)):
            with self.assertRaisesRegex(ValueError, f"`{name}` must be .*Received: {name}={value}"):
                DivergenceGuard(**{name: value})

    def test_options(self):
        guard = DivergenceGuard(explosion_factor=5.0, window=3)
        guard.on_train_begin()
        for i in range(3):
            guard.on_train_batch_end(i, {"step_loss": 3.0})
        with self.assertRaisesRegex(Diverged, "loss is 16 in update 4, 5.33 times its median over the last 3"):
            guard.on_train_batch_end(3, {"step_loss": 16.0})

    def test_every_loss_of_a_host_call(self):
        self.check([3.0] * 40, in_a_call=8)
        with self.assertRaisesRegex(Diverged, "loss is 301 in update 27, 100 times its median"):
            self.check([3.0] * 26 + [301.0] + [3.0] * 5, in_a_call=8)
        with self.assertRaisesRegex(Diverged, "loss is nan in update 2"):
            self.check([3.0, np.nan, 3.0], in_a_call=3)

    def test_layers(self):
        class FakeTrainer:
            model = keras.Sequential(
                [keras.Input((2,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b")]
            )
            measures, step_losses = {}, [1.0]

        def check(gradients, weights, message):
            guard = DivergenceGuard(FakeTrainer)
            guard.on_train_begin()
            FakeTrainer.measures = {"gradient": np.array(gradients), "weight": np.array(weights)}
            with self.assertRaisesRegex(Diverged, message):
                guard.on_train_batch_end(len(gradients) - 1, {})

        fine, bad, long = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, np.nan, 1.0], [1.0, 101.0, 1.0, 1.0]
        check([fine, bad], [fine, fine], "gradient of .*b/kernel is not finite in update 2")
        check([[np.inf] * 4], [fine], "gradient of .*a/kernel, and of 3 variables after it, is not finite in update 1")
        check([fine, fine], [fine, bad], "value of .*b/kernel is not finite in update 2")
        check([fine] * 21 + [[900.0] * 4], [fine] * 22, "gradient norm is 1800 in update 22, 900 times")
        check(
            [[1e-4] * 4] * 21 + [[0.9] * 4] + [bad], [fine] * 23, "not finite in update 23"
        )  # shorter than the weights
        check([fine, fine, fine], [fine, long, fine], "Update 2 multiplied the norm of .*a/bias by 101")
        check([fine, fine], np.float32([fine, [1.0, 1e20, 1.0, 1.0]]), "multiplied the norm of .*a/bias by 1e.20")
        small = [[30.0, norm, 1.0, 1.0] for norm in (0.0, 1e-6, 2e-4, 0.025, 3.0)]  # a bias that starts to learn
        check([fine] * 5, small, "Update 5 multiplied the norm of .*a/bias by 120")


if __name__ == "__main__":
    tf.test.main()
