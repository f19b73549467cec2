"""`train.py` as a user runs it: results, repeatability, and clear errors with exit code 2."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import models
import running.start
import train
from running import callbacks, rehearsal
from tests.cli.runs import SMALL, few_digits, run

ROOT = pathlib.Path(__file__).parents[2]


class TrainTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.addCleanup(keras.config.set_dtype_policy, "float32")

    def test_run_repeat_and_evaluate(self):
        first, again = self.dir / "first", self.dir / "again"
        code, out, err = run(*SMALL, "--model=alexnet_small", f"--run_dir={first}", draw=True)  # which has dropout
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
        self.assertGreaterEqual((first / "report.html").read_text().count("<svg"), 4)

        with self.subTest("the flagfile in the run folder repeats the run"):
            code, _, err = run(f"--flagfile={first / 'flags.txt'}", f"--run_dir={again}")
            self.assertEqual(code, 0, err)
            repeated = json.loads((again / "results.json").read_text())
            for key in ("top1", "loss"):
                self.assertEqual(repeated[key], results[key])

        with self.subTest("eval_only scores the saved model"):
            code, out, err = run(f"--run_dir={first}", "--eval_only", "--batch_size=64")
            self.assertEqual(code, 0, err)
            self.assertIn(f"top-1 {100 * results['top1']:.2f} %  top-5 100.00 %  loss {results['loss']:.4f}  n=37", out)

            code, out, err = run(f"--run_dir={first}", "--eval_only", "--model=lenet1989")
            self.assertEqual((code, out), (2, ""))
            self.assertIn("Received: --model=lenet1989 where the run has alexnet_small\n", err)

        with self.subTest("nothing is written over"):
            before = (first / "results.json").read_bytes()
            code, _, err = run(*SMALL, f"--run_dir={first}")
            self.assertEqual(code, 2)
            self.assertIn("holds a finished run", err)
            self.assertEqual((first / "results.json").read_bytes(), before)

        with self.subTest("the saved model needs nothing but its own library"):
            model = keras.models.load_model(first / "model.keras")
            self.assertEqual(type(model.optimizer).__name__, "LARS")
            self.assertEqual(model.optimizer.iterations.numpy(), 30)

    def test_lamb(self):
        self.check_optimizer("lamb")

    @parameterized.parameters("sgd", "momentum", "adam")  # test_dry_run takes two updates of Adam
    @pytest.mark.slow
    def test_more_optimizers(self, optimizer):
        self.check_optimizer(optimizer)

    def check_optimizer(self, optimizer):
        code, out, err = run(
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
        saved = keras.models.load_model(self.dir / "r/model.keras").optimizer
        name, momentum = {"lamb": ("LAMB", 0.9), "adam": ("Adam", 0.9), "sgd": ("SGD", 0), "momentum": ("SGD", 0.9)}[
            optimizer
        ]
        self.assertEqual(type(saved).__name__, name)
        self.assertEqual(saved.get_config().get("momentum", saved.get_config().get("beta_1")), momentum)

    def test_bfloat16(self):
        self.check_half_precision("mixed_bfloat16")

    @pytest.mark.slow
    def test_float16(self):
        self.check_half_precision("mixed_float16")

    def check_half_precision(self, precision):
        code, _, err = run(
            *SMALL,
            f"--precision={precision}",
            "--schedule=cosine",
            "--label_smoothing=0.1",
            f"--run_dir={self.dir}/r",
        )
        self.assertEqual(code, 0, err)
        saved = keras.models.load_model(self.dir / "r/model.keras", compile=False)
        kinds = {layer.compute_dtype for layer in saved.layers if layer.name.startswith("conv")}
        self.assertEqual(kinds, {precision.removeprefix("mixed_")})
        events = [json.loads(line) for line in (self.dir / "r/metrics.jsonl").read_text().splitlines()]
        # So short a run says little about moving statistics, so not the evaluation.
        self.assertGreater([e["top1"] for e in events if e["event"] == "update"][-1], 0.9)

    def test_divergence(self):
        code, out, err = run(*SMALL, "--learning_rate=1e30", f"--run_dir={self.dir}/r", draw=True)
        self.assertEqual(code, 3)
        [warning] = [w for w in json.loads((self.dir / "r/config.json").read_text())["warnings"] if "not adapted" in w]
        self.assertIn("Set --excluded_lr_scale=0.05, for a rate of up to 5e+28, or adapt them by --exclude=.", warning)
        self.assertIn(f"WARNING: {warning}\n", out)
        self.assertIn("went back to update 0", (self.dir / "r/report.html").read_text())
        self.assertRegex(err, "train.py: The .* is not finite in update [1-5]")
        self.assertRegex((self.dir / "r/metrics.jsonl").read_text(), '"text": "The .* is not finite in update [1-5]')

    def test_a_high_rate_of_biases_is_in_the_plan(self):
        """Only without normalization: with it, the fast network trains at a rate of 96."""
        flags = "--optimizer=momentum", "--learning_rate=0.5", "--bias_lr_scale=64"
        for model, warned in (("lenet1989", True), ("alexnet_small", False)):
            code, out, err = run(f"--model={model}", *flags, "--dry_run", "--batch_size=64", "--microbatch_size=32")
            self.assertEqual(code, 0, err)
            warning = "WARNING: --bias_lr_scale=64 gives biases a learning rate of up to 32. The network has no"
            self.assertEqual(warning in out, warned, out)

    @pytest.mark.slow  # tests/data/test_unreadable.py has the parts
    def test_bad_images(self):
        data = few_digits()
        data.unreadable_images.found.update({"record 3 of a": "no JPEG", "record 4 of a": "empty"})

        class Found(keras.callbacks.Callback):
            images_per_second = 1.0
            data_wait = 0.0

            def on_train_batch_end(self, batch, logs):
                if batch == 2:  # after the vote of update 3, so that of update 4 is the first to see it
                    data.unreadable_images.found["record 9 of a"] = "truncated <b>"

        with unittest.mock.patch.object(callbacks, "Progress", Found):
            code, _, err = run(*SMALL, f"--run_dir={self.dir}/r", "--max_unreadable_images=3", data=data)
            self.assertEqual(code, 0, err)
            self.assertEqual(json.loads((self.dir / "r/bad_images.json").read_text())["record 9 of a"], "truncated <b>")
            self.assertEqual(json.loads((self.dir / "r/results.json").read_text())["bad_images"], 3)
            page = (self.dir / "r/report.html").read_text()
            self.assertIn("Update 4: left out an unreadable image, record 9 of a: truncated &lt;b&gt;", page)
            del data.unreadable_images.found["record 9 of a"]
            code, _, err = run(*SMALL, f"--run_dir={self.dir}/s", "--max_unreadable_images=2", data=data)
            self.assertEqual(code, 5, err)
            self.assertIn(
                "3 images are unreadable, more than --max_unreadable_images=2. The last one: record 9 of a: trunc", err
            )

    def test_dry_run(self):
        run_dir = self.dir / "r"
        arguments = (*SMALL, "--model=alexnet_small", f"--run_dir={run_dir}", "--dry_run")
        evaluate, seen = train.Trainer.evaluate, []

        def look_and_evaluate(*data):
            seen.append(os.listdir(self.dir))  # what a signal would leave behind
            return evaluate(*data)

        with unittest.mock.patch.object(train.Trainer, "evaluate", look_and_evaluate):
            code, out, err = run(*arguments, "--optimizer=adam", "--learning_rate=11")
        self.assertEqual(seen, [[]])
        self.assertEqual(code, 0, err)
        self.assertEmpty(list(self.dir.iterdir()))
        weights = 4 * (models.get("alexnet_small", num_classes=10, input_shape=(16, 16, 1)).count_params()) / 2**20
        self.assertIn(f"weights per device      {weights:,.1f} MiB", out)
        for line in (
            r"WARNING: --learning_rate=11 is a rate for lars, not for adam",
            r"rate, peak +11 at update 1",
            r"rate, last .* at update 30",
            r"optimizer per device +0\.8 MiB",
            r"37 images once each, in 3 batches with 11 padded",
            r"16 images in .* s, with compiling",
            r"the same bits",
            r"dry run passed; no run folder was written",
        ):
            self.assertRegex(out, line)

        with self.subTest("a rate at every point, also of a short run"):
            rows = rehearsal._rates(np.array([0.5, 1.0]))
            names = [name.removeprefix("rate, ") for name, _ in rows]
            self.assertEqual(names, ["first", "25%", "50%", "peak", "75%", "last"])
            self.assertEqual({at for _, at in rows}, {"0.5 at update 1", "1 at update 2"})

        with self.subTest("a smaller micro-batch divides the one that does not fit"):
            self.assertEqual(rehearsal._smaller(25), ": --microbatch_size=5 takes 20% of the activations")
            self.assertEqual(rehearsal._smaller(16), ": --microbatch_size=8 takes 50% of the activations")
            self.assertEqual(rehearsal._smaller(1), "")

        with self.subTest("a disk that is too small"):
            full = shutil.disk_usage(self.dir)._replace(free=10**6)
            with unittest.mock.patch.object(shutil, "disk_usage", lambda _: full):
                for mode in ("--dry_run", "--nodry_run"):
                    code, _, err = run(*arguments, mode)
                    self.assertEqual(code, 2)
                    self.assertRegex(err, "1 MiB free, and --keep_checkpoints=3 needs 4 MiB")

    def test_a_closed_pipe_ends_no_run(self):
        """As of `train.py | head`."""
        source, sink = os.pipe()
        os.close(source)
        load = unittest.mock.patch.object(train.datasets, "load", lambda *_, **__: few_digits())
        with open(sink, "w") as closed, unittest.mock.patch.object(sys, "stdout", closed), load:
            for arguments in (["--help"], [*SMALL, "--steps=1", f"--run_dir={self.dir}/r"]):
                self.assertEqual(train.run(["train.py", *arguments]), 0)
        self.assertTrue((self.dir / "r/results.json").exists())

    def test_after_a_signal_results_are_written(self):
        """One that arrives after the last update, so there is nothing to save."""
        received, write_results = [], train.write_results
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: received.append("it")))

        def write(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return write_results(*arguments)

        with unittest.mock.patch.object(train, "write_results", write):
            code, _, err = run(*SMALL, "--steps=1", f"--run_dir={self.dir}/r")
        self.assertEqual((code, received), (0, []), err)

    def test_a_full_disk_ends_with_a_message(self):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with unittest.mock.patch.object(np, "savez", full):
            code, _, err = run(*SMALL, f"--run_dir={self.dir}/r")
        self.assertEqual(code, 6, err)
        self.assertIn(f"No space left on device: '{self.dir}/r/checkpoints'", err)
        self.assertNotIn("Traceback", err)

    def test_a_file_that_cannot_be_read_is_not_said_to_be_written(self):
        with unittest.mock.patch.object(train, "main", side_effect=OSError(5, "Input/output error", "a.npz")):
            code, _, err = run()
        self.assertEqual(code, 6)
        self.assertStartsWith(err, "train.py: cannot write or read: [Errno 5] Input/output error: 'a.npz'. ")

    def test_two_signals_end_a_process_at_once(self):
        """Even while Python waits for a long call: the first is noted, a later one does not wait, a repeat is none."""
        program = """
import hashlib, os, signal, threading, time
from lars_keras.runtime.preemption import StopOnSignal
def send():
    for number, pause in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 0.0), (signal.SIGINT, 1.1)):
        time.sleep(pause)
        os.kill(os.getpid(), number)
with StopOnSignal() as stop:
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
        environment = {**os.environ, "KERAS_BACKEND": "jax"}  # whose import is the shorter one
        started = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, timeout=200
        )
        err = started.stderr.decode()
        self.assertEqual(started.returncode, 128 + signal.SIGINT, err)
        first, second = err.splitlines()[-2:]
        self.assertEqual(first, "Terminated: stopping after this batch. Another signal ends the run at once.")
        self.assertStartsWith(second, "Interrupt again: ended at once")

    @parameterized.parameters(
        ("lambda: 6", True, 6), ("lambda: {}[0]", True, 1), ("lambda: 2", False, 2), ("lambda: 75", True, 75)
    )
    def test_a_process_that_fails_beside_others_leaves_at_once(self, failing, peers, code):
        """Print all that was printed before, and skip what runs at an ordinary exit, unless all leave."""
        program = f"""
import atexit
import running.start
from running import command_line
command_line.has_peers = lambda: {peers}
atexit.register(print, "waits for the others")
print("printed")
command_line.leave({failing})
"""
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
        self.assertEqual(ended.returncode, code, ended.stderr)
        waits = not peers or code == 75  # a signal to one stops all
        self.assertEqual(ended.stdout, "printed\nwaits for the others\n" if waits else "printed\n")
        self.assertEqual("KeyError: 0" in ended.stderr, code == 1)

    def test_ctrl_c_before_the_training(self):
        """Say so in a line; any other error keeps its traceback."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            running.start._one_line_for_ctrl_c(KeyboardInterrupt, KeyboardInterrupt(), None)
        self.assertEqual(err.getvalue(), "interrupted\n")
        self.assertIs(sys.excepthook, running.start._one_line_for_ctrl_c)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            sys.excepthook(KeyError, KeyError("other"), None)
        self.assertEqual(err.getvalue(), "KeyError: 'other'\n")

    @parameterized.parameters(
        (["--warmup=9"], "--warmup must be shorter than the run of 1 updates. Received: --warmup=9"),
        (["--exclude=no_such_layer"], "no_such_layer"),
        (["--exclude=("], "regular expression"),
        (["--strategy=mirrored"], "no GPU"),
        (["--strategy=multi_worker"], "TF_CONFIG"),
        (["--reduce_dtype=bfloat16"], "KERAS_BACKEND=jax"),
    )
    def test_usage_errors(self, arguments, message):
        run_dir = self.dir / "r"
        code, out, err = run("--model=lenet1989", f"--run_dir={run_dir}", *arguments)
        self.assertEqual(code, 2, out + err)
        self.assertIn(message, err)
        self.assertFalse(run_dir.exists())

    def test_hosts_with_different_data_are_refused(self):
        """The other host's number is that of other data; a number of the same data is the same in every process."""
        numbers = []
        same = lambda cluster, number: numbers.append(number) or len(numbers) > 1  # noqa: E731
        run_dir = self.dir / "r"
        with unittest.mock.patch("lars_keras.training.tensorflow.cluster.TensorFlowCluster.same_on_all_hosts", same):
            code, out, err = run(*SMALL, f"--run_dir={run_dir}")
            self.assertEqual(code, 2, out + err)
            self.assertIn("hosts found different data", err)
            self.assertIn("Found by this host: 160 train and 37 test images in 10 classes, ", err)
            self.assertFalse(run_dir.exists())
            code, _, err = run(*SMALL, f"--run_dir={run_dir}", "--dry_run")
        self.assertEqual(code, 0, err)
        self.assertEqual(numbers[0], numbers[1])
        self.assertBetween(numbers[0], 1, 2**31 - 1)

    def test_hosts_without_a_folder_are_refused(self):
        """Refuse at the start: hosts that make their own would find no checkpoint of the others."""
        hosts = unittest.mock.PropertyMock(return_value=2)
        with unittest.mock.patch("lars_keras.training.tensorflow.cluster.TensorFlowCluster.hosts", hosts, create=True):
            code, out, err = run(*SMALL)
        self.assertEqual(code, 2, out + err)
        self.assertIn("The 2 hosts need --run_dir, a folder that they share", err)

    def test_missing_data_is_named_in_a_real_process(self):
        process = subprocess.run(
            [sys.executable, "train.py", "--dataset=imagenet2012", f"--data_dir={self.dir}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        self.assertEqual(process.returncode, 2, process.stderr)
        # Nothing before it: no remark of a library, see running/start.py.
        self.assertRegex(process.stderr, r"\Atrain.py: error: .*lars_keras.data.prepare.*\n\Z")


if __name__ == "__main__":
    tf.test.main()
