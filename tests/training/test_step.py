"""One device = N replicas = k micro-batches."""

import pickle
import sys
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LARS, SGD
from lars_keras.training import Trainer, forward, split_batch
from lars_keras.training.given_data import GivenData
from lars_keras.training.tensorflow.inputs import ghost_batches
from tests import step_cases as cases
from tests import workers

MOMENTUM = cases.OPTIMIZERS["momentum"]  # for what is true of the step, whatever the optimizer: the shorter program
STRATEGIES = ("none", "one", "mirrored2", "mirrored8")
FLOAT32 = 1e-6
SYNC_BATCH_NORM = 1e-5
BATCH_NORM = cases.batch_norm()
BFLOAT16 = 2**-5  # eight roundings to 8 bits; the sums over a batch cancel


def difference(actual, expected):
    """Return the largest relative L2 difference of a variable, and its path. No value may be a NaN, which has none."""
    assert actual.keys() == expected.keys()
    assert all(np.isfinite(np.float64(v)).all() for values in (actual, expected) for v in values.values())
    return max(
        (np.linalg.norm(np.float64(actual[path] - expected[path])) / max(np.linalg.norm(np.float64(v)), 1e-30), path)
        for path, v in expected.items()
    )


class StepTest(parameterized.TestCase, tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.single = {}

    def reference(self, make_model, optimizer="lars", policy="float32", microbatch_size=None):
        """Return the same updates on one device, each of one micro-batch unless its size is given."""
        key = (make_model, optimizer, policy, microbatch_size)
        if key not in self.single:
            options = {"policy": policy, "microbatch_size": microbatch_size}
            trainer, history = cases.trained(make_model, cases.OPTIMIZERS[optimizer], **options)
            self.single[key] = cases.state(trainer), history
        return self.single[key]

    def check(self, state, history, optimizer, policy):
        """Compare weights, optimizer state and metrics with the single device's."""
        expected, expected_history = self.reference(cases.hidden, optimizer, policy)
        tolerance = FLOAT32 if policy == "float32" else BFLOAT16
        self.assertLess(difference(state, expected), (tolerance,))
        if policy != "float32":  # it is not computed in float32 after all
            exact, _ = self.reference(cases.hidden, optimizer, "float32")
            self.assertGreater(difference(state, exact), (1e-4,))
        for name in ("loss", "top1", "step_loss", "learning_rate"):
            self.assertAllClose(history[name], expected_history[name], rtol=tolerance, atol=0)

    @parameterized.parameters(
        *(("mirrored2", *row) for row in cases.PAIRS),
        ("one", 4, "lars", "float32"),
    )
    def test_same_update(self, strategy, accumulation_steps, optimizer, policy):
        self.check_row(strategy, accumulation_steps, optimizer, policy)

    @parameterized.parameters(*((s, *row) for s in STRATEGIES for row in cases.TABLE))
    @pytest.mark.slow
    def test_rest_of_the_table(self, strategy, accumulation_steps, optimizer, policy):
        self.check_row(strategy, accumulation_steps, optimizer, policy)

    def check_row(self, strategy, accumulation_steps, optimizer, policy):
        replicas = int(strategy.removeprefix("mirrored")) if strategy.startswith("mirrored") else 1
        trainer, history = cases.trained_row(strategy, replicas, accumulation_steps, optimizer, policy)
        self.assertEqual(trainer.accumulation_steps, accumulation_steps)
        self.check(cases.state(trainer), history, optimizer, policy)

    def test_same_update_on_two_workers(self):
        self.check_two_workers("OPPOSITES")

    @pytest.mark.slow
    def test_whole_table_on_two_workers(self):
        self.check_two_workers("TABLE")

    def check_two_workers(self, table):
        """Two real processes on loopback go through the same table."""
        out = self.enterContext(tempfile.TemporaryDirectory())
        processes = workers.start(2, [sys.executable, "-m", "tests.workers", out, table])
        for process, output in zip(processes, workers.wait(processes), strict=True):
            self.assertEqual(process.returncode, 0, output)
        for worker in range(2):
            with open(f"{out}/{worker}.pickle", "rb") as f:
                rows = pickle.load(f)
            for (_, optimizer, policy), (state, history) in zip(getattr(cases, table), rows, strict=True):
                self.check(state, history, optimizer, policy)

    @parameterized.parameters(("none", None), ("none", 8), ("mirrored2", 8), ("mirrored4", None))
    def test_float64_oracle(self, strategy, microbatch_size):
        self.check_float64_oracle(strategy, microbatch_size)

    @pytest.mark.slow
    def test_float64_oracle_of_eight(self):
        self.check_float64_oracle("mirrored8", None)

    def check_float64_oracle(self, strategy, microbatch_size):
        trainer, history = cases.trained(
            cases.linear, cases.OPTIMIZERS["lars"], strategy, microbatch_size=microbatch_size
        )
        weights, slots, losses = cases.oracle()
        own = [v for v in trainer.model.optimizer.variables if v.path.endswith("momentum")]
        for actual, expected in zip([*trainer.model.weights, *own], weights + slots, strict=True):
            self.assertLess(difference({"": actual.numpy()}, {"": expected}), (FLOAT32,))
        self.assertAllClose(history["loss"][0], np.mean(losses), rtol=1e-6)
        self.assertAllClose(history["step_loss"][0], losses[-1], rtol=1e-6)
        self.assertEqual(trainer.model.optimizer.iterations.numpy(), cases.UPDATES)

    def test_synchronized_batch_norm(self):
        self.check_synchronized_batch_norm("mirrored2")

    def test_synchronized_batch_norm_is_not_for_xla_on_cpus(self):
        with cases.strategy("mirrored2").scope():
            model = cases.batch_norm(synchronized=True)()
            model.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "synchronized=True.*Turn off `jit_compile`"):
            Trainer(model, batch_size=8, jit_compile=True)

    @pytest.mark.slow
    def test_synchronized_batch_norm_of_eight(self):
        self.check_synchronized_batch_norm("mirrored8")

    def check_synchronized_batch_norm(self, strategy):
        """Check that the statistics of a micro-batch over all replicas are those of the global batch."""
        make_model = cases.batch_norm(synchronized=True)
        trainer, _ = cases.trained(make_model, MOMENTUM, strategy)
        expected, _ = self.reference(BATCH_NORM, "momentum")
        self.assertLess(difference(cases.state(trainer), expected), (SYNC_BATCH_NORM,))

    @parameterized.parameters(BATCH_NORM, cases.dropout)
    def test_ghost_batches(self, make_model):
        self.check_ghost_batches(make_model, "mirrored2")

    @parameterized.parameters(BATCH_NORM, cases.dropout)
    @pytest.mark.slow
    def test_ghost_batches_of_eight(self, make_model):
        self.check_ghost_batches(make_model, "mirrored8")

    def check_ghost_batches(self, make_model, strategy):
        """Check that an update depends on the ghost batches, not on whether they lie in time or on replicas."""
        trainer, _ = cases.trained(make_model, MOMENTUM, strategy, microbatch_size=8)
        expected, _ = self.reference(make_model, "momentum", microbatch_size=8)
        self.assertLess(difference(cases.state(trainer), expected), (SYNC_BATCH_NORM,))
        one_ghost_batch, _ = self.reference(make_model, "momentum")
        self.assertGreater(difference(cases.state(trainer), one_ghost_batch), (1e-3,))

    def test_moving_statistics_move_once_per_update(self):
        """They become the mean over the ghost batches of what each of them made of the same start."""
        trainer, _ = cases.trained(cases.batch_norm(), lambda: LARS(0.0), microbatch_size=16)
        model = trainer.model
        kernel = model.layers[0].kernel.numpy().astype("float64")
        mean = np.zeros(16)
        x, _ = cases.examples()
        for batch in x.reshape(cases.UPDATES, -1, 16, cases.FEATURES).astype("float64"):
            mean = 0.8 * mean + 0.2 * np.mean([(ghost @ kernel).mean(0) for ghost in batch], 0)
        self.assertAllClose(model.layers[1].moving_mean.numpy(), mean, rtol=1e-5, atol=1e-6)

    def test_dropout_differs_between_ghost_batches_and_updates(self):
        """The same example in every place: only the masks differ."""
        keras.utils.set_random_seed(1)
        model = cases.dropout()
        model.compile(keras.optimizers.SGD(0.0), keras.losses.MeanSquaredError())
        trainer = Trainer(model, batch_size=4, microbatch_size=1)
        ones = tf.data.Dataset.from_tensors((tf.ones([4, cases.FEATURES]), tf.zeros([4, cases.CLASSES]))).repeat(4)
        losses = []
        record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["step_loss"]))
        trainer.fit(ones, epochs=1, verbose=0, callbacks=[record])
        self.assertLen(set(losses), 4)

    @parameterized.parameters(("none", 100), ("mirrored2", 3))
    def test_steps_per_execution(self, strategy, steps_per_execution):
        trainer, history = cases.trained(
            cases.hidden,
            MOMENTUM,
            strategy,
            microbatch_size=16,
            steps_per_execution=steps_per_execution,
        )
        self.assertEqual(trainer.model.optimizer.iterations.numpy(), cases.UPDATES)
        expected, expected_history = self.reference(cases.hidden, "momentum")
        self.assertLess(difference(cases.state(trainer), expected), (FLOAT32,))
        self.assertAllClose(history["loss"], expected_history["loss"], rtol=1e-6)

    def test_xla(self):
        trainer, _ = cases.trained(
            cases.hidden, cases.OPTIMIZERS["lars"], "mirrored2", microbatch_size=16, jit_compile=True
        )
        expected, _ = self.reference(cases.hidden, "lars", "float32")
        self.assertLess(difference(cases.state(trainer), expected), (FLOAT32,))

    def test_xla_takes_the_moments_of_batch_norm_in_one_pass(self):
        with mock.patch.object(forward, "one_pass_moments", wraps=forward.one_pass_moments) as one_pass_moments:
            expected, _ = cases.trained(BATCH_NORM, cases.OPTIMIZERS["lars"], microbatch_size=8)
            self.single[BATCH_NORM, "lars", "float32", 8] = cases.state(expected), None
            one_pass_moments.assert_not_called()
            trainer, _ = cases.trained(
                BATCH_NORM, cases.OPTIMIZERS["lars"], "mirrored2", microbatch_size=8, jit_compile=True
            )
            one_pass_moments.assert_called()
        self.assertLess(difference(cases.state(trainer), cases.state(expected)), (SYNC_BATCH_NORM,))

    def test_no_microbatch_is_lost_between_replicas(self):
        """The loss of the same batch, 150 times; other threads run in between. Sums in variables lost some of it."""
        with cases.strategy("mirrored2").scope():
            model = cases.batch_norm()()
            model.compile(SGD(0.0), keras.losses.CategoricalCrossentropy(from_logits=True))
        trainer = Trainer(model, batch_size=cases.BATCH, microbatch_size=16, variable_norms=True)
        losses = []

        def after_update(batch, logs):
            losses.append(logs["step_loss"])
            trainer.snapshot()

        batch = tf.data.Dataset.from_tensors(tuple(a[: cases.BATCH] for a in cases.examples()))
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=after_update)
        trainer.fit(batch, epochs=150, verbose=0, callbacks=[watch])
        self.assertAllClose(losses, [losses[0]] * 150, rtol=1e-6)

    @parameterized.parameters("none", "mirrored2")
    def test_data_wait_is_the_time_that_devices_stand_idle(self, strategy):
        with cases.strategy(strategy).scope():
            model = cases.hidden()
            model.compile(LARS(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
        waits, after_pauses, elapsed = cases.waits_for_slow_batches(model)
        self.assertBetween(sum(waits), 0.6, elapsed)
        # The least: on a busy machine some of them wait for a processor.
        self.assertLess(min(after_pauses), 0.15)  # half of what one that counts the time between updates would say

    def test_subclassed_model_built_by_the_trainer(self):
        class Subclassed(keras.Model):
            def __init__(self):
                super().__init__()
                self.first = keras.layers.Dense(16, "tanh")
                self.last = keras.layers.Dense(cases.CLASSES)

            def call(self, x):
                return self.last(self.first(x))

        trainer, _ = cases.trained(Subclassed, MOMENTUM, "mirrored2", microbatch_size=16)
        expected, _ = self.reference(cases.hidden, "momentum")
        values = list(cases.state(trainer).values())
        self.assertLess(difference(dict(zip(expected, values, strict=True)), expected), (FLOAT32,))

    def test_kernel_regularizer(self):
        def make_model():
            return keras.Sequential(
                [keras.Input((cases.FEATURES,)), keras.layers.Dense(cases.CLASSES, kernel_regularizer="l2")]
            )

        trainer, history = cases.trained(make_model, MOMENTUM, "mirrored2", microbatch_size=8)
        expected, expected_history = cases.trained(make_model, MOMENTUM)
        self.assertLess(difference(cases.state(trainer), cases.state(expected)), (FLOAT32,))
        self.assertAllClose(history["loss"], expected_history["loss"], rtol=1e-6)


class EpochsTest(tf.test.TestCase):
    def test_an_epoch_shorter_than_an_update(self):
        """Only epochs that end with an update of their own are seen, and scored once."""
        model = cases.linear()
        model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
        data = tf.data.Dataset.from_tensor_slices(cases.examples(1)).batch(64)
        seen = []
        record = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(
                (epoch, model.optimizer.iterations.numpy(), "val_loss" in logs)
            )
        )
        trainer = Trainer(model, batch_size=64)
        trainer.fit(data, epochs=7, steps_per_epoch=0.4, validation_data=data, callbacks=[record], verbose=0)
        self.assertEqual(seen, [(0, 1, True), (2, 2, True), (5, 3, True)])

    def test_the_number_of_epochs(self):
        """40 updates for 10 epochs of 3.99 make no eleventh."""
        model = cases.linear()
        model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
        data = tf.data.Dataset.from_tensor_slices(cases.examples(1)).batch(64)
        seen = []
        record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
        trainer = Trainer(model, batch_size=64)
        trainer.fit(data, epochs=40 / 3.99, steps_per_epoch=3.99, callbacks=[record], verbose=0)
        self.assertEqual((record.params["epochs"], seen), (10, [*range(10)]))
        trainer.fit(data, epochs=0, steps_per_epoch=3, callbacks=[record], verbose=0)
        self.assertLen(seen, 10)

    def test_hosts_read_one_endless_dataset(self):
        """Together they have the ghost batches that one process has, also where the dataset ends within a batch."""
        data = tf.data.Dataset.from_tensor_slices((np.arange(10), np.arange(10))).batch(5)

        def read(worker, workers, replicas):
            context = tf.distribute.InputContext(workers, worker, replicas)
            batches = ghost_batches(data, context, microbatch_size=2, accumulation_steps=1, first_update=1, updates=5)
            return [x.tolist() for x, _ in batches.as_numpy_iterator()]

        one = read(0, 1, 2)
        self.assertEqual(one[:4], [[4, 5], [6, 7], [8, 9], [0, 1]])
        self.assertEqual([read(0, 2, 2), read(1, 2, 2)], [one[0::2], one[1::2]])

    def test_a_dataset_is_counted_once_and_never_in_global_batches(self):
        x, y = cases.examples(2)
        read = []

        def examples():
            read.append(len(x))
            yield from zip(x, y, strict=True)

        signature = (tf.TensorSpec(x.shape[1:]), tf.TensorSpec(y.shape[1:]))
        data = tf.data.Dataset.from_generator(examples, output_signature=signature).batch(20)
        data = data.apply(tf.data.experimental.assert_cardinality(-(-len(x) // 20)))
        given = GivenData(batch_size=48, microbatch_size=16, replicas=1, hosts=1)
        ghosts, steps = given.whole_updates(data)
        self.assertEqual((steps, {len(x) for x, _ in ghosts}), (len(x) // 48, {16}))
        self.assertLen(list(ghosts), 3 * steps)
        counted = len(read)
        given.whole_updates(data)
        self.assertLen(read, counted)


class EvaluationTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("none", 63, None),
        ("none", 64, "l2"),
        ("mirrored2", 1, "l2"),
        ("mirrored4", 129, None),
    )
    def test_every_example_once(self, strategy, n, regularizer):
        self.check_scores(strategy, n, regularizer)

    @parameterized.product(strategy=STRATEGIES, n=(1, 63, 64, 129), regularizer=(None, "l2"))
    @pytest.mark.slow
    def test_every_example_once_everywhere(self, strategy, n, regularizer):
        self.check_scores(strategy, n, regularizer)

    def check_scores(self, strategy, n, regularizer):
        keras.utils.set_random_seed(1)
        with cases.strategy(strategy).scope():
            model = keras.Sequential(
                [keras.Input((cases.FEATURES,)), keras.layers.Dense(cases.CLASSES, kernel_regularizer=regularizer)]
            )
            model.compile(
                "sgd",
                keras.losses.CategoricalCrossentropy(from_logits=True),
                weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
            )
        x, y = (a[:n] for a in cases.examples())
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(50)
        scores = Trainer(model, batch_size=cases.BATCH, microbatch_size=4).evaluate(data)
        weights = [np.array(w, "float64") for w in model.get_weights()]
        logits = x.astype("float64") @ weights[0] + weights[1]
        loss = np.mean(np.log(np.exp(logits).sum(1)) - (logits * y).sum(1))
        loss += 0.01 * np.sum(weights[0] ** 2) if regularizer else 0.0
        self.assertEqual(scores["n"], n)
        self.assertAllClose(scores["loss"], loss, rtol=1e-6)
        self.assertAllClose(scores["top1"], np.mean(logits.argmax(1) == y.argmax(1)), rtol=1e-6)


class ArgumentsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        (64, 1, None, (64, 1)), (64, 2, None, (32, 1)), (64, 2, 8, (8, 4)), (64, 8, 64, (8, 1)), (3, 3, 1, (1, 1))
    )
    def test_split(self, batch, replicas, micro, expected):
        self.assertEqual(split_batch(batch, replicas, micro), expected)

    @parameterized.parameters(
        (64, 3, None, "batch_size.*multiple of the 3 replicas, such as 63.*batch_size=64"),
        (2, 4, None, "such as 4"),
        (64, 2, 12, "microbatch_size.*divide the 32 examples.*such as 8.*microbatch_size=12"),
        (64, 1, 0, "microbatch_size=0"),
        (0, 1, None, "batch_size=0"),
    )
    def test_split_errors(self, batch, replicas, micro, message):
        with self.assertRaisesRegex(ValueError, message):
            split_batch(batch, replicas, micro)

    def test_not_compiled(self):
        with self.assertRaisesRegex(ValueError, "compile"):
            Trainer(cases.linear(), batch_size=64)

    def test_sum_loss_is_refused(self):
        model = cases.linear()
        model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
        with self.assertRaisesRegex(ValueError, "reduction='sum'"):
            Trainer(model, batch_size=64)

    def test_gradient_accumulation_is_refused(self):
        with self.assertRaisesRegex(ValueError, "microbatch_size"):
            cases.trained(cases.linear, lambda: LARS(gradient_accumulation_steps=2))

    @parameterized.parameters(False, True)
    def test_several_rates_are_refused(self, scaled):
        multi = getattr(keras.optimizers, "MultiOptimizer", None)
        if multi is None:
            self.skipTest("this Keras has no MultiOptimizer")
        model, rule = cases.linear(), multi(lambda variable: LARS(0.1))
        model.compile(keras.optimizers.LossScaleOptimizer(rule) if scaled else rule, "mse")
        with self.assertRaisesRegex(ValueError, "one learning rate.*MultiOptimizer"):
            Trainer(model, batch_size=64)

    def test_nothing_to_train(self):
        model = cases.linear()
        model.trainable = False
        model.compile(LARS(), "mse")
        with self.assertRaisesRegex(ValueError, "no trainable variables.*Received: model of name"):
            Trainer(model, batch_size=64).fit(*cases.examples(1), verbose=0)

    def test_one_callback(self):
        model, callback = cases.linear(), keras.callbacks.Callback()
        model.compile("sgd", "mse")
        Trainer(model, batch_size=64).fit(*cases.examples(1), epochs=0, callbacks=callback, verbose=0)
        self.assertIs(callback.model, model)
        with self.assertRaisesRegex(ValueError, "all of its epochs again.*Received: BackupAndRestore"):
            Trainer(model, batch_size=64).fit(*cases.examples(1), callbacks=keras.callbacks.BackupAndRestore("backup"))


if __name__ == "__main__":
    tf.test.main()
