"""The state of another model or optimizer is refused by classes and paths, not by counts and shapes."""

import keras
import numpy as np
import tensorflow as tf

from lars_keras import LAMB, LARS
from lars_keras.training import Trainer
from lars_keras.training.averages import long_averages
from lars_keras.training.state import check_identity, identity_of


def model(names=(None, None), optimizer=None):
    net = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4, name=name) for name in names)])
    net.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return net


class IdentityTest(tf.test.TestCase):
    def check(self, before, now, message=None):
        if message is None:
            check_identity(now, identity_of(before))
            return
        with self.assertRaisesRegex(ValueError, "another model or optimizer: " + message):
            check_identity(now, identity_of(before))

    def test_the_same(self):
        self.check(model(), model())  # Keras numbers them on
        self.check(model(("one", "two")), model(("one", "two")))
        self.check(model(("conv_1", "conv_2")), model(("conv_1", "conv_2")))
        check_identity(model(), None)  # saved by an earlier version

    def test_other_layers(self):
        message = "it has the variable one/kernel where the model has two/kernel"
        self.check(model(("one", "two")), model(("two", "one")), message)
        self.check(model(("conv_1", "conv_2")), model(("conv_2", "conv_1")), "it has the variable conv")
        self.check(model(("one", "two")), model(("x", "y")), "it has")

    def test_other_optimizers(self):
        for optimizer in (LARS(0.1), keras.optimizers.RMSprop(0.1), keras.optimizers.Adagrad(0.1)):
            name = type(optimizer).__name__
            self.check(model(), model(optimizer=optimizer), f"the optimizer is of class SGD, not {name}")
        self.check(model(optimizer=keras.optimizers.Adam()), model(optimizer=LAMB(0.1)), "the optimizer is of class")
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        self.check(model(optimizer=keras.optimizers.Adam()), model(optimizer=scaled))  # counts tell them apart

    def test_the_state_of_a_loss_scale(self):
        """By shape alone its step counter would become the iterations, and its scale the learning rate."""
        x, names = np.ones((16, 4), "f4"), ("one", "two")
        scaled = Trainer(model(names, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))), batch_size=8)
        scaled.fit(x, x, verbose=0)
        plain = Trainer(model(names, keras.optimizers.SGD(0.1)), batch_size=8)
        with self.assertRaisesRegex(
            ValueError, "another model or optimizer: it has 10 .4 of the model. variables, not 6"
        ):
            plain.restore(*scaled.snapshot(), (x, x))

    def test_other_shapes(self):
        """Name the variable, and both shapes."""

        def trainer(inputs):
            net = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(4, name="one")])
            net.compile(keras.optimizers.SGD(0.1), "mse")
            return Trainer(net, batch_size=8)

        data = {n: (np.ones((16, n), "f4"), np.ones((16, 4), "f4")) for n in (4, 5)}
        saved = trainer(4)
        saved.fit(*data[4], verbose=0)
        message = r"optimizer: it has .*one/kernel in the shape \(4, 4\), and the model has it in the shape \(5, 4\)\."
        with self.assertRaisesRegex(ValueError, message):
            trainer(5).restore(*saved.snapshot(), data[5])

    def test_a_trainer(self):
        x = np.ones((16, 4), "f4")
        data = tf.data.Dataset.from_tensor_slices((x, x)).batch(8)
        trainer = Trainer(model(("one", "two")), batch_size=8)
        trainer.fit(data, verbose=0)
        arrays, position = trainer.snapshot()
        other = Trainer(model(("two", "one")), batch_size=8)
        with self.assertRaisesRegex(ValueError, "another model or optimizer: it has the variable one/kernel"):
            other.restore(arrays, position, data)
        again = Trainer(model(("one", "two"), keras.optimizers.SGD(0.001, momentum=0.9)), batch_size=8)
        with self.assertLogs(level="WARNING") as logs:
            again.restore(arrays, position, data)
        self.assertIn("The learning rate is the saved one, 0.1. The optimizer was compiled with 0.001.", logs.output[0])
        self.assertAllEqual(again.model.layers[0].kernel, trainer.model.layers[0].kernel)


class MetricsTest(tf.test.TestCase):
    def test_numbers_in_their_names(self):
        """Keras numbers its own names in a process; a name that was given has its number."""

        def identity(metric):
            net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(20, "softmax")])
            net.compile("sgd", "categorical_crossentropy", metrics=[metric])
            net.evaluate(np.ones((2, 4)), np.eye(20)[:2], verbose=0)
            return identity_of(net)["metrics"]

        self.assertEqual(identity(keras.metrics.AUC()), identity(keras.metrics.AUC()))
        top = [identity(keras.metrics.TopKCategoricalAccuracy(k, name=f"top_{k}")) for k in (5, 10)]
        self.assertNotEqual(*top)


class LongAveragesTest(tf.test.TestCase):
    def test_averages_that_are_longer_than_the_run(self):
        net = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
        net.compile(keras.optimizers.SGD(use_ema=True, ema_momentum=0.999, ema_overwrite_frequency=50), "mse")
        average, overwrite, statistics = long_averages(net, 40)
        self.assertIn(
            "covers 1000 updates (ema_momentum=0.999), and the run has 40. 96% of the average is still", average
        )
        self.assertIn("every 50 updates, and the run has 40", overwrite)
        self.assertIn("1 BatchNormalization layer cover 100 updates (momentum=0.99), and the run has 40.", statistics)
        self.assertLen(long_averages(net, 200), 1)
        self.assertEqual(long_averages(net, 2000), [])
        net.compile("sgd", "mse")
        net.layers[0].trainable = False
        self.assertEqual(long_averages(net, 1), [])


if __name__ == "__main__":
    tf.test.main()
