"""`--model=package.module:function`: a network of the user's in `train.py`, from its start to its scoring."""

import json
import pathlib
import sys
import tempfile
import unittest.mock

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import models
from flags.config import RunConfig
from running.model import make_model
from tests import prepared
from tests.cli.runs import SMALL, parse_only, run

MODULE = """
import keras


class Halve(keras.layers.Layer):
    def call(self, x):
        return x / 2


def build(image_shape, num_classes):
    inputs = keras.Input(image_shape, dtype="uint8")
    x = Halve()(keras.layers.Rescaling(1 / 127.5, -1)(inputs))
    x = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Conv2D(8, 3, 2)(x))
    x = keras.layers.GlobalMaxPooling2D()(keras.ops.relu(x))
    return keras.Model(inputs, keras.layers.Dense(num_classes)(x))


def one_class_less(image_shape, num_classes):
    return build(image_shape, num_classes - 1)


def no_model(image_shape, num_classes):
    return build


shared = keras.layers.BatchNormalization(name="shared")
scale = keras.layers.Rescaling(1 / 255)  # without weights, so nothing is shared


def with_shared_layer(image_shape, num_classes):
    model = build(image_shape, num_classes)
    inner = keras.Sequential([keras.Input((num_classes,)), shared])
    return keras.Model(model.input, inner(scale(model.output)))


def sequential(image_shape, num_classes):
    return keras.Sequential([keras.Input(image_shape, dtype="uint8"), keras.layers.Flatten(), keras.layers.Dense(10)])


class Secret(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def not_saved(image_shape, num_classes):
    model = build(image_shape, num_classes)
    return keras.Model(model.input, Secret(keras.ops.relu)(model.output))


def fails(image_shape, num_classes):
    return keras.Sequential([keras.Input(image_shape), keras.layers.Conv2D(8, 99)])


def subclassed(image_shape, num_classes):
    class Model(keras.Model):
        def call(self, x):
            return x

    return Model()
"""
OWN = [flag for flag in SMALL if not flag.startswith("--model")]


class OwnModelTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.dir / "own_model.py").write_text(MODULE)
        self.enterContext(unittest.mock.patch.object(sys, "path", [str(self.dir), *sys.path]))
        self.addCleanup(self.forget)

    def forget(self):
        sys.modules.pop("own_model", None)

    def test_from_start_to_scoring(self):
        run_dir = self.dir / "run"
        flags = (*OWN, "--learning_rate=5", "--model=own_model:build", f"--run_dir={run_dir}")
        code, out, err = run(*flags)
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"model +own_model:build, \d+ parameters")
        results = json.loads((run_dir / "results.json").read_text())
        self.assertEqual(results["updates"], 30)
        self.assertGreater(results["top1"], 0.9)
        self.forget()  # as in another process
        code, out, err = run(f"--run_dir={run_dir}", "--eval_only")
        self.assertEqual(code, 0, err)
        self.assertIn(f"top-1 {100 * results['top1']:.2f} %", out)

    @parameterized.parameters(
        ("vgg", "--model must be one of alexnet, .*, or package.module:function. Received: --model=vgg$"),
        ("own_model:", "--model must be package.module:function. Received: --model=own_model:$"),
        ("missing:build", "--model: there is no module missing on sys.path. Received: --model=missing:build$"),
        ("own_model:missing", "--model: own_model has no function missing. Received: --model=own_model:missing$"),
        (
            "own_model:no_model",
            "--model must return a Keras model. Received: a function from --model=own_model:no_model$",
        ),
        ("own_model:not_saved", "--model cannot be saved: .*Received: --model=own_model:not_saved$"),
        ("own_model:subclassed", "must return a functional or Sequential model .* shapes None and None"),
        ("own_model:one_class_less", r"to 10 logits. Received: shapes \(None, 16, 16, 1\) and \(None, 9\)"),
    )
    def test_refused(self, name, message):
        code, out, err = run(*OWN, f"--model={name}", f"--run_dir={self.dir}/run")
        self.assertEqual(code, 2, out + err)
        self.assertRegex(err.strip(), message)
        self.assertFalse((self.dir / "run").exists())

    def test_a_sequential_model_is_scored_on_views(self):
        model = make_model(RunConfig(model="own_model:sequential"), prepared.digits_data())
        images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), "uint8")
        expected = (model(images) + model(images[:, :, ::-1])) / 2
        self.assertAllClose(models.with_views(model, 2)(images), expected)

    def test_layers_that_another_run_has_trained_are_refused(self):
        """They are made at the top of the module, so each run of one process would begin where the last one ended."""
        config, data = RunConfig(model="own_model:with_shared_layer"), prepared.digits_data()
        trained = make_model(config, data)
        with self.assertRaisesRegex(ValueError, "must make new layers at each call.*, whose shared was in an earlier"):
            make_model(config, data)
        del trained
        config = RunConfig(model="own_model:build")
        self.assertLen([make_model(config, data) for _ in range(2)], 2)

    def test_a_mistake_in_it_keeps_its_traceback(self):
        with self.assertRaisesRegex(RuntimeError, "--model=own_model:fails failed") as raised:
            run(*OWN, "--model=own_model:fails", f"--run_dir={self.dir}/run")
        self.assertIsInstance(raised.exception.__cause__, ValueError)

    @parameterized.parameters(
        (
            ["--dataset=folder"],
            "--image_size is needed for a model of your own. Received: --model=m:f --dataset=folder",
        ),
        (["--sync_batch_norm"], "the networks of this project. "),
    )
    def test_flags_that_need_others(self, flags, message):
        code, _, _, err = parse_only("--model=m:f", *flags)
        self.assertEqual(code, 2)
        self.assertIn(message, err)
        self.assertEqual(RunConfig(model="m:f", dataset="folder", image_size=64).input_size, 64)


if __name__ == "__main__":
    tf.test.main()
