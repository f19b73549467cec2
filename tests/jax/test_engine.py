"""The JAX engine takes the steps of the TensorFlow engine, on any number of devices, with the update sharded or not.

`test_on_jax.py` runs this file on JAX, with eight logical CPU devices and the TensorFlow engine's results in a file.
"""

import contextlib
import functools
import os
import pathlib
import pickle
import re
import tempfile
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LARS
from lars_keras.layerwise import MEASURES
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.recovery import CheckpointCallback, fit_with_recovery
from lars_keras.training import Trainer
from tests import step_cases as cases

BACKEND = keras.backend.backend()
ENGINES = 2e-6  # between the two engines, five updates in float32; the sums have other orders
SHARDS = 1e-6  # between any two ways to shard the work, in float32
FROM_TENSORFLOW = "TENSORFLOW_RESULTS"
TELEMETRY = "telemetry"
# Keras converts tensors and variables in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

MODELS = {
    "hidden": cases.hidden,
    "batch_norm": cases.batch_norm(),
    "synchronized": cases.batch_norm(synchronized=True),
    "wide": lambda: keras.Sequential(  # large enough to be sharded
        [
            keras.Input((cases.FEATURES,)),
            keras.layers.Dense(256, "relu"),
            keras.layers.Reshape((1, 1, 256)),
            keras.layers.Conv2D(256, 1, activation="relu"),  # a kernel with dimensions of 1
            keras.layers.Flatten(),
            keras.layers.Dense(cases.CLASSES),
        ]
    ),
}
OPTIMIZERS = {
    **cases.OPTIMIZERS,
    "ema": lambda: cases.OPTIMIZERS["lars"](use_ema=True, ema_momentum=0.8, global_clipnorm=0.5),
    "adam": lambda: keras.optimizers.Adam(0.01),
}


def on(backend):
    """Return a decorator that keeps a test class on one backend."""
    return lambda test: test if BACKEND == backend else None


def distribution(devices, shard_optimizer_state=False):
    """Return a context in which models and trainers are on so many devices; 0 for none."""
    if not devices:
        return contextlib.nullcontext()
    import jax

    from lars_keras.training.jax.cluster import ShardedDataParallel

    mesh = keras.distribution.DeviceMesh((devices,), ["batch"], np.array(jax.devices()[:devices]))
    return (ShardedDataParallel if shard_optimizer_state else keras.distribution.DataParallel)(device_mesh=mesh).scope()


def start(model):
    """Return the same first weights on every backend."""
    rng = np.random.default_rng(5)
    return [w if w.ndim < 2 else rng.normal(size=w.shape).astype("f4") / np.sqrt(len(w)) for w in model.get_weights()]


@functools.cache
def trained(
    model,
    optimizer,
    devices=0,
    *,
    strategy="none",
    shard_optimizer_state=False,
    policy="float32",
    updates=cases.UPDATES,
    **options,
):
    """Return weights and slots after `updates` updates, the loss of each, and the trainer."""
    keras.config.set_dtype_policy(policy)
    try:
        scope = (
            cases.strategy(strategy).scope()
            if BACKEND == "tensorflow"
            else distribution(devices, shard_optimizer_state)
        )
        with scope:
            model = MODELS[model]()
            model.set_weights(start(model))
            model.compile(
                OPTIMIZERS[optimizer](),
                keras.losses.CategoricalCrossentropy(from_logits=True),
                weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
            )
            trainer = Trainer(model, batch_size=cases.BATCH, variable_norms=True, **options)
            losses = []
            watch = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: losses.append([logs[n] for n in ("step_loss", "loss", "top1")])
            )
            data = tf.data.Dataset.from_tensor_slices(cases.examples(updates)).batch(50)
            trainer.fit(data, epochs=1, verbose=0, callbacks=[watch])
            scores = trainer.evaluate(data.take(3))
    finally:
        keras.config.set_dtype_policy("float32")
    values = [np.array(keras.ops.convert_to_numpy(v)) for v in [*model.weights, *model.optimizer.variables]]
    return values, [*losses, [scores["loss"], scores["top1"], scores["n"]]], trainer


def difference(actual, expected):
    """Return the largest relative L2 difference of two lists of arrays. No value may be a NaN, which has none."""
    pairs = [(np.float64(a), np.float64(e)) for a, e in zip(actual, expected, strict=True)]
    assert all(np.isfinite(values).all() for pair in pairs for values in pair)
    return max(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30) for a, e in pairs)


CASES = {
    "hidden, lars": ("hidden", "lars", None),
    "hidden, ema": ("hidden", "ema", 8),
    "hidden, adam": ("hidden", "adam", None),
    "batch_norm, lars": ("batch_norm", "lars", 8),
    "synchronized, lars": ("synchronized", "lars", None),
    "wide, lars": ("wide", "lars", None),
}
"""Model, optimizer, examples in a micro-batch."""
QUICK = ("batch_norm, lars", "synchronized, lars", "wide, lars")


def tensorflow_results(names):
    """Return what the TensorFlow engine makes of the named `CASES`, and its telemetry."""
    results = {}
    for name in names:
        model, optimizer, microbatch_size = CASES[name]
        strategy = "mirrored2" if model == "synchronized" else "none"
        results[name] = trained(model, optimizer, microbatch_size=microbatch_size, strategy=strategy)[:2]
    results[TELEMETRY] = trained("wide", "lars", trust_ratios=True)[2].measures
    return results


@on("jax")
class EngineTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.expected = pickle.loads(pathlib.Path(os.environ[FROM_TENSORFLOW]).read_bytes())

    def check(self, actual, expected, tolerance):
        self.assertLess(difference(actual[0], expected[0]), tolerance)
        np.testing.assert_allclose(actual[1], expected[1], rtol=tolerance)

    @parameterized.parameters(*QUICK)
    def test_as_tensorflow(self, name):
        self.check_against_tensorflow(name, 8, name == "wide, lars")

    @parameterized.parameters(("hidden, lars", 0), ("hidden, lars", 8), ("hidden, ema", 2), ("hidden, adam", 0))
    @pytest.mark.slow
    def test_more_as_tensorflow(self, name, devices):
        self.check_against_tensorflow(name, devices, False)

    def check_against_tensorflow(self, name, devices, shard_optimizer_state):
        model, optimizer, microbatch_size = CASES[name]
        actual = trained(
            model, optimizer, devices, microbatch_size=microbatch_size, shard_optimizer_state=shard_optimizer_state
        )
        # Synchronized statistics are differences of two sums, added up in another order.
        self.check(actual, self.expected[name], 2e-5 if model == "synchronized" else ENGINES)

    def test_telemetry_as_tensorflow(self):
        self.check_telemetry(8, True)

    @parameterized.parameters((0, False), (8, False))
    @pytest.mark.slow
    def test_more_telemetry_as_tensorflow(self, devices, shard_optimizer_state):
        self.check_telemetry(devices, shard_optimizer_state)

    def check_telemetry(self, devices, shard_optimizer_state):
        """Norms, trust ratios and rates of the last update."""
        trainer = trained("wide", "lars", devices, shard_optimizer_state=shard_optimizer_state, trust_ratios=True)[2]
        self.assertEqual(list(trainer.measures), ["gradient", "weight", *MEASURES])
        for name, expected in self.expected[TELEMETRY].items():
            self.assertEqual(trainer.measures[name].shape, (1, 6))
            np.testing.assert_allclose(trainer.measures[name], expected, rtol=1e-5, err_msg=name)

    def test_data_wait_is_the_time_that_devices_stand_idle(self):
        model = cases.hidden()
        model.compile(LARS(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
        waits, after_pauses, elapsed = cases.waits_for_slow_batches(model)
        self.assertBetween(sum(waits), 0.6, elapsed)
        # The least: on a busy machine some of them wait for a processor.
        self.assertLess(min(after_pauses), 0.15)  # half of what one that counts the time between updates would say

    def test_shards_change_nothing(self):
        self.check_shards("lars", None)

    @parameterized.parameters(("ema", 2), ("adam", None))
    @pytest.mark.slow
    def test_shards_of_other_optimizers(self, optimizer, microbatch_size):
        self.check_shards(optimizer, microbatch_size)

    def check_shards(self, optimizer, microbatch_size):
        *replicated, _ = trained("wide", optimizer, 8, microbatch_size=microbatch_size)
        *sharded, trainer = trained("wide", optimizer, 8, microbatch_size=microbatch_size, shard_optimizer_state=True)
        self.check(sharded, replicated, SHARDS)
        kernel = trainer.model.layers[2].kernel
        slots = [v for v in trainer.model.optimizer.variables if v.shape == kernel.shape]
        self.assertNotEmpty(slots)
        for v in (kernel, *slots):
            self.assertEqual(v.value.addressable_shards[0].data.size, v.value.size // 8)

    @pytest.mark.slow
    def test_shards_in_bfloat16(self):
        """Weights are rounded before they are gathered, not after: the same values reach the layers.

        A last bit of a sum in another order may turn a rounding of a later update.
        """
        for updates, tolerance in ((1, SHARDS), (cases.UPDATES, 1e-4)):
            options = {"policy": "mixed_bfloat16", "updates": updates}
            *replicated, _ = trained("wide", "lars", 8, **options)
            *sharded, trainer = trained("wide", "lars", 8, shard_optimizer_state=True, **options)
            self.assertLess(difference(sharded[0], replicated[0]), tolerance)
            *exact, _ = trained("wide", "lars", 8, updates=updates)
            self.assertGreater(difference(sharded[0], exact[0]), 1e-2)
        engine = trainer.engine
        batch = engine.on_devices(tuple(a[: cases.BATCH] for a in cases.examples()))
        text = engine.step.single_update.lower(engine.read_state(), batch).as_text()
        gathered = [line for line in text.splitlines() if "all_gather" in line]
        self.assertLen([line for line in gathered if "x256xbf16>" in line], 1)
        self.assertEqual([line for line in gathered if "x256xf32>" in line], [])

    @pytest.mark.slow
    def test_lower_precision_of_the_traffic(self):
        """After one update: those after it multiply the difference."""
        *exact, _ = trained("wide", "lars", 8, updates=1)
        *rounded, _ = trained("wide", "lars", 8, updates=1, reduce_dtype="bfloat16", shard_optimizer_state=True)
        self.assertBetween(difference(rounded[0], exact[0]), 1e-4, 2**-8)

    def test_devices_share_an_evaluation(self):
        """Share what divides of a last batch; a model that must be scored in one batch keeps it whole."""

        def shards(examples, **metrics):
            with distribution(8):
                model = cases.hidden()
                model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), **metrics)
                trainer = Trainer(model, batch_size=32)
            x, y = (a[:examples] for a in cases.examples())
            trainer.evaluate(x[:8], y[:8])
            score, seen = trainer.engine._score_fn, []

            def recorded(weights, metrics, scalars, batch):
                seen.append(batch[0].sharding.shard_shape(batch[0].shape)[0])
                return score(weights, metrics, scalars, batch)

            trainer.engine._score_fn = recorded
            scores = trainer.evaluate(x, y)
            expected = model.evaluate(x, y, batch_size=examples, verbose=0, return_dict=True)
            for name, value in expected.items():
                np.testing.assert_allclose(scores[name], value, rtol=1e-5)
            self.assertEqual(scores["n"], examples)
            return seen

        class Largest(keras.metrics.Metric):
            def __init__(self):
                super().__init__(name="largest")
                self.sum = self.add_weight(shape=(), initializer="zeros")

            def update_state(self, y_true, y_pred, sample_weight=None):
                self.sum.assign(keras.ops.max(y_pred) - self.sum)

            def result(self):
                return self.sum + 0.0

        self.assertEqual(shards(63), [4, 3, 7])
        self.assertEqual(shards(16), [2])
        self.assertEqual(shards(5), [5])
        self.assertEqual(shards(27, weighted_metrics=["accuracy"]), [3, 3])
        self.assertEqual(shards(27, metrics=[Largest()]), [27])

    def test_dropout_of_ghost_batches(self):
        """The masks follow the place of a ghost batch, wherever it lies."""
        MODELS["dropout"] = cases.dropout
        *one, _ = trained("dropout", "lars", 0, microbatch_size=8)
        *eight, _ = trained("dropout", "lars", 8)
        self.check(eight, one, SHARDS)
        *other, _ = trained("dropout", "lars", 0)
        self.assertGreater(difference(other[0], one[0]), 1e-3)

    def test_ghost_batches_where_processes_alternate(self):
        """In a torus: each process has consecutive ones, as it reads them."""
        from lars_keras.training.jax.mesh import ghost_numbers

        devices = [types.SimpleNamespace(process_index=p) for p in (0, 0, 1, 1, 0, 0, 1, 1, 2, 2)]
        self.assertEqual(list(ghost_numbers(devices)), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9])

    def test_loss_scaling(self):
        """A value that is not finite on one device skips the update on all, and halves the scale."""
        with distribution(8):
            model = cases.hidden()
            optimizer = keras.optimizers.LossScaleOptimizer(cases.OPTIMIZERS["lars"](), initial_scale=8.0)
            model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
            x, y = (a.copy() for a in cases.examples())
            x[2 * cases.BATCH + 20] = np.inf
            norms = []
            trainer = Trainer(model, batch_size=cases.BATCH, variable_norms=True)
            watch = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: norms.append(trainer.measures["gradient"][0])
            )
            trainer.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(64), epochs=1, verbose=0, callbacks=[watch])
        self.assertEqual([bool(n.any()) for n in norms], [True, True, False, True, True])
        self.assertEqual(int(optimizer.iterations.value), cases.UPDATES - 1)
        self.assertEqual(float(optimizer.dynamic_scale.value), 4.0)
        self.assertTrue(all(np.isfinite(w).all() for w in model.get_weights()))

    @parameterized.parameters((None, True), (2, True))
    def test_one_reduction_of_the_gradients(self, microbatch_size, shard_optimizer_state):
        self.check_one_reduction(microbatch_size, shard_optimizer_state)

    @parameterized.parameters((None, False), (2, False))
    @pytest.mark.slow
    def test_one_reduction_of_replicated_gradients(self, microbatch_size, shard_optimizer_state):
        self.check_one_reduction(microbatch_size, shard_optimizer_state)

    def check_one_reduction(self, microbatch_size, shard_optimizer_state):
        """All gradients are reduced once in the compiled programs of an update, after the last micro-batch."""
        *_, trainer = trained(
            "wide", "lars", 8, microbatch_size=microbatch_size, shard_optimizer_state=shard_optimizer_state
        )
        engine = trainer.engine
        state = engine.read_state()
        x, y = (a[: trainer.microbatch_size * 8] for a in cases.examples())
        data = engine.on_devices((x, y))
        if microbatch_size is None:
            programs = [engine.step.single_update.lower(state, data)]
        else:
            weights, sums = engine.step.begin(state)
            scalars = engine.step.scalars_of(state)
            inputs = weights or state["trainable"], state["batch_stats"], state["rng_state"], scalars, data, np.int32(0)
            accumulate = engine.step.accumulate.lower(sums, *inputs).compile().as_text()
            self.assertNotRegex(accumulate, "all-reduce|reduce-scatter|all-gather|all-to-all")
            programs = [engine.step.finish.lower(state, sums, state["rng_state"])]
        text = programs[0].compile().as_text()
        reduced = 0
        for line in text.splitlines():
            if found := re.search(r"= (.*?) (all-reduce|reduce-scatter)(?:-start)?\(", line):
                shards = 8 if found[2] == "reduce-scatter" else 1
                for dims in re.findall(r"f32\[([\d,]+)\]", found[1]):
                    reduced += shards * int(np.prod([int(d) for d in dims.split(",")]))
        kernels = sum(v.value.size for v in trainer.model.trainable_variables)
        self.assertBetween(reduced, kernels, kernels + 64)
        self.assertEqual("reduce-scatter" in text, shard_optimizer_state)

    def test_what_is_refused(self):
        def compiled(model, optimizer):
            model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
            return model

        data = tf.data.Dataset.from_tensor_slices(cases.examples(1)).batch(64)
        with self.assertRaisesRegex(ValueError, "microbatch_size"):
            Trainer(compiled(cases.linear(), LARS(gradient_accumulation_steps=2)), batch_size=64).fit(data)
        for option, received in (({"jit_compile": False}, "jit_compile=False"), ({"reduce_dtype": "int8"}, "=int8")):
            with self.assertRaisesRegex(ValueError, received):
                Trainer(compiled(cases.linear(), LARS()), batch_size=64, **option).fit(data)
        scaled = keras.optimizers.LossScaleOptimizer(LARS())
        with self.assertRaisesRegex(ValueError, "trust_ratios.*mixed_float16"):
            Trainer(compiled(cases.linear(), scaled), batch_size=64, trust_ratios=True).fit(data)

    def test_resume_to_the_last_bit(self):
        self.check_resume(8, True)

    @pytest.mark.slow
    def test_resume_on_one_device(self):
        self.check_resume(0, False)

    def check_resume(self, devices, shard_optimizer_state):
        """Train with batch normalization, dropout, a moving average, and a break within an epoch."""
        x, y = cases.examples(11)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(50).repeat()

        def run(folder, stop_after=None):
            keras.utils.set_random_seed(1)
            with distribution(devices, shard_optimizer_state):
                model = keras.Sequential(
                    [
                        keras.Input((cases.FEATURES,)),
                        keras.layers.Dense(256, use_bias=False),
                        keras.layers.BatchNormalization(),
                        keras.layers.ReLU(),
                        keras.layers.Dropout(0.3, seed=2),
                        keras.layers.Dense(256),
                        keras.layers.Dense(cases.CLASSES),
                    ]
                )
                model.compile(
                    OPTIMIZERS["ema"](),
                    keras.losses.CategoricalCrossentropy(from_logits=True),
                    weighted_metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
                )
                trainer = Trainer(model, batch_size=64, microbatch_size=4)
                folder = CheckpointManager(folder)
                if checkpoint := folder.latest():
                    trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], data)
                seen = {}

                def note(batch, logs):
                    seen[batch] = {k: v for k, v in logs.items() if k != "data_wait"}  # time differs
                    if batch + 1 == stop_after:
                        raise KeyboardInterrupt

                save = CheckpointCallback(trainer, folder, SavePolicy(updates=1))
                watch = keras.callbacks.LambdaCallback(on_train_batch_end=note)
                with contextlib.suppress(KeyboardInterrupt):
                    fit_with_recovery(
                        data,
                        save,
                        epochs=2,
                        steps_per_epoch=5.5,
                        validation_data=data.take(2),
                        callbacks=[save, watch],
                        verbose=0,
                    )
                folder.wait()
                return trainer.snapshot()[0], seen

        with tempfile.TemporaryDirectory() as folder:
            uninterrupted, logs = run(f"{folder}/a")
            run(f"{folder}/b", stop_after=8)
            again, later = run(f"{folder}/b")
        self.assertEqual(list(later), [8, 9, 10])
        self.assertEqual(later, {k: logs[k] for k in later})
        for name, value in uninterrupted.items():
            np.testing.assert_array_equal(again[name], value, name)
