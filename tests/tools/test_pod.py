"""The pod check of this repository's recipes, and the tables of docs/pod.md."""

import contextlib
import importlib.util
import io
import json
import pathlib
import pickle
import tempfile
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.pod.batch import parse_batch
from lars_keras.pod.chips import CHIPS
from lars_keras.pod.driver import BACKENDS
from lars_keras.pod.measure import Program
from lars_keras.pod.roofline import roofline
from tools import pod_check, pod_recipe
from tools.benchmarks import pod_models, pod_scaling

SMALL = ("--flagfile=flags/recipes/demo.flags", "--batch_size=64", "--microbatch_size=16", "--topology=v5e:2x2")
ROOT = pathlib.Path(__file__).parents[2]


class RecipeTest(tf.test.TestCase):
    def test_every_recipe_gives_a_model_and_its_batch(self):
        recipes = sorted((ROOT / "flags" / "recipes").glob("*.flags"))
        self.assertNotEmpty(recipes)
        for recipe in recipes:
            config = pod_recipe.read_config([f"--flagfile={recipe}"])
            x, y, weight = parse_batch(pod_recipe.batch_spec(config))
            self.assertEqual((x.dtype, y.dtype, weight.shape), ("uint8", "float32", ()))
            options = pod_recipe.check_options(config)
            self.assertEqual(options["batch_size"], config.batch_size)
            pickle.loads(pickle.dumps(options["make_model"]))
            self.assertGreater(pod_recipe.updates_of(config), 0)

    def make(self, recipe):
        """Return the flags and the model of a recipe in float32."""
        policy = keras.config.dtype_policy()
        try:
            config = pod_recipe.read_config([f"--flagfile=flags/recipes/{recipe}.flags", "--precision=float32"])
            return config, pod_recipe.recipe_model(config)
        finally:
            keras.config.set_dtype_policy(policy)

    def test_a_model_with_weights_that_are_computed_from_images(self):
        _, model = self.make("cifar10_fast_1k")
        self.assertEqual(model.input_shape, (None, 32, 32, 3))
        kernel = model.get_layer("whiten").kernel
        self.assertTrue(np.all(np.isfinite(kernel)))
        self.assertGreater(np.std(kernel), 0)

    def test_the_model_is_that_of_the_flags(self):
        config, model = self.make("demo")
        self.assertTrue(model.compiled)
        x, y, _ = parse_batch(pod_recipe.batch_spec(config))
        self.assertEqual(model.input_shape[1:], x.shape)
        self.assertEqual(model.output_shape[1:], y.shape)
        self.assertEqual(model.count_params(), 111_770)
        self.assertEqual(pod_recipe.read_config([]).precision, "mixed_bfloat16")


class CommandTest(parameterized.TestCase, tf.test.TestCase):
    def run_command(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pod_check.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    @parameterized.parameters(
        (("--topology=v9:2x2",), "v5e.*Received: topology=v9:2x2"),
        (("--topology=v5e:2x2", "--batch_size=x"), "batch_size"),
        (("--topology=v5e:2x2", "word"), "Received: word"),
        (("--topology=v5e:2x2", "--momentum=2"), "--momentum must be below 1"),
        (("--topology=v5e:2x2", "--dataset=folder"), "--dataset must be one of .*Received: --dataset=folder"),
        (
            ("--topology=v5e:2x2", "--backend=tensorflow", "--shard_optimizer_state"),
            "for JAX. Received: --backend=tensorflow",
        ),
    )
    def test_one_clear_line(self, arguments, message):
        code, _, err = self.run_command(*arguments)
        self.assertEqual(code, 2)
        self.assertRegex(err, message)
        self.assertLen(err.splitlines(), 1)

    def test_flags_reach_the_check(self):
        with unittest.mock.patch.object(pod_check, "check", side_effect=ValueError("asked")) as check:
            code, _, err = self.run_command(*SMALL, "--backend=both", "--one_size")
        self.assertEqual((code, err), (2, "pod_check: error: asked\n"))
        expected = {"topology": "v5e:2x2", "backend": BACKENDS[0], "search": False, "batch_size": 64}
        asked = check.call_args.kwargs
        self.assertEqual({name: asked[name] for name in expected}, expected)
        self.assertEqual(asked["microbatch_size"], 16)

    def test_flags_that_are_left_out_are_named(self):
        for flags in ([], ["--telemetry_every=50"], ["--telemetry_every=50", "--noise_scale_every=20"]):
            with unittest.mock.patch.object(pod_check, "check", side_effect=ValueError("asked")):
                _, out, _ = self.run_command(*SMALL, *flags)
            said = f"left out: {' and '.join(flags)}; the check has updates without" in out
            self.assertEqual(said, bool(flags), out)

    @pytest.mark.slow  # tests/pod/test_check.py compiles a model for a real chip in every run
    def test_a_small_model_for_a_real_chip(self):
        self.check_a_small_model("jax")

    @pytest.mark.slow
    def test_a_small_model_on_tensorflow(self):
        self.check_a_small_model("tensorflow")

    def check_a_small_model(self, backend):
        if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
            self.skipTest("libtpu, the TPU compiler, is not installed: the extra `pod` has it")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "check.json"
            code, out, err = self.run_command(
                *SMALL,
                f"--backend={backend}",
                f"--out={path}",
                *(["--one_size"] if backend == "tensorflow" else []),
            )
            self.assertEqual(code, 0, err)
            result = json.loads(path.read_text())[backend]
        self.assertIn("verdict      fits", out)
        self.assertEqual((result["devices"], result["microbatch_size"], result["accumulation_steps"]), (4, 16, 1))
        (program,) = result["programs"]
        # 111,770 parameters and their momentum in float32, padded to the tiles of a TPU.
        self.assertBetween(program["arguments"], 2 * 4 * 111_000, 6 * 4 * 111_000)
        reduced = [c for c in program["collectives"] if c["kind"] == "all-reduce" and c["group"] == 4]
        self.assertBetween(sum(c["size"] for c in reduced), 4 * 111_000, 4 * 125_000)
        self.assertEqual(result["largest_microbatch_size"], 16 if backend == "jax" else None)


class PageTest(tf.test.TestCase):
    def test_table_and_plot(self):
        def point(chips, seconds):
            programs = [Program("update", 1, 0, 0, 0, 0, 0, 1e12, seconds * 819e9, 0.0, [])]
            bounds = roofline(programs, CHIPS["v5e"], 1, 8192)
            return {
                "model": "resnet50",
                "batch": 8192,
                "chips": chips,
                "microbatch_size": 32,
                "accumulation_steps": 1,
                "memory": 2**30,
                "roofline": {
                    "seconds": bounds.seconds,
                    "bound": bounds.bound,
                    "seconds_per_update": bounds.seconds_per_update,
                    "images_per_second": bounds.images_per_second,
                },
            }

        points = [point(1, 1.0), point(256, 0.005)]
        last = pod_scaling.table(points).splitlines()[-1]
        self.assertEqual(
            last, "| resnet50 | 8,192 | 256 | 1 x 32 | 1,024 | 5.08 | 5.00 | 0.00 | compute | 1,613,824 | 77% |"
        )
        with tempfile.TemporaryDirectory() as folder:
            pod_scaling.draw(points, f"{folder}/plot.svg")
            self.assertIn("batch 8,192", pathlib.Path(folder, "plot.svg").read_text())

    def test_the_page_has_the_committed_points(self):
        page = (ROOT / "docs" / "pod.md").read_text()
        for tool, name in ((pod_scaling, "pod_scaling"), (pod_models, "pod_models")):
            points = json.loads((ROOT / "results" / f"{name}.json").read_text())["points"]
            self.assertIn(f"\n{tool.table(points)}\n", page)


if __name__ == "__main__":
    tf.test.main()
