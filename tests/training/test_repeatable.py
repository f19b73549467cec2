"""A program that is traced again is the same program, bit for bit."""

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context  # nothing public tells which graphs have run

from lars_keras import LARS
from lars_keras.training import Trainer

POOL_GRADIENTS = {"MaxPoolGrad", "_MklNativeMaxPoolGrad"}


def overlapping_pools():
    """Return a compiled model with windows of max pooling that overlap, so that the order of sums shows."""
    model = keras.Sequential(
        [
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(3, 2),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(3, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    model.build((None, 16, 16, 1))
    model.compile(LARS(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class RepeatableTest(tf.test.TestCase):
    def test_gradient_runs_outside_of_loops(self):
        """Keep the gradient of max pooling out of graphs with a loop, where addresses choose between two kernels."""
        x, y = np.random.default_rng(0).random((32, 16, 16, 1), "float32"), np.arange(32) % 4
        context.enable_run_metadata()
        self.addCleanup(context.disable_run_metadata)
        Trainer(overlapping_pools(), batch_size=32, microbatch_size=8).fit(x, y, epochs=1, verbose=0)
        graphs = [g for f in context.export_run_metadata().function_graphs for g in f.partition_graphs]
        loops = [ops for g in graphs if "NextIteration" in (ops := {node.op for node in g.node})]
        self.assertNotEmpty(loops)  # over updates and micro-batches
        for ops in loops:
            self.assertEmpty(POOL_GRADIENTS & ops)
