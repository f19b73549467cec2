"""`compare.py`: the search for rates, the ledger, the page, and a comparison that is stopped and goes on."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import unittest.mock

import tensorflow as tf
from absl.testing import parameterized

import compare
import flags
from lars_keras.runtime.errors import Preempted, UsageError
from tests import prepared
from tools.comparison import page, worker
from tools.comparison.search import Candidate, GridCell, grid, next_step
from tools.comparison.worker import config_of

ROOT = pathlib.Path(__file__).parents[2]


def outcome(top1, loss=1.0, diverged=False):
    scores = {"top1": top1, "top5": 1.0, "loss": loss, "diverged": diverged}
    return scores | {"updates": 7, "n": 450, "seconds": 1.0, "commit": "-", "learned": not diverged}


def a_cell(tuning_runs=4, seeds=(0, 1), name="lars"):
    config = flags.RunConfig(microbatch_size=128, batch_size=512)
    return GridCell(Candidate(name, config, first_rate=2.0, first_batch_size=256), 1024, tuning_runs, 2.0, seeds)


class SearchTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((0,), (3,), (-2,), (9,))
    def test_it_climbs_to_the_peak(self, peak):
        found = {}
        while (step := next_step(found, 20)) is not None:
            found[step] = outcome(1.0 - 0.01 * abs(step - peak))
        self.assertEqual(max(found, key=lambda s: found[s]["top1"]), peak)
        self.assertIn(peak - 1, found)
        self.assertIn(peak + 1, found)
        self.assertLessEqual(len(found), abs(peak) + 3)

    def test_the_budget_holds(self):
        found = {}
        while (step := next_step(found, 3)) is not None:
            found[step] = outcome(0.1 * step)
        self.assertEqual(sorted(found), [0, 1, 2])
        self.assertIsNone(next_step({}, 0))

    def test_of_equals_the_lower_loss_and_what_diverged_last(self):
        self.assertEqual(next_step({0: outcome(0.5, 1.0), 1: outcome(0.5, 0.9)}, 9), 2)
        lost = {"top1": 0.0, "loss": None, "learned": False}
        self.assertEqual(next_step({0: lost}, 9), 1)
        self.assertEqual(next_step({0: lost, 1: lost}, 9), -1)  # where all is lost, down
        self.assertEqual(next_step({0: lost, -1: outcome(0.0), 1: lost}, 9), -2)

    def test_guesses_are_no_better_than_other_guesses(self):
        """Of 450 images and 10 classes, 12.8 % are two standard deviations above a guess."""
        candidate = a_cell().candidate
        self.assertEqual([candidate.learned(outcome(top1)) for top1 in (0.05, 0.12, 0.13)], [False, False, True])
        self.assertFalse(candidate.learned({"top1": 0.0, "n": None, "diverged": True}))
        self.assertTrue(dataclasses.replace(candidate, num_classes=1000).learned(outcome(0.01)))
        cell = a_cell()
        first, second = (cell.job(step, 0, tuning=True) for step in (0, 1))
        outcomes = {first.name: outcome(0.05, loss=6.0), second.name: outcome(0.1, loss=457.0)}
        self.assertEqual(cell.jobs(outcomes), [cell.job(-1, 0, tuning=True)])
        outcomes[second.name] = outcome(0.1, loss=2.3)
        self.assertEqual(cell.jobs(outcomes), [cell.job(2, 0, tuning=True)])

    def test_jobs_follow_from_outcomes(self):
        """Four rates, then both seeds with the best; the rate is scaled by the root of the batch size."""
        cell, outcomes, order = a_cell(), {}, []
        while jobs := cell.jobs(outcomes):
            self.assertGreater(cell.left(outcomes), 0)
            for job in jobs:
                order.append((job.rate, job.tuning, job.seed))
                outcomes[job.name] = outcome({4.0: 0.6, 8.0: 0.8, 16.0: 0.7}[job.rate] + 0.1 * job.seed)
        self.assertEqual(order, [(4.0, True, 0), (8.0, True, 0), (16.0, True, 0), (8.0, False, 0), (8.0, False, 1)])
        self.assertEqual(cell.left(outcomes), 0)
        row = cell.row(outcomes)
        self.assertEqual((row["rate"], row["at_edge"], row["top1"], row["updates"]), (8.0, False, [0.8, 0.9], 7))
        self.assertAllClose([row["mean"], row["std"]], [0.85, math.sqrt(0.005)])

    def test_without_tuning_the_rate_is_the_contenders_own(self):
        jobs = a_cell(tuning_runs=0).jobs({})
        self.assertEqual([(job.rate, job.tuning, job.seed) for job in jobs], [(4.0, False, 0), (4.0, False, 1)])

    def test_flags_of_a_run(self):
        (job,) = a_cell().jobs({})
        config = config_of(job, pathlib.Path("x"), 0.1)
        self.assertEqual((config.batch_size, config.learning_rate, config.validation_split), (1024, 4.0, 0.1))
        self.assertEqual((config.microbatch_size, config.steps_per_execution, config.max_rollbacks), (128, 4, 0))
        (scored, _) = a_cell(tuning_runs=0).jobs({})
        self.assertEqual(config_of(scored, pathlib.Path("x"), 0.1).validation_split, 0.0)

    @parameterized.parameters(("sqrt", 4.0), ("linear", 8.0), ("none", 2.0))
    def test_first_rate(self, scaling, rate):
        candidate = dataclasses.replace(a_cell().candidate, scaling=scaling)
        (job,) = GridCell(candidate, 1024, 1, 2.0, (0,)).jobs({})
        self.assertEqual(job.rate, rate)

    def test_flagfiles(self):
        """Those of comparisons name recipes that are there, and every run they ask for has flags that agree."""
        for path in sorted((ROOT / "flags").glob("compare_*.flags")):
            own = compare.define()
            self.assertEqual(own(["compare.py", f"--flagfile={path}"]), ["compare.py"], path)
            self.assertEqual(own.out, f"runs/{path.stem}")
            with contextlib.chdir(ROOT):
                candidates = compare.candidates_of(own)
            batch_sizes = [int(b) for b in own.batch_sizes or [candidates[0].config.batch_size]]
            for cell in grid(candidates, batch_sizes, own.tuning_runs, own.factor, [0]):
                (job, *_) = cell.jobs({})
                config_of(job, pathlib.Path("x"), own.validation_split)

    def test_without_tuning_a_recipe_keeps_its_rate(self):
        own = compare.define()
        own(
            [
                "compare.py",
                "--recipes=flags/recipes/demo.flags",
                "--optimizer=lars",
                "--optimizer=adam",
                "--tuning_runs=0",
            ]
        )
        with contextlib.chdir(ROOT):
            lars, adam = compare.candidates_of(own)
        self.assertEqual((lars.first_rate, lars.first_batch_size), (15.0, 8192))
        self.assertEqual((adam.first_rate, adam.first_batch_size), (1e-3, 256))


class WorkerTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config = flags.RunConfig(run_dir=str(self.dir))
        (self.dir / "flags.txt").write_text(self.config.as_flags())
        results = dict.fromkeys(worker.KEPT, 1)
        (self.dir / "results.json").write_text(json.dumps(results | {"more": 2}))

    def test_a_finished_run_is_taken_over_if_it_is_this_one(self):
        moved = dataclasses.replace(self.config, data_dir="elsewhere")
        self.assertEqual(worker.take(moved), dict.fromkeys(worker.KEPT, 1) | {"diverged": False})
        with self.assertRaisesRegex(worker.Failed, "other flags"):
            worker.take(dataclasses.replace(self.config, epochs=3.0))

    def test_a_signal_outside_of_training(self):
        with unittest.mock.patch.multiple(worker, _stopped=False, _taking=False):
            worker._stop()
            self.assertIsNone(worker.take(self.config))
        with unittest.mock.patch.multiple(worker, _stopped=False, _taking=True), self.assertRaises(Preempted):
            worker._stop()

    def test_an_error_is_in_the_log(self):
        folder = self.dir / "new"
        with self.assertRaisesRegex(worker.Failed, "UsageError.*model.keras"):
            worker.take(dataclasses.replace(self.config, run_dir=str(folder), eval_only=True))
        self.assertIn("Traceback", (folder / "log.txt").read_text())


class LedgerTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.cells = [a_cell(name="lars"), a_cell(name="sgd")]
        names = [cell.candidate.name for cell in self.cells]
        self.about = {"title": "a < b", "settings": {"candidates": dict.fromkeys(names, "--x"), "seeds": [0, 1]}}
        self.about |= dict.fromkeys(("command", "machine", "backend", "commit"), "-") | {"versions": {"keras": "3"}}

    def test_it_is_read_again(self):
        ledger = compare.ResultsStore(self.out, self.about, self.cells)
        (job,) = self.cells[0].jobs({})
        ledger.outcomes[job.name] = outcome(0.5)
        found = ledger.write()
        again = compare.ResultsStore(self.out, self.about, self.cells)
        self.assertEqual(again.outcomes, {job.name: outcome(0.5)})
        self.assertEqual((again.left, found["left"]), (11, 11))
        self.assertGreaterEqual(again.write()["wall_seconds"], found["wall_seconds"])

    def test_other_settings_and_damage_are_refused(self):
        compare.ResultsStore(self.out, self.about, self.cells).write()
        more_seeds = self.about | {"settings": self.about["settings"] | {"seeds": [0, 1, 2]}}
        self.assertEqual(compare.ResultsStore(self.out, more_seeds, self.cells).outcomes, {})
        other = self.about | {"settings": self.about["settings"] | {"factor": 5.0}}
        with self.assertRaisesRegex(UsageError, r"other settings \(factor\)"):
            compare.ResultsStore(self.out, other, self.cells)
        (self.out / "compare.json").write_text("{")
        with self.assertRaisesRegex(UsageError, "is damaged"):
            compare.ResultsStore(self.out, self.about, self.cells)

    def test_what_made_a_finished_comparison_stays(self):
        ledger = compare.ResultsStore(self.out, self.about | {"commit": "a"}, [])
        ledger.outcomes["x"] = outcome(0.5) | {"commit": ledger.commit}
        self.assertEqual(ledger.write()["commit"], "a")
        again = compare.ResultsStore(
            self.out, self.about | {"commit": "b", "machine": "another", "command": "fewer"}, []
        )
        found = again.write()
        self.assertEqual((found["commit"], found["machine"]), ("a", "-"))
        self.assertEqual(found["command"], "fewer")  # it is what the table is of
        more = compare.ResultsStore(self.out, self.about | {"commit": "b"}, self.cells)  # has runs left
        more.outcomes["y"] = outcome(0.5) | {"commit": more.commit}
        self.assertEqual(more.write()["commit"], "a, b")

    def test_page(self):
        ledger = compare.ResultsStore(self.out, self.about, self.cells)
        page.write(self.out, ledger.write())  # of nothing yet
        self.assertIn("up to 12 runs are left", (self.out / "compare.html").read_text())
        for seed, top1 in ((0, 0.5), (1, 0.6)):
            for step in (0, 1, -1):
                ledger.outcomes[self.cells[0].job(step, 0, tuning=True).name] = outcome(0.3 - abs(step) / 10)
            ledger.outcomes[self.cells[0].job(0, seed, tuning=False).name] = outcome(top1)
        found = ledger.write()
        page.write(self.out, found)
        html = (self.out / "compare.html").read_text()
        for text in ("a &lt; b", "55.00 ± 7.07 %", "Unfinished: up to 6 runs are left", "2: 20.00 % · 4: 30.00 %"):
            self.assertIn(text, html)
        self.assertIn("55.00 ± 7.07 %    –", page.text(found["table"]))
        self.assertIn("<svg", (self.out / "compare.svg").read_text())

    def test_grid(self):
        self.assertLen(grid([c.candidate for c in self.cells], [64, 32], 1, 3.0, [0]), 4)


class CommandTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ([], "--recipes is needed"),
        (["--recipes=nothing.flags"], "--recipes: there is no file nothing.flags"),
        (["--recipes=flags/recipes/cifar10_alexnet.flags", "--data_dir=nowhere"], "cifar10.*prepare"),
        (
            ["--recipes=flags/recipes/digits_lenet.flags", "--batch_sizes=64,x"],
            "--batch_sizes must be .*Received: 64,x",
        ),
        (["--recipes=flags/recipes/digits_lenet.flags", "--seeds=-1"], "--seeds must be .*Received: -1"),
        (
            ["--recipes=flags/recipes/digits_lenet.flags", "--factor=1"],
            "--factor must be above 1. Received: --factor=1",
        ),
        (["--recipes=flags/recipes/digits_lenet.flags", "--optimizer=rmsprop"], "rmsprop"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--batch_sizes=1500"], "--microbatch_size must divide"),
        (
            ["--recipes=flags/recipes/demo.flags,flags/recipes/digits_lenet.flags", "--optimizer=lars"],
            "--optimizer goes with one recipe",
        ),
        (["--recipes=flags/recipes/alexnet_bn_4k.flags,flags/recipes/alexnet_bn_32k.flags"], "--batch_sizes is needed"),
        (
            ["--recipes=flags/recipes/demo.flags,flags/../flags/recipes/demo.flags"],
            "--recipes need file names that differ",
        ),
        (["--recipes=flags/recipes/digits_lenet.flags", "--validation_split=0"], "--validation_split must be above 0"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--validation_split=0.6"], "validation_split"),
        (["extra"], "Every argument must be a flag"),
    )
    def test_bad_flags(self, arguments, message):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                code = compare.run(["compare.py", f"--data_dir={prepared.digits()}", *arguments, f"--out={folder}"])
            self.assertEqual(code, 2)
            self.assertRegex(err.getvalue(), message)

    def test_stopped_and_gone_on_with(self):
        """Two short runs in processes of their own, one before a signal and one after."""
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder, "out")
            command = [sys.executable, "compare.py", "--recipes=flags/recipes/digits_lenet.flags", "--optimizer=lars"]
            command += ["--batch_sizes=4096", "--seeds=3", "--tuning_runs=1", "--epochs=0.2"]
            command += [f"--out={out}", f"--data_dir={prepared.digits()}", "--workers=1"]
            first = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
            )
            lines = []
            for line in first.stdout:
                lines.append(line)
                if line.startswith("1/2"):
                    first.send_signal(signal.SIGTERM)
            _, errors = first.communicate(timeout=120)
            self.assertEqual(first.returncode, 75, "".join(lines) + errors)
            self.assertIn("stopped; the same command goes on", errors)
            before = json.loads((out / "compare.json").read_text())
            self.assertLen(before["runs"], 1)

            second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            self.assertEqual(second.returncode, 0, second.stdout + second.stderr)
            self.assertIn("1 finished, at most 1 left, 1 at a time", second.stdout)
            found = json.loads((out / "compare.json").read_text())
            self.assertEqual({name: found["runs"][name] for name in before["runs"]}, before["runs"])
            self.assertEqual((len(found["runs"]), found["left"]), (2, 0))
            for row in found["table"]:
                self.assertLen(row["top1"], 1)
                name = f"{row['candidate']}-4096-rate{row['rate']:.4g}-seed3"
                results = json.loads((out / "runs" / name / "results.json").read_text())
                self.assertEqual((results["top1"], results["n"]), (row["top1"][0], 450))
            self.assertIn("Finished.", (out / "compare.html").read_text())
            self.assertNotIn("leaked", errors + second.stderr)


if __name__ == "__main__":
    tf.test.main()
