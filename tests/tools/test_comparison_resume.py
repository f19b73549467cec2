"""`compare.py` on a folder that holds results: what may change, and what is kept."""

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import shutil
import tempfile
import unittest.mock
from concurrent.futures import ThreadPoolExecutor

from absl.testing import absltest, parameterized

from lars_keras.runtime.errors import UsageError
from tests.data.images import jpeg
from tests.tools.test_comparison import a_cell, outcome
from tools.comparison import command, page, runner, worker
from tools.comparison.search import ModeTrial
from tools.comparison.store import ResultsStore, differing


def write_folder(root, seed):
    """Write a data set of two classes as a folder of images, one of each in each split."""
    for split, label in itertools.product(("train", "val"), "ab"):
        path = root / split / label / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(40, 40, seed=seed + ord(label)))


class ResumeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.dir / "out" / "runs").mkdir(parents=True)  # so the lock leaves the folder
        self.recipe = self.dir / "recipe.flags"
        self.recipe.write_text("--model=lenet1989\n--dataset=folder\n--image_size=16\n--batch_size=2\n")

    def prepare(self, *flags):
        """Return the comparison that is ready to run, whose folder is free again."""
        own = command.define()
        argv = ["compare.py", f"--recipes={self.recipe}", f"--out={self.dir}/out", "--optimizer=lars", "--seeds=1"]
        argv += ["--tuning_runs=0", "--jit_compile=off", *flags]
        own(argv)
        with contextlib.ExitStack() as held:
            return command.prepare(own, argv, held)

    def test_results_of_other_images_are_not_taken_over(self):
        for name, seed in (("a", 0), ("b", 100)):
            write_folder(self.dir / name, seed)
        self.prepare(f"--data_dir={self.dir}/a").store.write()
        shutil.copytree(self.dir / "a", self.dir / "moved")
        self.prepare(f"--data_dir={self.dir}/moved", "--optimizer=sgd").store.write()
        with self.assertRaisesRegex(UsageError, r"other settings \(data\)"):
            self.prepare(f"--data_dir={self.dir}/b")

    def test_the_mode_is_chosen_once(self):
        """Another grid has other trials, whose outcome may differ, but stopped runs go on in their mode only."""
        write_folder(self.dir / "a", 0)
        flags = [f"--data_dir={self.dir}/a", "--jit_compile=fastest"]
        ready = self.prepare(*flags)
        for speed, job in zip((100.0, 50.0), ready.trials[0].jobs({}), strict=True):
            self.assertEqual(ready.store.modes, {})
            ready.store.add(job.name, outcome(0.1, images_per_second=speed))
            ready.store.choose_modes(ready.trials)
        self.assertEqual(ready.store.modes, {"lenet1989": "on"})
        grown = self.prepare(*flags, "--optimizer=sgd", "--batch_sizes=1,2")
        self.assertEqual((grown.trials, grown.store.modes), ([], {"lenet1989": "on"}))
        self.assertIn("2 finished, 4 left", "\n".join(grown.plan))

        path = self.dir / "out" / "compare.json"
        before = json.loads(path.read_text())
        del before["modes"]  # as an earlier version wrote it
        path.write_text(json.dumps(before))
        again = self.prepare(*flags)
        again.store.choose_modes(again.trials)
        self.assertEqual(again.store.modes, {"lenet1989": "on"})
        self.assertLen(self.prepare(*flags, "--batch_sizes=1").trials, 0)

    def test_nothing_is_timed_if_no_run_is_left(self):
        write_folder(self.dir / "a", 0)
        flags = [f"--data_dir={self.dir}/a", "--jit_compile=fastest"]
        ready = self.prepare(*flags)
        (job,) = ready.cells[0].jobs({})
        ready.store.add(job.name, outcome(0.5))
        self.assertEqual(self.prepare(*flags).trials, [])

    @parameterized.parameters(
        ("--model=missing:build", "`model`: there is no module missing on sys.path. Received: model=missing:build"),
        ("--model=json:missing", "`model`: json has no function missing. Received: model=json:missing"),
        ("--warmup=9 steps", "--warmup must be shorter than the run of 8 updates. Received: --warmup=9 steps, 9 upd"),
        ("--warmup=8 steps", "--warmup must be shorter than the run of 8 updates. Received: --warmup=8 steps, 8 upd"),
    )
    def test_flags_that_runs_would_refuse(self, flag, message):
        write_folder(self.dir / "a", 0)
        with open(self.recipe, "a") as recipe:
            recipe.write(f"{flag}\n")
        with self.assertRaisesRegex(ValueError, message):
            self.prepare(f"--data_dir={self.dir}/a")

    def test_the_warm_up_of_a_short_run_is_shorter_than_it(self):
        cell = a_cell()
        for steps, warmup in ((100, 99), (64, 63)):
            config = dataclasses.replace(cell.candidate.config, steps=steps, warmup=f"{warmup} steps")
            short = dataclasses.replace(cell, candidate=dataclasses.replace(cell.candidate, config=config))
            found = short.job(0.0, "short").config(self.dir, 0.1)
            self.assertEqual(found.warmup_updates(45_000), found.steps - 1)

    def test_what_is_known_of_the_images_is_compared_by_candidate(self):
        now = {"candidates": {"a": "", "b": ""}, "data": {"a": "1", "b": "2"}}
        for then, other in (({"a": "1"}, []), ({"b": "3", "c": "4"}, ["data"]), (None, [])):
            before = {"candidates": {"a": ""}} | ({} if then is None else {"data": then})
            self.assertEqual(differing(now, before), other, then)


class RunnerTest(parameterized.TestCase):
    @parameterized.parameters(("xla", 0, "off"), ("graph", 1, None), ("both", 1, None), ("", 0, "on"))
    def test_a_trial_that_fails(self, stage, code, mode):
        """Without XLA graph mode is used; what fails in graph mode ends the comparison, and decides nothing."""
        out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        cell = a_cell(tuning_runs=0, seeds=(0,))
        trial = ModeTrial(cell.candidate, cell.batch_size)
        configs = []

        def run_job(config, _):
            configs.append(config)
            if config.run_dir.endswith(("xla0", "graph0") if stage == "both" else f"{stage or None}0"):
                raise worker.Failed("ValueError: refused")
            return outcome(0.5, images_per_second=200.0 if config.jit_compile == "on" else 100.0)

        settings = {"settings": {"candidates": {}}, "commit": "-"}
        store = ResultsStore(out, settings, [cell])
        pool = unittest.mock.patch(
            "concurrent.futures.ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers)
        )
        printed, errors = io.StringIO(), io.StringIO()
        with (
            pool,
            unittest.mock.patch.object(runner, "run_job", run_job),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
        ):
            self.assertEqual(runner.Runner([cell], [trial], None, store, out, 1, 0.1).run(), code)
        self.assertEqual(store.modes.get(trial.model), mode)
        refused = (printed.getvalue() + errors.getvalue()).count("ValueError: refused")
        self.assertEqual(refused, {"": 0, "both": 2}.get(stage, 1))
        failed = [name for name, o in json.loads((out / "compare.json").read_text())["runs"].items() if o.get("failed")]
        self.assertLen(failed, int(stage == "xla"))
        if not code:
            self.assertEqual(configs[-1].jit_compile, mode)
            self.assertLen(printed.getvalue().splitlines(), 3)


class PageTest(absltest.TestCase):
    def test_only_reports_that_exist_are_linked(self):
        """A lost run has none."""
        out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (out / "runs" / "finished").mkdir(parents=True)
        (out / "runs" / "finished" / "report.html").touch()
        (out / "runs" / "lost").mkdir()
        about = dict.fromkeys(("title", "command", "machine", "commit"), "-") | {"versions": {}}
        store = ResultsStore(
            out, about | {"settings": {"candidates": {}, "data": {"a": "9 images", "b": "9 images"}}}, []
        )
        for name in ("finished", "lost"):
            store.add(name, outcome(0.0, lost=name == "lost"))
        page.write(out, store.write())
        html = (out / "compare.html").read_text()
        self.assertIn('<a href="runs/finished/report.html">', html)
        self.assertNotIn("runs/lost", html)
        self.assertIn("<summary>1 reports</summary>", html)
        self.assertIn("<td>9 images</td>", html)


if __name__ == "__main__":
    absltest.main()
