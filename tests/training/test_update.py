"""What stands between reduced gradients and new weights: clipping, loss scaling, averaging, decay, constraints."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import LAMB, LARS
from lars_keras._keras_internals import APPLY_PARTS
from lars_keras.layerwise import MEASURES
from lars_keras.training import Trainer
from lars_keras.training.tensorflow.update import apply_update, check_rule
from tests import step_cases as cases
from tests.training.test_step import difference

OPTIONS = (
    {"clipnorm": 0.05},
    {"global_clipnorm": 0.05},
    {"clipvalue": 0.01},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.5},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    {"loss_scale_factor": 1024.0},
)


class OptionsTest(parameterized.TestCase, tf.test.TestCase):
    """Each option of the base optimizer means on N replicas what it means on one device in stock Keras."""

    @parameterized.parameters(*OPTIONS)
    def test_equals_stock_fit(self, **option):
        self.check("mirrored2", option)

    @parameterized.product(strategy=("none", "mirrored8"), option=OPTIONS)
    @pytest.mark.slow
    def test_equals_stock_fit_everywhere(self, strategy, option):
        self.check(strategy, option)

    def test_averages_are_taken_before_constraints(self):
        def make_model():
            constraint = keras.constraints.MaxNorm(0.5)
            return keras.Sequential(
                [keras.Input((cases.FEATURES,)), keras.layers.Dense(cases.CLASSES, kernel_constraint=constraint)]
            )

        self.check("none", {"use_ema": True, "ema_momentum": 0.5}, make_model)

    @parameterized.parameters(keras.optimizers.Nadam, keras.optimizers.Muon)
    def test_optimizers_that_are_more_than_their_step(self, optimizer):
        base = keras.optimizers.Optimizer
        if all(getattr(optimizer, name) is getattr(base, name) for name in APPLY_PARTS):
            self.skipTest(f"in Keras {keras.__version__}, {optimizer.__name__} is no more than its update_step")
        with self.assertRaisesRegex(ValueError, f"{optimizer.__name__} also overrides"):
            cases.trained(cases.hidden, optimizer)

    def test_gradients_changed_on_the_way(self):
        """Keras's loop calls `apply_gradients` on TensorFlow, and `Trainer` does not."""

        class Frozen(keras.optimizers.SGD):
            def apply_gradients(self, grads_and_vars, **options):
                return super().apply_gradients([(0.0 * g, v) for g, v in grads_and_vars], **options)

        with self.assertRaisesRegex(ValueError, "Frozen also overrides .*apply_gradients"):
            cases.trained(cases.hidden, Frozen)

    def test_subclasses_of_ours_and_of_loss_scaling(self):
        class Own(LARS):
            def update_variables(self, gradients, variables, learning_rate):
                super().update_variables([0.0 * g for g in gradients], variables, learning_rate)

        class Scaled(keras.optimizers.LossScaleOptimizer):
            def apply(self, grads, trainable_variables=None):
                super().apply([0.0 * g for g in grads], trainable_variables)

        def patched():
            optimizer = keras.optimizers.SGD()
            optimizer.apply = lambda grads, variables=None: None
            return optimizer

        class Rule(LARS):
            def rule(self, w, g, slots, lr, t, role):
                return super().rule(w, 0.0 * g, slots, lr, t, role)

        for make, message in (
            (Own, "Own also overrides .*update_variables"),
            (lambda: Scaled(keras.optimizers.SGD()), "Scaled also overrides .*apply"),
            (lambda: keras.optimizers.LossScaleOptimizer(Own()), "Own also overrides .*update_variables"),
            (patched, "SGD also overrides .*apply"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                cases.trained(cases.hidden, make)
        for allowed in (Rule(), keras.optimizers.LossScaleOptimizer(Rule()), LAMB()):
            check_rule(allowed)

    def check(self, strategy, option, make_model=cases.hidden):
        def optimizer():
            return keras.optimizers.SGD(0.1, momentum=0.9, **option)

        trainer, _ = cases.trained(make_model, optimizer, strategy, microbatch_size=8)
        keras.utils.set_random_seed(1)
        stock = make_model()
        stock.compile(optimizer(), keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
        x, y = cases.examples()
        stock.fit(x, y, batch_size=cases.BATCH, shuffle=False, verbose=0)
        expected = [v.numpy() for v in [*stock.weights, *stock.optimizer.variables]]
        actual = cases.state(trainer)
        self.assertLess(difference(actual, dict(zip(actual, expected, strict=True))), (2e-6,))

    @parameterized.parameters(1, 2)
    def test_norm_of_the_clipped_update(self, replicas):
        self.check_norm_of_the_clipped_update(replicas)

    @pytest.mark.slow
    def test_norm_of_the_clipped_update_of_eight(self):
        self.check_norm_of_the_clipped_update(8)

    def check_norm_of_the_clipped_update(self, replicas):
        strategy = "none" if replicas == 1 else f"mirrored{replicas}"
        start = None

        def make_model():
            nonlocal start
            model = cases.linear()
            start = [w.copy() for w in model.get_weights()]
            return model

        def optimizer():
            return keras.optimizers.SGD(1.0, global_clipnorm=0.01)

        trainer, _ = cases.trained(make_model, optimizer, strategy, microbatch_size=4)
        moved = [w - s for w, s in zip(trainer.model.get_weights(), start, strict=True)]
        # The gradients of so short a walk are nearly parallel; each of the five updates has norm 0.01.
        norm = np.sqrt(sum(np.sum(m.astype("float64") ** 2) for m in moved))
        self.assertBetween(norm, 0.03, 0.0500001)

    def test_constraint(self):
        def make_model():
            return keras.Sequential(
                [keras.Input((cases.FEATURES,)), keras.layers.Dense(cases.CLASSES, kernel_constraint="non_neg")]
            )

        trainer, _ = cases.trained(make_model, cases.OPTIMIZERS["lars"], "mirrored2")
        kernel = trainer.model.get_weights()[0]
        self.assertAllGreaterEqual(kernel, 0.0)
        self.assertGreater(kernel.max(), 0.0)

    def test_variables_without_decay(self):
        """Exclusions of Keras's own count in `Trainer`, too."""
        results = []
        for in_trainer in (False, True):
            keras.utils.set_random_seed(1)
            model, optimizer = cases.hidden(), keras.optimizers.SGD(0.1, weight_decay=0.5)
            optimizer.exclude_from_weight_decay(var_names=["bias"])
            model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
            if in_trainer:
                Trainer(model, batch_size=cases.BATCH).fit(*cases.examples(), shuffle=False, verbose=0)
            else:
                model.fit(*cases.examples(), batch_size=cases.BATCH, shuffle=False, verbose=0)
            results.append(model.get_weights())
        for actual, expected in zip(*results, strict=True):
            self.assertAllClose(actual, expected, rtol=1e-5, atol=1e-7)

    def test_new_values_are_not_clipped(self):
        """The "gradient" of a float8 layer's history is its new value, and no part of the global norm."""
        weight, history = keras.Variable([1.0]), keras.Variable([1.0])
        history.overwrite_with_gradient = True
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
        optimizer.build([weight, history])
        apply_update(optimizer, [tf.constant([0.5]), tf.constant([30.0])], [weight, history])
        self.assertAllClose([weight[0], history[0]], [0.5, 30.0])


class LossScaleTest(parameterized.TestCase, tf.test.TestCase):
    """With float16 a value that is not finite, on any replica, skips the update on all of them."""

    @parameterized.parameters(("none", 0), ("mirrored2", 37))
    def test_skip(self, strategy, bad_example):
        self.check_skip(strategy, bad_example)

    @pytest.mark.slow
    def test_skip_of_eight(self):
        self.check_skip("mirrored8", 63)

    def check_skip(self, strategy, bad_example):
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        keras.config.set_dtype_policy("mixed_float16")
        keras.utils.set_random_seed(1)
        with cases.strategy(strategy).scope():
            model = cases.linear()
            model.compile(LARS(1.0, trust_coefficient=0.02), keras.losses.CategoricalCrossentropy(from_logits=True))
        optimizer = model.optimizer
        self.assertIsInstance(optimizer, keras.optimizers.LossScaleOptimizer)
        x, y = cases.examples(3)
        x[cases.BATCH + bad_example] = np.inf  # in the second of three updates
        weights, scales, updates = [], [], []

        def record(batch, logs):
            weights.append([v.numpy() for v in [*model.weights, *optimizer.inner_optimizer.variables]])
            scales.append(optimizer.dynamic_scale.numpy())
            updates.append(optimizer.iterations.numpy())
            if strategy != "none":
                first, *others = model.layers[-1].kernel.value.values
                for copy in others:
                    self.assertAllEqual(copy, first)

        Trainer(model, batch_size=cases.BATCH, microbatch_size=4).fit(
            tf.data.Dataset.from_tensor_slices((x, y)).batch(64),
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=record)],
        )
        self.assertEqual(updates, [1, 1, 2])
        self.assertEqual(scales, [2.0**15, 2.0**14, 2.0**14])
        for before, after in zip(weights[0], weights[1], strict=True):
            self.assertAllEqual(before, after)
        self.assertNotAllEqual(weights[1][0], weights[2][0])
        self.assertAllInSet(np.isfinite(np.concatenate([w.ravel() for w in weights[2]])), [True])

    def test_measures_of_a_skipped_update(self):
        """An update that loss scaling skips has no norms: it is no divergence."""
        keras.utils.set_random_seed(1)
        model = cases.linear()
        optimizer = keras.optimizers.LossScaleOptimizer(LARS(1.0), initial_scale=8.0)
        model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
        x, y = cases.examples(3)
        x[cases.BATCH] = np.inf
        trainer = Trainer(model, batch_size=cases.BATCH, variable_norms=True, trust_ratios=True)
        found = []

        def record(batch, logs):
            found.append([bool(np.any(trainer.measures[name][0])) for name in ("gradient", *MEASURES)])

        watch = keras.callbacks.LambdaCallback(on_train_batch_end=record)
        trainer.fit(x, y, shuffle=False, verbose=0, callbacks=watch)
        self.assertEqual(found, [[True] * 5, [False] * 5, [True] * 5])

    def test_the_scale_grows(self):
        model = cases.linear()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), 8.0, dynamic_growth_steps=2)
        model.compile(optimizer, "mse")
        scales = []
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: scales.append(float(optimizer.dynamic_scale))
        )
        Trainer(model, batch_size=cases.BATCH).fit(*cases.examples(5), verbose=0, callbacks=watch)
        self.assertEqual(scales, [8.0, 16.0, 16.0, 32.0, 32.0])

    def test_norms_are_those_of_the_gradients_while_the_scale_grows(self):
        def norms(make_optimizer):
            trainer, _ = cases.trained(cases.hidden, make_optimizer, variable_norms=True)
            return trainer.measures["gradient"]

        def growing():
            return keras.optimizers.LossScaleOptimizer(cases.OPTIMIZERS["lars"](), 8.0, dynamic_growth_steps=1)

        self.assertAllClose(norms(growing), norms(cases.OPTIMIZERS["lars"]), rtol=1e-5)


if __name__ == "__main__":
    tf.test.main()
