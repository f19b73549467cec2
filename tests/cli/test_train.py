"""`train.py` as a user runs it: results, repeatability, and clear errors with exit code 2."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from contextlib import redirect_stderr, redirect_stdout

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import flags
import models
import train
from lars_keras import data as datasets
from lars_keras.data import ArrayData
from lars_keras.runtime.checkpoint import CheckpointManager
from running import callbacks
from running.optimizers import OPTIMIZERS, make_optimizer
from tests.published_recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "--model=lenet1989",
    "--batch_size=64",
    "--microbatch_size=16",
    "--epochs=12",
    "--eval_every=6",
    "--learning_rate=15",
    "--warmup=0",
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
        code, out, err = self.train(*SMALL, "--model=alexnet_small", f"--run_dir={first}")  # which has dropout
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

    @parameterized.parameters("lamb", "adam")
    def test_optimizers(self, optimizer):
        self.check_optimizer(optimizer)

    @parameterized.parameters("sgd", "momentum")
    @pytest.mark.slow
    def test_more_optimizers(self, optimizer):
        self.check_optimizer(optimizer)

    def check_optimizer(self, optimizer):
        code, out, err = self.train(
            "--model=lenet1989",
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

    def test_bfloat16(self):
        self.check_half_precision("mixed_bfloat16")

    @pytest.mark.slow
    def test_float16(self):
        self.check_half_precision("mixed_float16")

    def check_half_precision(self, precision):
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
        self.assertIn("went back to update 0", (self.dir / "r/report.html").read_text())
        self.assertRegex(err, "train.py: The .* is not finite in update [1-5]")

    def test_resume(self):
        """A run is preempted, refuses to go on as another, goes on with its own flags, and says so."""
        run_dir = self.dir / "r"
        stop_after = 5

        def preempt(batch, logs):
            if batch + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)

        progress = keras.callbacks.LambdaCallback(on_train_batch_end=preempt)
        progress.images_per_second = 1.0
        progress.data_wait = 0.0
        with unittest.mock.patch.object(callbacks, "Progress", lambda: progress):
            code, out, err = self.train(*SMALL, f"--run_dir={run_dir}", "--ema_momentum=0.5")
        self.assertEqual(code, 75, out + err)
        self.assertIn("stopped after update 5, saved", err)
        self.assertLen(list((run_dir / "checkpoints").glob("update-00000005-*.npz")), 1)

        with self.subTest("a dry run goes from the start"):
            code, out, err = self.train(f"--run_dir={run_dir}", "--dry_run")
            self.assertEqual(code, 0, err)
            self.assertIn("dry run passed", out)

        with self.subTest("workers that find different checkpoints are refused"):
            with unittest.mock.patch("lars_keras.runtime.recovery.same_on_all_hosts", lambda strategy, mine: mine != 5):
                code, _, err = self.train(f"--run_dir={run_dir}")
            self.assertEqual(code, 2)
            self.assertIn("The hosts found different checkpoints", err)
            self.assertIn("Found by this host: update 5", err)

        with self.subTest("other flags are refused"):
            code, _, err = self.train(f"--run_dir={run_dir}", "--batch_size=32", "--seed=3")
            self.assertEqual(code, 2)
            self.assertIn("--batch_size=32 was 64; --seed=3 was 0", err)
            self.assertIn("--allow_inexact_resume", err)

        with self.subTest("an end that is past is refused"):
            code, _, err = self.train(f"--run_dir={run_dir}", "--epochs=0.1", "--allow_inexact_resume")
            self.assertEqual(code, 2)
            self.assertIn("has taken 5 updates, more than the ", err)

        with self.subTest("other replicas are refused"):
            folder = CheckpointManager(run_dir / "checkpoints")
            saved = folder.latest()
            folder.save(6, saved.arrays, {**saved.metadata, "replicas": 2})
            folder.wait()
            code, _, err = self.train(f"--run_dir={run_dir}")
            self.assertEqual(code, 2)
            self.assertIn("replicas: 1, was 2", err)
            folder.latest().path.unlink()

        with self.subTest("its own flags go on exactly"):
            shutil.copytree(run_dir, self.dir / "inexact")
            code, out, err = self.train(f"--run_dir={run_dir}")
            self.assertEqual(code, 0, err)
            self.assertRegex(out, "went on after update 5, from update-00000005-.*npz")
            report = (run_dir / "report.html").read_text()
            self.assertIn("went on after update 5", report)
            self.assertNotIn("inexactly", report)
            code, _, err = self.train(*SMALL, f"--run_dir={self.dir}/whole", "--ema_momentum=0.5")
            self.assertEqual(code, 0, err)
            resumed, whole = (self.metrics(name) for name in ("r", "whole"))
            self.assertEqual(resumed, whole)

        with self.subTest("other flags are allowed if it is wished, and the report says so"):
            code, _, err = self.train(f"--run_dir={self.dir}/inexact", "--weight_decay=0.01", "--allow_inexact_resume")
            self.assertEqual(code, 0, err)
            self.assertIn(
                "went on inexactly: --weight_decay=0.01 was 0.0005", (self.dir / "inexact/report.html").read_text()
            )

        with self.subTest("a damaged checkpoint is passed over"):
            for path in (run_dir / "checkpoints").iterdir():
                path.write_bytes(path.read_bytes()[:-9])
            (run_dir / "results.json").unlink()
            code, out, err = self.train(f"--run_dir={run_dir}")
            self.assertEqual(code, 0, err)
            self.assertNotIn("went on", out)

    def metrics(self, name):
        events = [json.loads(line) for line in (self.dir / name / "metrics.jsonl").read_text().splitlines()]
        timed = ("seconds", "images_per_second", "data_wait")
        return [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] != "note"]

    @pytest.mark.slow  # tests/data/test_unreadable.py has the parts
    def test_bad_images(self):
        data = few_digits()
        data.unreadable_images.found.update({"record 3 of a": "no JPEG", "record 4 of a": "empty"})

        class Found(keras.callbacks.Callback):
            images_per_second = 1.0
            data_wait = 0.0

            def on_train_batch_end(self, batch, logs):
                if batch == 3:
                    data.unreadable_images.found["record 9 of a"] = "truncated <b>"

        with unittest.mock.patch.object(callbacks, "Progress", Found):
            code, _, err = self.train(*SMALL, f"--run_dir={self.dir}/r", "--max_bad_images=3", data=data)
            self.assertEqual(code, 0, err)
            self.assertEqual(json.loads((self.dir / "r/bad_images.json").read_text())["record 9 of a"], "truncated <b>")
            self.assertEqual(json.loads((self.dir / "r/results.json").read_text())["bad_images"], 3)
            page = (self.dir / "r/report.html").read_text()
            self.assertIn("Update 4: left out an image that cannot be read, record 9 of a: truncated &lt;b&gt;", page)
            del data.unreadable_images.found["record 9 of a"]
            code, _, err = self.train(*SMALL, f"--run_dir={self.dir}/s", "--max_bad_images=2", data=data)
            self.assertEqual(code, 5, err)
            self.assertIn(
                "3 images are unreadable, more than --max_bad_images=2. The last one: record 9 of a: trunc", err
            )

    def test_dry_run(self):
        run_dir = self.dir / "r"
        arguments = (*SMALL, "--model=alexnet_small", f"--run_dir={run_dir}", "--dry_run")
        code, out, err = self.train(*arguments, "--optimizer=adam", "--learning_rate=1")
        self.assertEqual(code, 0, err)
        self.assertEmpty(list(self.dir.iterdir()))
        weights = 4 * (models.get("alexnet_small", num_classes=10, input_shape=(16, 16, 1)).count_params()) / 2**20
        self.assertIn(f"weights per device      {weights:,.1f} MiB", out)
        for line in (
            r"rate, peak +1 at update 1",
            r"rate, last .* at update 30",
            r"optimizer per device +0\.8 MiB",
            r"37 images once each, 11 places of padding in 3 batches",
            r"16 images in .* s, with compiling",
            r"the same bits",
            r"dry run passed; nothing was written",
        ):
            self.assertRegex(out, line)

        with self.subTest("a disk that is too small"):
            full = shutil.disk_usage(self.dir)._replace(free=10**6)
            with unittest.mock.patch.object(shutil, "disk_usage", lambda _: full):
                code, _, err = self.train(*arguments)
            self.assertEqual(code, 2)
            self.assertRegex(err, "1 MiB free, and --keep_checkpoints=3 needs 4 MiB")

    def test_a_full_disk_ends_with_a_message(self):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with unittest.mock.patch.object(np, "savez", full):
            code, _, err = self.train(*SMALL, f"--run_dir={self.dir}/r")
        self.assertEqual(code, 6, err)
        self.assertIn("No space left on device", err)
        self.assertNotIn("Traceback", err)

    def test_two_signals_end_a_process_at_once(self):
        """Even while Python waits for a long call: the first is noted, the second does not wait."""
        program = """
import hashlib, os, signal, threading, time
from lars_keras.runtime.preemption import StopOnSignal
def send():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
with StopOnSignal() as stop:
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
        started = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=200)
        self.assertEqual(started.returncode, 128 + signal.SIGTERM, started.stderr.decode())

    @parameterized.parameters(
        (["--dataset=mnist"], "dataset"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=64", "--microbatch_size=24"], "--microbatch_size must divide --batch_size"),
        (["--batch_size=63", "--strategy=single", "--replicas=2"], "--replicas goes with"),
        (["--batch_size=64", "--tpu=name", "--replicas=2"], "--replicas does not go with --tpu"),
        (["--optimizer=rmsprop"], "optimizer"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--epochs=0"], "--epochs must be above 0"),
        (["--warmup=soon"], "--warmup"),
        (["--warmup=9"], "--warmup must be shorter than the run of 1 updates. Received: --warmup=9"),
        (["--momentum=1"], "--momentum must be below 1"),
        (["--exclude=no_such_layer"], "no_such_layer"),
        (["--exclude=("], "regular expression"),
        (["--strategy=mirrored"], "no GPU"),
        (["--strategy=multi_worker"], "TF_CONFIG"),
        (["--tpu=name", "--strategy=single"], "--tpu goes with"),
        (["--reduce_dtype=bfloat16"], "KERAS_BACKEND=jax"),
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


class OptimizerTest(tf.test.TestCase):
    def test_zero_is_a_value(self):
        variables = [keras.Variable([1.0], name="kernel")]
        for name in OPTIMIZERS:
            made = make_optimizer(name, 0.1, variables, use_ema=True, ema_momentum=0.0, weight_decay=0.0)
            self.assertEqual(made.ema_momentum, 0.0, name)
            self.assertFalse(made.weight_decay, name)


class RecipesTest(tf.test.TestCase):
    def config(self, path):
        values = flags.define()
        values(["train.py", f"--flagfile={path}"])
        return flags.read(values)

    def test_patterns_with_a_comma_are_read_again(self):
        patterns = ("conv[0-9]{1,2}/bias", "gamma", 'a"b')
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "flags.txt")
        path.write_text(
            dataclasses.replace(self.config(ROOT / "flags/recipes/demo.flags"), exclude=patterns).as_flags()
        )
        self.assertEqual(self.config(path).exclude, patterns)

    def test_flagfiles_hold_the_published_values(self):
        published = {(r.model, r.batch_size): r for r in RECIPES}
        models = {r.model for r in RECIPES}
        paths = [path for model in models for path in (ROOT / "flags/recipes").glob(f"{model}_[0-9]*.flags")]
        configs = [self.config(path) for path in paths]
        self.assertCountEqual([(c.model, c.batch_size) for c in configs], list(published))
        for config in configs:
            recipe = published[config.model, config.batch_size]
            for name in ("learning_rate", "epochs", "momentum", "weight_decay", "end_learning_rate"):
                self.assertEqual(getattr(config, name), getattr(recipe, name), (config.model, config.batch_size, name))
            self.assertEqual(config.warmup_duration, f"{recipe.warmup:g} epochs")
            self.assertEqual(config.exclude is None, recipe.exclude_bias_and_norm)
            self.assertEqual(config.microbatch_size, recipe.ghost_batch or config.microbatch_size)
            self.assertEqual((config.schedule, config.power, config.variant), ("polynomial", 2.0, "paper"))


if __name__ == "__main__":
    tf.test.main()
