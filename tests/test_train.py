"""`train.py` as a user runs it: results, repeatability, and clear errors with exit code 2."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest.mock
from contextlib import redirect_stderr, redirect_stdout

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import flags
import train
from lars_keras import data as datasets
from lars_keras.data import ArrayData
from lars_keras.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--model=alexnet_small",
    "--batch_size=64",
    "--microbatch_size=16",
    "--epochs=12",
    "--eval_every=6",
    "--learning_rate=15",
    "--warmup_epochs=0",
    "--excluded_lr_scale=0.05",
    "--weight_decay=0.0005",
)


def few_digits():
    """Returns digits that load at once: 160 training and 37 test images in two easy classes."""
    rng = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n, dtype="int32") % 2
        images = rng.integers(0, 60, (n, 16, 16, 1), dtype="uint8")
        images[labels == 1, 4:12, 4:12] += 150
        return images, labels

    return ArrayData("digits", split(160), split(37), 10, description="two easy classes")


class TrainTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.addCleanup(keras.config.set_dtype_policy, "float32")

    def train(self, *arguments, data=None):
        """Runs train.py in this process on small data; returns exit code, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with (
            unittest.mock.patch.object(datasets, "load", lambda *_, **__: data or few_digits()),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = train.run(["train.py", *arguments])
        return code, out.getvalue(), err.getvalue()

    def test_run_repeat_and_evaluate(self):
        first, again = self.dir / "first", self.dir / "again"
        code, out, err = self.train(*SMALL, f"--run_dir={first}")
        self.assertEqual(code, 0, err)
        for text in ("1 replica x 4 micro-batches x 16", "conv1/kernel", "n=37", "report.html"):
            self.assertIn(text, out)
        results = json.loads((first / "results.json").read_text())
        self.assertEqual((results["n"], results["updates"]), (37, 30))
        self.assertEqual(results["top5"], 1.0)
        events = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([e["update"] for e in events if e["event"] == "update"], list(range(1, 31)))
        self.assertEqual([e["update"] for e in events if e["event"] == "eval"], [15, 30])
        # So short a run says little about moving statistics, so not the evaluation.
        self.assertGreater([e["top1"] for e in events if e["event"] == "update"][-1], 0.9)
        self.assertNotEmpty(list((first / "tensorboard").rglob("events*")))

        with self.subTest("the flagfile in the run folder repeats the run"):
            code, _, err = self.train(f"--flagfile={first / 'flags.txt'}", f"--run_dir={again}")
            self.assertEqual(code, 0, err)
            repeated = json.loads((again / "results.json").read_text())
            for key in ("top1", "loss"):
                self.assertEqual(repeated[key], results[key])

        with self.subTest("eval_only scores the saved model"):
            code, out, err = self.train(f"--run_dir={first}", "--eval_only", "--batch_size=64")
            self.assertEqual(code, 0, err)
            self.assertIn(f"top-1 {results['top1']:.2%}  top-5 100.00%  loss {results['loss']:.4f}  n=37", out)

        with self.subTest("nothing is written over"):
            before = (first / "results.json").read_bytes()
            code, _, err = self.train(*SMALL, f"--run_dir={first}")
            self.assertEqual(code, 2)
            self.assertIn("holds a finished run", err)
            self.assertEqual((first / "results.json").read_bytes(), before)

        with self.subTest("the saved model needs nothing but its own library"):
            model = keras.models.load_model(first / "model.keras")
            self.assertEqual(type(model.optimizer).__name__, "LARS")
            self.assertEqual(model.optimizer.iterations.numpy(), 30)

    @parameterized.parameters("lamb", "sgd", "momentum", "adam")
    def test_optimizers(self, optimizer):
        code, out, err = self.train(
            "--batch_size=64",
            "--steps=2",
            f"--optimizer={optimizer}",
            "--learning_rate=0.01",
            "--schedule=step",
            f"--run_dir={self.dir}/r",
        )
        self.assertEqual(code, 0, err)
        self.assertIn("2 updates", out)
        self.assertNotIn("WARNING", "".join(line for line in out.splitlines(True) if "only 2 updates" not in line))

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_half_precision(self, precision):
        code, _, err = self.train(
            *SMALL,
            f"--precision={precision}",
            "--schedule=cosine",
            "--label_smoothing=0.1",
            f"--run_dir={self.dir}/r",
        )
        self.assertEqual(code, 0, err)
        events = [json.loads(line) for line in (self.dir / "r/metrics.jsonl").read_text().splitlines()]
        # So short a run says little about moving statistics, so not the evaluation.
        self.assertGreater([e["top1"] for e in events if e["event"] == "update"][-1], 0.9)

    def test_divergence(self):
        code, _, err = self.train(*SMALL, "--learning_rate=1e30", f"--run_dir={self.dir}/r")
        self.assertEqual(code, 3)
        self.assertRegex(err, "train.py: The .* is not finite in update [1-5]")

    @parameterized.parameters(
        (["--dataset=mnist"], "dataset"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=64", "--microbatch_size=24"], "--microbatch_size must divide --batch_size"),
        (["--batch_size=63", "--strategy=one", "--replicas=2"], "--replicas goes with"),
        (["--optimizer=rmsprop"], "optimizer"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--epochs=0"], "--epochs must be above 0"),
        (["--warmup_epochs=soon"], "--warmup_epochs"),
        (["--warmup_epochs=9"], "warmup_updates"),
        (["--momentum=1"], "--momentum must be below 1"),
        (["--exclude=no_such_layer"], "no_such_layer"),
        (["--exclude=("], "regular expression"),
        (["--strategy=mirrored"], "no GPU"),
        (["--strategy=multi_worker"], "TF_CONFIG"),
        (["--eval_only"], "--run_dir"),
        (["--variant=ratio_on_momentum", "--nesterov"], "Nesterov"),
        (["stray"], "stray"),
        (["--flagfile=no_such_file.flags"], "no_such_file"),
    )
    def test_usage_errors(self, arguments, message):
        run_dir = self.dir / "r"
        code, out, err = self.train(f"--run_dir={run_dir}" if arguments != ["--eval_only"] else "--seed=0", *arguments)
        self.assertEqual(code, 2, out + err)
        self.assertIn(message, err)
        self.assertFalse(run_dir.exists())

    def test_missing_data_is_named_in_a_real_process(self):
        process = subprocess.run(
            [sys.executable, "train.py", "--dataset=imagenet2012", f"--data_dir={self.dir}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self.assertEqual(process.returncode, 2, process.stderr)
        self.assertIn("lars_keras.data.prepare", process.stderr)
        self.assertNotIn("Traceback", process.stderr)


class RecipesTest(tf.test.TestCase):
    def config(self, path):
        values = flags.define()
        values(["train.py", f"--flagfile={path}"])
        return flags.read(values)

    def test_flagfiles_hold_the_published_values(self):
        files = sorted((ROOT / "flags").glob("*.flags"))
        published = {(r.model, r.batch_size): r for r in RECIPES}
        configs = [self.config(path) for path in files if path.stem != "demo"]
        self.assertCountEqual([(c.model, c.batch_size) for c in configs], list(published))
        for config in configs:
            recipe = published[config.model, config.batch_size]
            for name in ("learning_rate", "epochs", "momentum", "weight_decay", "end_learning_rate"):
                self.assertEqual(getattr(config, name), getattr(recipe, name), (config.model, config.batch_size, name))
            self.assertEqual(config.warmup_duration, f"{recipe.warmup_epochs:g} epochs")
            self.assertEqual(config.exclude is None, recipe.exclude_bias_and_norm)
            self.assertEqual((config.schedule, config.power, config.variant), ("polynomial", 2.0, "paper"))


if __name__ == "__main__":
    tf.test.main()
