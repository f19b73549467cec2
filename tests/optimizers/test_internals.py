"""Private names of Keras, TensorFlow and JAX: a version that renames one fails here, and the failure names it.

`tests/jax/test_on_jax.py` runs this file on JAX, where it looks at JAX's names and at Keras's again.
"""

import ast
import importlib
import inspect
import pathlib
import re

import keras
import numpy as np
from absl.testing import parameterized

from lars_keras import LARS, _keras_internals

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[2]
INTERNALS = ("_keras_internals.py", "_tensorflow_internals.py", "_jax_internals.py")

# What is replaced or called, as parameters in the order in which `_keras_internals` gives them.
METHODS = {
    "apply": ("self", "grads", "trainable_variables"),
    "_backend_apply_gradients": ("self", "grads", "trainable_variables"),
    "_backend_update_step": ("self", "grads", "trainable_variables", "learning_rate"),
    "_get_current_learning_rate": ("self",),
    "_apply_weight_decay": ("self", "variables"),
    "_use_weight_decay": ("self", "variable"),
    "_clip_gradients": ("self", "grads"),
    "_get_variable_index": ("self", "variable"),
    "_update_model_variables_moving_average": ("self", "trainable_variables"),
}


def built(optimizer):
    """Return a model with one of each thing that the helpers look at, and its built optimizer."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    )
    optimizer.build(model.trainable_variables)
    return model, optimizer


class KerasTest(parameterized.TestCase):
    def name(self, owner, name):
        """Return an attribute, or fails with its name."""
        self.assertTrue(hasattr(owner, name), f"Keras {keras.__version__} has no {type(owner).__name__}.{name}")
        return getattr(owner, name)

    @parameterized.parameters(*METHODS)
    def test_method_of_the_optimizer(self, name):
        method = self.name(keras.optimizers.Optimizer, name)
        message = f"Keras {keras.__version__} calls Optimizer.{name} with other arguments"
        self.assertEqual(tuple(inspect.signature(method).parameters), METHODS[name], message)

    def test_parts_of_apply(self):
        for name in _keras_internals.APPLY_PARTS:
            self.name(keras.optimizers.Optimizer, name)
        for name in _keras_internals.LOSS_SCALE_PARTS:
            self.name(keras.optimizers.LossScaleOptimizer, name)

    def test_apply_calls_what_is_replaced(self):
        """A part that `Optimizer.apply` no longer calls would leave the decay of the base class in place."""
        called = []

        class Recorder(_keras_internals.WholeUpdateOptimizer):
            def update_variables(self, gradients, variables, learning_rate):
                called.append([len(gradients), len(variables), float(learning_rate)])

        optimizer = Recorder(0.5, weight_decay=0.1)
        model, _ = built(optimizer)
        before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        optimizer.apply([keras.ops.ones(v.shape) for v in model.trainable_variables])
        self.assertEqual(called, [[4, 4, 0.5]], f"Keras {keras.__version__} has no Optimizer._backend_update_step")
        for v, w in zip(model.trainable_variables, before, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(v),
                w,
                f"Keras {keras.__version__} decays by another method than _apply_weight_decay",
            )

    def test_variables_of_the_optimizer(self):
        model, optimizer = built(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, clipnorm=1.0))
        self.name(optimizer, "_trainable_variables")
        self.name(optimizer, "_model_variables_moving_average")
        for i, variable in enumerate(model.trainable_variables):
            self.assertIs(_keras_internals.optimized_variables(optimizer)[i], variable)
            self.assertEqual(_keras_internals.variable_index(optimizer, variable), i)
            self.assertFalse(_keras_internals.uses_weight_decay(LARS(), variable))
        gradients = _keras_internals.clip_gradients(optimizer, [keras.ops.full((4, 1), 2.0)])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(gradients[0]), np.full((4, 1), 0.5), rtol=1e-6)
        optimizer.iterations.assign(1)
        _keras_internals.update_ema(optimizer)
        for average, v in zip(_keras_internals.ema_variables(optimizer), model.trainable_variables, strict=True):
            self.assertEqual(tuple(average.shape), tuple(v.shape))

    def test_learning_rate(self):
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
        optimizer = keras.optimizers.SGD(schedule)
        self.name(optimizer, "_learning_rate")
        self.assertIs(_keras_internals.learning_rate_of(optimizer), schedule)

    def test_schedule_counts_updates(self):
        """Keras's own optimizers call it with their count of micro-batches."""
        variable = keras.Variable([1.0], name="bias")
        optimizer = LARS(keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0), gradient_accumulation_steps=4)
        message = f"Keras {keras.__version__} gets the rate by another method than _get_current_learning_rate"
        for i in range(8):
            self.assertEqual(float(optimizer.learning_rate), 1.0 if i < 4 else 0.75, message)
            optimizer.apply([keras.ops.ones(1)], [variable])

    def test_layers(self):
        model, _ = built(LARS())
        self.name(model, "_flatten_layers")
        self.assertContainsSubset(model.layers, _keras_internals.layers_of(model, include_self=False))
        self.assertNotIn(model, _keras_internals.layers_of(model, include_self=False))
        self.assertIn(model, _keras_internals.layers_of(model))
        dense = model.layers[0]
        self.name(dense, "_trainable_variables")
        self.assertEqual(_keras_internals.own_trainable_variables(dense), [dense.kernel, dense.bias])
        self.name(dense, "_inbound_nodes")
        self.assertEqual([tuple(t.shape) for t in _keras_internals.output_tensors(dense)], [(None, 3)])

    def test_variable(self):
        with keras.name_scope("scope"):
            cast, kept = (keras.Variable(np.zeros(2), autocast=a, name=f"v{a}") for a in (True, False))
        self.name(cast, "_autocast")
        self.assertTrue(_keras_internals.has_autocast(cast))
        self.assertFalse(_keras_internals.has_autocast(kept))
        if BACKEND == "jax":  # the only backend on which a value is put in place
            self.name(cast, "_value")
            _keras_internals.set_backend_value(cast, np.ones(2, "float32"))
            np.testing.assert_array_equal(cast.value, [1, 1])
            self.assertIs(_keras_internals.backend_value(cast), cast.value)

    def test_masks(self):
        tensor, mask = keras.ops.zeros((2, 3)), keras.ops.ones((2, 3), "bool")
        self.assertIsNone(_keras_internals.mask_of(tensor))
        if BACKEND == "tensorflow":  # arrays of JAX take no attribute
            _keras_internals.set_mask(tensor, mask)
            self.assertIs(_keras_internals.mask_of(tensor), mask)

    def test_compiled_metrics(self):
        for arguments, unweighted in (
            ({"metrics": ["mae"]}, True),
            ({"weighted_metrics": ["mae"]}, False),
            ({}, False),
        ):
            model, _ = built(LARS())
            self.assertFalse(_keras_internals.has_unweighted_metrics(model))
            model.compile("sgd", "mse", **arguments)
            self.name(model, "_compile_metrics")
            message = f"Keras {keras.__version__} has no CompileMetrics._user_metrics"
            self.assertEqual(_keras_internals.has_unweighted_metrics(model), unweighted, message)

    def test_supports_jit(self):
        model, _ = built(LARS())
        self.assertTrue(_keras_internals.supports_jit(model))
        model.layers[0].supports_jit = False
        self.assertFalse(_keras_internals.supports_jit(model))

    def test_compiled_parts(self):
        model, optimizer = built(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse", weighted_metrics=["mae"])
        for name in ("_compile_loss", "_compile_metrics"):
            self.assertIsNotNone(self.name(model, name))
        before, now = (_keras_internals.compiled_parts(model) for _ in range(2))
        self.assertEqual([a is b for a, b in zip(before, now, strict=True)], [True] * 4)
        model.compile(optimizer, "mae", weighted_metrics=["mse"])
        now = _keras_internals.compiled_parts(model)
        self.assertEqual([a is b for a, b in zip(before, now, strict=True)], [True, True, False, False])

    def test_recorded_masks(self):
        loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=0)
        arrays = np.array([0, 1]), np.full((2, 2), 0.5, "float32")
        with _keras_internals.recorded_masks() as masks:
            loss(*arrays)
            keras.losses.MeanSquaredError()(arrays[1], arrays[1])
        loss(*arrays)
        message = f"Keras {keras.__version__} has no apply_mask(sample_weight, mask, dtype, reduction)"
        self.assertLen(masks, 2, message)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(masks[0]), [False, True], message)
        self.assertIsNone(masks[1])

    def test_single_metrics(self):
        model, optimizer = built(LARS())
        model.compile(optimizer, "mse", weighted_metrics=["mae", keras.metrics.AUC()])
        model.evaluate(np.zeros((2, 4)), np.zeros((2, 3)), verbose=0)
        metrics = {type(m).__name__: m for m in _keras_internals.single_metrics(model)}
        self.assertContainsSubset({"Mean", "MeanAbsoluteError", "AUC"}, set(metrics))
        self.name(metrics["MeanAbsoluteError"], "_fn")
        self.assertIs(_keras_internals.metric_function(metrics["MeanAbsoluteError"]), keras.losses.mean_absolute_error)
        self.assertIsNone(_keras_internals.metric_function(metrics["AUC"]))
        (loss,) = _keras_internals.compiled_losses(model)
        self.assertIs(loss.fn, keras.losses.mean_squared_error)
        self.name(model.layers[0], "_get_own_losses")

    def test_seed_state(self):
        model, _ = built(LARS())
        found = [v for v in model.non_trainable_variables if _keras_internals.is_seed_state(v)]
        self.assertLen(found, 1, f"Keras {keras.__version__} no longer ends a seed's path with seed_generator_state")
        self.assertEqual(tuple(found[0].shape), (2,))

    def test_moments_of_batch_normalization(self):
        self.name(keras.layers.BatchNormalization, "_moments")
        layer = keras.layers.BatchNormalization(momentum=0.0)
        layer.build((None, 3))
        self.assertTrue(_keras_internals.has_keras_moments(layer))
        self.assertFalse(_keras_internals.has_keras_moments(keras.layers.Dense(3)))
        self.name(layer, "_reduction_axes")
        self.assertEqual(list(_keras_internals.reduction_axes(layer)), [0])
        x = np.float32(np.random.default_rng(0).normal(2.0, 3.0, (16, 3)))
        layer(x, training=True)
        expected = keras.ops.convert_to_numpy(layer.moving_mean)
        np.testing.assert_allclose(expected, x.mean(0), rtol=1e-5)
        _keras_internals.replace_moments(layer, lambda inputs, mask: (keras.ops.ones(3), keras.ops.ones(3)))
        layer(x, training=True)
        message = f"Keras {keras.__version__} no longer takes BatchNormalization._moments(inputs, mask)"
        np.testing.assert_allclose(keras.ops.convert_to_numpy(layer.moving_mean), [1, 1, 1], err_msg=message)
        _keras_internals.restore_moments(layer)
        layer(x, training=True)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(layer.moving_mean), expected, rtol=1e-6)


class SourceTest(parameterized.TestCase):
    def test_private_names_stand_in_one_file_a_library(self):
        """No other file imports a private module, or reads a private attribute that the project did not define."""
        files = [p for folder in ("lars_keras", "running") for p in sorted((ROOT / folder).rglob("*.py"))]
        trees = {p: ast.parse(p.read_text()) for p in files}
        own = {name for p, tree in trees.items() if p.name not in INTERNALS for name in defined_names(tree)}
        theirs = {name for p, tree in trees.items() if p.name in INTERNALS for name, _ in private_attributes(tree)}
        self.assertContainsSubset({"_get_variable_index", "_moments", "_flatten_layers"}, theirs)
        allowed = own - theirs | {"_exit", "_random_generator"}  # of the module `os`; of KerasCV, in one file
        found = []
        for path, tree in trees.items():
            if path.name not in INTERNALS:
                lines = [line for name, line in private_attributes(tree) if name not in allowed]
                found += [f"{path.relative_to(ROOT)}:{line}" for line in lines + private_imports(tree)]
        self.assertEqual(found, [])


def defined_names(tree):
    """Yield the names of functions and methods, and of the attributes that methods assign to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def private_attributes(tree):
    """Yield name and line of every private attribute of anything but `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and not is_self(node.value):
            yield node.attr, node.lineno


def private_imports(tree):
    """Return the lines that import a private module of a library."""
    private = r"(^|\.)_[a-z]|^jax\.interpreters|^tensorflow\.(python|compiler)|^keras\.src"
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    nodes = [node for node in nodes if not (node.module or "").startswith("lars_keras")]
    return [node.lineno for node in nodes if re.search(private, node.module or "")]


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


if BACKEND == "tensorflow":

    class TensorFlowTest(parameterized.TestCase):
        def test_optimization_barrier(self):
            import tensorflow as tf

            from lars_keras import _tensorflow_internals

            module = importlib.import_module("tensorflow.compiler.tf2xla.ops.gen_xla_ops")
            self.assertTrue(
                hasattr(module, "xla_optimization_barrier"),
                f"TensorFlow {tf.__version__} has no gen_xla_ops.xla_optimization_barrier",
            )

            @tf.function(jit_compile=True)
            def twice(x):
                return _tensorflow_internals.optimization_barrier([x, 2.0 * x])

            x = tf.constant([1.0, 2.0])
            for found, expected in zip(twice(x), ([1.0, 2.0], [2.0, 4.0]), strict=True):
                np.testing.assert_array_equal(found, expected)
            self.assertIn("opt-barrier", twice.experimental_get_compiler_ir(x)(stage="hlo"))


if BACKEND == "jax":
    import jax

    class JaxTest(parameterized.TestCase):
        def test_used_inputs(self):
            from jax.interpreters import partial_eval

            from lars_keras import _jax_internals

            self.assertTrue(hasattr(partial_eval, "dce_jaxpr"), f"JAX {jax.__version__} has no partial_eval.dce_jaxpr")
            self.assertIn(
                "axis_env",
                inspect.signature(jax.make_jaxpr).parameters,
                f"JAX {jax.__version__} has no make_jaxpr(axis_env=)",
            )

            def loss(weights, x):
                return jax.lax.psum(weights[0] * x, "replicas")

            scalar = jax.ShapeDtypeStruct((), "float32")
            used = _jax_internals.used_inputs(loss, [("replicas", 2)], [scalar, scalar], scalar)
            self.assertEqual(used, [True, False, True])

        def test_names_of_compile_stablehlo(self):
            """A CPU's client takes no foreign program: the whole runs in `tests/pod`, where libtpu is installed."""
            for module, name in (
                ("jax._src.compiler", "get_compile_options"),
                ("jax._src.interpreters.mlir", "make_ir_context"),
                ("jax._src.lib.xla_client", "DeviceList"),
                ("jax._src.lib.mlir.ir", "Module"),
            ):
                package, _, last = module.rpartition(".")
                found = getattr(importlib.import_module(package), last, None)
                self.assertTrue(hasattr(found, name), f"JAX {jax.__version__} has no {module}.{name}")
            client = jax.devices()[0].client
            self.assertTrue(hasattr(client, "compile"), f"JAX {jax.__version__} has no Client.compile")
