"""`compare.py`: flags of runs, worker, store, page, and a comparison that is stopped and resumed."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import unittest.mock

import pytest
from absl.testing import absltest, parameterized

import flags
from lars_keras.runtime.errors import Preempted, UsageError
from lars_keras.training.sizes import epoch_ends
from tests import prepared
from tools.comparison import command, page, search, worker
from tools.comparison.candidates import Candidate, Job
from tools.comparison.search import GridCell, ModeTrial, grid
from tools.comparison.store import ResultsStore, differing

ROOT = pathlib.Path(__file__).parents[2]


def outcome(top1, loss=1.0, diverged=False, **more):
    scores = {"top1": top1, "top5": 1.0, "loss": loss, "diverged": diverged}
    return scores | {"updates": 7, "n": 450, "seconds": 1.0, "commit": "-"} | more


def a_cell(tuning_runs=4, seeds=(0, 1), name="lars"):
    config = flags.RunConfig(microbatch_size=128, batch_size=512)
    return GridCell(Candidate(name, config, first_rate=2.0, first_batch_size=256), 1024, tuning_runs, 2.0, seeds)


class JobTest(parameterized.TestCase):
    def test_flags_of_a_run(self):
        """Tuning holds images out; a short run has a quarter of the updates and of the warm-up."""
        cell = a_cell()
        short = cell.job(0.0, "short").config(pathlib.Path("x"), 0.1, "off")
        self.assertEqual((short.batch_size, short.learning_rate, short.validation_split), (1024, 4.0, 0.1))
        self.assertEqual((short.microbatch_size, short.steps_per_execution, short.max_rollbacks), (128, 4, 0))
        self.assertEqual((short.steps, short.warmup, short.jit_compile), (88, "11 steps", "off"))  # of 352 and 44
        full = cell.job(0.0, "tuning").config(pathlib.Path("x"), 0.1)
        self.assertEqual((full.steps, full.warmup, full.validation_split, full.jit_compile), (None, None, 0.1, "auto"))
        self.assertEqual(full.total_updates(45_000), 352)
        self.assertEqual(cell.job(0.0, "seed", 3).config(pathlib.Path("x"), 0.1).validation_split, 0.0)

    def test_flags_of_a_trial(self):
        xla, graph = ModeTrial(a_cell().candidate, 256).jobs({})
        self.assertEqual([job.config(pathlib.Path("x"), 0.1, "on").jit_compile for job in (xla, graph)], ["on", "off"])
        config = graph.config(pathlib.Path("x"), 0.1)
        self.assertEqual((config.steps, config.steps_per_execution), (16, 4))  # four calls, the first one compiles

    @parameterized.parameters(("sqrt", 4.0), ("linear", 8.0), ("none", 2.0))
    def test_first_rate(self, scaling, rate):
        candidate = dataclasses.replace(a_cell().candidate, scaling=scaling)
        job, *_ = GridCell(candidate, 1024, 8, 2.0, (0,)).jobs({})
        self.assertEqual(job.rate, rate)

    def test_flagfiles(self):
        """Flagfiles of comparisons name recipes that exist, and each run they ask for has flags that agree."""
        paths = sorted((ROOT / "flags" / "comparisons").glob("*.flags"))
        self.assertGreater(len(paths), 5)
        for path in paths:
            own = command.define()
            self.assertEqual(own(["compare.py", f"--flagfile={path}"]), ["compare.py"], path)
            self.assertEqual(own.out, f"runs/compare_{path.stem}")
            with contextlib.chdir(ROOT):
                candidates = command.candidates_of(own)
            batch_sizes = [int(b) for b in own.batch_sizes or [candidates[0].config.batch_size]]
            for cell in grid(candidates, batch_sizes, own.tuning_runs, own.factor, [0]):
                for stage in ("short", "tuning", "seed"):
                    cell.job(0.0, stage).config(pathlib.Path("x"), own.validation_split)

    def test_an_optimizer_that_is_named_twice_is_compared_once(self):
        own = command.define()
        own(["compare.py", "--recipes=flags/recipes/digits_lenet.flags", "--optimizer=lars", "--optimizer=lars"])
        self.assertLen(command.candidates_of(own), 1)

    def test_a_command_is_shown_without_the_folder_of_the_data(self):
        for words in (["--data_dir=there/mine"], ["--data_dir", "there/mine"]):
            self.assertEqual(
                command.command_of(["/x/compare.py", *words, "--out=a"]), "python compare.py --data_dir=DIR --out=a"
            )

    def test_without_tuning_a_recipe_keeps_its_rate(self):
        own = command.define()
        flags = ["--recipes=flags/recipes/demo.flags", "--optimizer=lars", "--optimizer=adam", "--tuning_runs=0"]
        own(["compare.py", *flags])
        with contextlib.chdir(ROOT):
            lars, adam = command.candidates_of(own)
        self.assertEqual((lars.first_rate, lars.first_batch_size), (15.0, 8192))
        self.assertEqual((adam.first_rate, adam.first_batch_size), (1e-3, 256))


class WorkerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config = flags.RunConfig(run_dir=str(self.dir))
        (self.dir / "flags.txt").write_text(self.config.as_flags())
        results = dict.fromkeys(worker.KEPT, 1)
        (self.dir / "results.json").write_text(json.dumps(results | {"more": 2}))

    def test_a_finished_run_is_taken_over_if_it_is_this_one(self):
        moved = dataclasses.replace(self.config, data_dir="elsewhere")
        expected = dict.fromkeys(worker.KEPT, 1) | {"diverged": False, "training_seconds": 8192.0}
        self.assertEqual(worker.run_job(moved), expected)
        with self.assertRaisesRegex(worker.Failed, "other flags"):
            worker.run_job(dataclasses.replace(self.config, epochs=3.0))

    def test_a_signal_outside_of_training(self):
        with unittest.mock.patch.multiple(worker, _stopped=False, _running=False):
            worker._stop()
            self.assertIsNone(worker.run_job(self.config))
        with unittest.mock.patch.multiple(worker, _stopped=False, _running=True), self.assertRaises(Preempted):
            worker._stop()

    def test_an_error_is_in_the_log(self):
        folder = self.dir / "new"
        with self.assertRaisesRegex(worker.Failed, "UsageError.*model.keras"):
            worker.run_job(dataclasses.replace(self.config, run_dir=str(folder), eval_only=True))
        self.assertIn("Traceback", (folder / "log.txt").read_text())


class LostTest(parameterized.TestCase):
    def judge(self, losses, top1=(), calls=1, steps_per_epoch=1000.0):
        """Return the update at which a run of these losses is stopped, `calls` updates per host call; None if never.

        The log has means of `top1` since the start of the epoch.
        """
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        callback = worker.StopIfLost(folder, num_classes=10)
        callback.set_params({"steps": len(losses), "steps_per_epoch": steps_per_epoch, "batch_size": 1024})
        callback.on_train_begin()
        ends = [0, *epoch_ends(len(losses) / steps_per_epoch, steps_per_epoch)]
        with open(folder / "metrics.jsonl", "w") as log:
            for update in range(calls, len(losses) + 1, calls):
                event = {"event": "update", "update": update, "step_loss": losses[update - 1]}
                if top1:
                    first = max(end for end in ends if end < update)
                    event["top1"] = statistics.fmean(top1[first:update])
                print(json.dumps(event), file=log, flush=True)
                try:
                    callback.on_train_batch_end(update - 1)
                except worker.Lost as e:
                    return e.update
        return None

    def test_a_run_that_learns_goes_on(self):
        self.assertIsNone(self.judge([2.3 - 0.01 * i for i in range(40)]))
        self.assertIsNone(self.judge([9.0] * 8 + [2.2] * 32))  # a bad start is no loss

    @parameterized.parameters(1000.0, 7.3, 1.0, 0.4)
    def test_a_loss_above_that_of_guesses_is_no_sign_alone(self, steps_per_epoch):
        """A regularizer, or a network that is too sure, adds to it: top-1 of the second quarter decides."""
        judge = functools.partial(self.judge, [3.0] * 40, steps_per_epoch=steps_per_epoch)
        self.assertIsNone(judge(top1=[0.1] * 10 + [0.13] * 30))
        self.assertEqual(judge(top1=[0.3] * 10 + [0.1] * 30), 20)  # learned, then lost
        self.assertEqual(judge(top1=[0.1, 0.095] * 20), 20)

    def test_a_run_at_chance_is_stopped_at_half(self):
        self.assertEqual(self.judge([2.31] * 40), 20)
        self.assertEqual(self.judge([2.31] * 40, calls=8), 24)
        self.assertEqual(self.judge([None] * 40), 20)  # not finite
        self.assertEqual(self.judge([1.0] * 9 + [2.4] * 31), 20)

    def test_a_short_run_is_never_judged(self):
        self.assertIsNone(self.judge([5.0] * 31))


class StoreTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.cells = [a_cell(name="lars"), a_cell(name="sgd")]
        flags = {cell.candidate.name: cell.candidate.config.as_flags() for cell in self.cells}
        settings = {"candidates": flags, "seeds": [0, 1], "search": search.RULE, "tuning_runs": 4}
        self.about = {"title": "a < b", "settings": settings | {"validation_split": 0.1}}
        self.about |= dict.fromkeys(("command", "machine", "backend", "commit"), "-") | {"versions": {"keras": "3"}}

    def changed(self, **settings):
        return self.about | {"settings": self.about["settings"] | settings}

    def test_it_is_read_again(self):
        clock = itertools.count().__next__  # a second a look
        store = ResultsStore(self.out, self.about, self.cells, clock)
        job, *_ = self.cells[0].jobs({})
        store.add(job.name, outcome(0.5))
        again = ResultsStore(self.out, self.about, self.cells, clock)
        self.assertEqual(again.outcomes, {job.name: outcome(0.5)})
        self.assertEqual((store.left, again.left), (11, 11))  # of 2 cells, 4 short runs and 2 seeds each
        self.assertEqual(again.write()["wall_seconds"], 1 + 1)

    def test_other_settings_and_damage_are_refused(self):
        ResultsStore(self.out, self.about, self.cells).write()
        more = self.about["settings"]["candidates"] | {"adam": "--optimizer=adam"}
        for changed in ({"seeds": [0, 1, 2]}, {"tuning_runs": 8}, {"candidates": more}):
            self.assertEqual(ResultsStore(self.out, self.changed(**changed), self.cells).outcomes, {})
        other = self.about["settings"]["candidates"] | {"sgd": "--epochs=9"}
        with self.assertRaisesRegex(UsageError, r"other settings \(candidates\)"):
            ResultsStore(self.out, self.changed(candidates=other), self.cells)
        with self.assertRaisesRegex(UsageError, r"other settings \(factor\)"):
            ResultsStore(self.out, self.changed(factor=5.0), self.cells)
        (self.out / "compare.json").write_text("{")
        with self.assertRaisesRegex(UsageError, "is damaged"):
            ResultsStore(self.out, self.about, self.cells)

    def test_a_candidate_that_was_left_out_comes_back_with_its_flags_only(self):
        """Its runs are still there, and they are of these flags."""
        ResultsStore(self.out, self.about, self.cells).write()
        candidates = self.about["settings"]["candidates"]
        fewer = self.changed(candidates={"lars": candidates["lars"]})
        ResultsStore(self.out, fewer, self.cells[:1]).write()
        with self.assertRaisesRegex(UsageError, r"other settings \(candidates\)"):
            ResultsStore(self.out, self.changed(candidates={"sgd": "--epochs=9"}), self.cells[1:])
        ResultsStore(self.out, self.about, self.cells)

    def test_a_search_is_added(self):
        store = ResultsStore(self.out, self.changed(search=None, tuning_runs=0), [a_cell(tuning_runs=0)])
        (job, _) = a_cell(tuning_runs=0).jobs({})
        store.add(job.name, outcome(0.5))
        self.assertEqual(list(ResultsStore(self.out, self.about, self.cells).outcomes), [job.name])

    def test_only_comparisons_of_this_rule_go_on(self):
        """All committed comparisons are shown. Those of the earlier rule are not resumed by this one."""
        for path in sorted((ROOT / "results").glob("compare_*.json")):
            found = json.loads(path.read_text())
            page.write(self.out, found)
            self.assertIn("<h2", (self.out / "compare.html").read_text())
            (self.out / "compare.json").write_text(path.read_text())
            now = found["settings"] | {"search": search.RULE if found["settings"]["tuning_runs"] else None}
            if now["search"] and found["settings"].get("search") != search.RULE:
                with self.assertRaisesRegex(UsageError, r"other settings \(search\)"):
                    ResultsStore(self.out, found | {"settings": now}, self.cells)
            else:
                self.assertNotEmpty(ResultsStore(self.out, found | {"settings": now}, []).outcomes)

    def test_flags_that_are_younger_than_the_file(self):
        text = self.about["settings"]["candidates"]["lars"]
        older = "".join(line + "\n" for line in text.splitlines() if not line.startswith("--seed="))
        settings = self.about["settings"]
        same = settings | {"candidates": settings["candidates"] | {"lars": older}}
        self.assertEqual(differing(settings, same), [])
        other = settings | {"candidates": settings["candidates"] | {"lars": text.replace("--epochs=8", "--epochs=9")}}
        self.assertEqual(differing(settings, other), ["candidates"])

    def test_what_made_a_finished_comparison_stays(self):
        store = ResultsStore(self.out, self.about | {"commit": "a"}, [])
        store.add("x", outcome(0.5))
        self.assertEqual(store.write()["commit"], "a")
        again = ResultsStore(self.out, self.about | {"commit": "b", "machine": "another", "command": "fewer"}, [])
        found = again.write()
        self.assertEqual((found["commit"], found["machine"]), ("a", "-"))
        self.assertEqual(found["command"], "fewer")  # the table is of this command
        more = ResultsStore(self.out, self.about | {"commit": "b"}, self.cells)  # has runs left
        more.add("y", outcome(0.5))
        self.assertEqual(more.write()["commit"], "a, b")

    def test_scores_on_views_are_shown_beside_the_plain_ones(self):
        store = ResultsStore(self.out, self.about, self.cells)
        cell = self.cells[0]
        while jobs := cell.jobs(store.outcomes):
            for job in jobs:
                views = {} if job.tuning else {"top1_views": 0.75, "top5_views": 0.9}
                store.add(job.name, outcome(0.5, **views))
        found = store.write()
        page.write(self.out, found)
        self.assertEqual(found["table"][0]["top1_views"], [0.75, 0.75])
        self.assertNotIn("top1_views", found["table"][1])
        html = (self.out / "compare.html").read_text()
        for text in ("on several views", "75.00 ± 0.00 %", "50.00 ± 0.00 %"):
            self.assertIn(text, html)

    def test_only_the_runs_that_count_are_scored_on_views(self):
        candidate = dataclasses.replace(self.cells[0].candidate, config=flags.RunConfig(test_views=6))
        views = {}
        for stage in ("short", "tuning", "seed", "graph"):
            views[stage] = Job(candidate, 256, 1.0, 0, stage).config(self.out, 0.1).test_views
        self.assertEqual(views, {"short": 1, "tuning": 1, "seed": 6, "graph": 1})

    def test_page(self):
        store = ResultsStore(self.out, self.about, self.cells)
        page.write(self.out, store.write())  # of nothing yet
        self.assertIn("Unfinished: 12 runs are left", (self.out / "compare.html").read_text())
        cell = self.cells[0]
        while jobs := cell.jobs(store.outcomes):
            for job in jobs:
                top1 = 0.3 - abs(math.log(job.rate / 4.0)) / 10 if job.tuning else 0.5 + 0.1 * job.seed
                store.add(job.name, outcome(top1, wall_seconds=10.0, training_seconds=9.0, seconds=90.0))
        found = store.write()
        page.write(self.out, found)
        html = (self.out / "compare.html").read_text()
        for text in ("a &lt; b", "55.00 ± 7.07 %", "6 runs are left", "4 at 0.25: 30.00 %"):
            self.assertIn(text, html)
        for text in ("10.0 % of the time", "<td>1.5</td>", search.RULE):
            self.assertIn(text, html)
        self.assertIn("55.00 ± 7.07 %    –", page.text(found["table"]))
        self.assertIn("<svg", (self.out / "compare.svg").read_text())


class ResumedTest(absltest.TestCase):
    @pytest.mark.slow  # four imports of TensorFlow; each part has a test above, the replay in test_search.py
    def test_stopped_and_resumed(self):
        """Two short runs, one before a signal to a process of its own and one after, in this process."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
            out = pathlib.Path(folder, "out")
            arguments = ["--recipes=flags/recipes/digits_lenet.flags", "--optimizer=lars", "--batch_sizes=4096"]
            arguments += ["--seeds=3", "--tuning_runs=1", "--epochs=0.2", "--jit_compile=recipe"]
            arguments += [f"--out={out}", f"--data_dir={prepared.digits()}", "--workers=1"]
            program = [sys.executable, "compare.py", *arguments]
            first = subprocess.Popen(
                program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
            )
            lines = []
            for line in first.stdout:
                lines.append(line)
                if line.startswith("1/2"):
                    first.send_signal(signal.SIGTERM)
            _, errors = first.communicate(timeout=120)
            self.assertEqual(first.returncode, 75, "".join(lines) + errors)
            self.assertIn("stopped; run the same command to resume", errors)
            before = json.loads((out / "compare.json").read_text())
            self.assertLen(before["runs"], 1)

            printed, stderr = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(stderr):
                code = command.run(["compare.py", *arguments])
            self.assertEqual(code, 0, printed.getvalue() + stderr.getvalue())
            self.assertIn("1 finished, 1 left, 1 at a time", printed.getvalue())
            found = json.loads((out / "compare.json").read_text())
            self.assertEqual({name: found["runs"][name] for name in before["runs"]}, before["runs"])
            self.assertEqual((len(found["runs"]), found["left"]), (2, 0))
            for row in found["table"]:
                self.assertLen(row["top1"], 1)
                name = f"{row['candidate']}-4096-rate{row['rate']:.4g}-seed3"
                results = json.loads((out / "runs" / name / "results.json").read_text())
                self.assertEqual((results["top1"], results["n"]), (row["top1"][0], 450))
            self.assertIn("Finished.", (out / "compare.html").read_text())
            self.assertNotIn("leaked", errors)


if __name__ == "__main__":
    absltest.main()
