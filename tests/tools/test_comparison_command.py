"""`compare.py`: its flags, the data it prepares, the plan that it prints."""

import contextlib
import io
import os
import pathlib
import tempfile
import unittest.mock
from inspect import signature

from absl.testing import absltest, parameterized

from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.folder_lock import lock_folder
from tests.cli.runs import few_digits
from tools.comparison import command

ROOT = pathlib.Path(__file__).parents[2]


class CommandTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        load = command.datasets.load

        def quickly(name, **options):
            if name != "digits":
                return load(name, **options)
            signature(load).bind(name, **options)
            return few_digits()

        self.enterContext(unittest.mock.patch.object(command.datasets, "load", quickly))

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
            "--factor must be a number of at least 1.01. Received: --factor=1",
        ),
        (["--recipes=flags/recipes/digits_lenet.flags", "--optimizer=rmsprop"], "rmsprop"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--batch_sizes=1500"], "--microbatch_size must divide"),
        (
            ["--recipes=flags/recipes/demo.flags,flags/recipes/digits_lenet.flags", "--optimizer=lars"],
            "--optimizer needs a single recipe",
        ),
        (["--recipes=flags/recipes/alexnet_bn_4k.flags,flags/recipes/alexnet_bn_32k.flags"], "--batch_sizes is needed"),
        (
            ["--recipes=flags/recipes/demo.flags,flags/../flags/recipes/demo.flags"],
            "--recipes need file names that differ",
        ),
        (["--recipes=flags/recipes/digits_lenet.flags", "--validation_split=0"], "--validation_split must be above 0"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--validation_split=0.6"], "validation_split"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--validation_split=nan"], "--validation_split must be finite"),
        (["--nohelp=3"], "--nohelp=3 does not take an argument"),
        (["--recipes=flags/recipes/digits_lenet.flags", "--out=Makefile"], "--out=Makefile is not a folder"),
        (["extra"], "Every argument must be a flag"),
    )
    def test_bad_flags(self, arguments, message):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                code = command.run(["compare.py", f"--out={folder}", *arguments])
            self.assertEqual(code, 2)
            self.assertRegex(err.getvalue(), message)

    def test_a_recipe_of_so_many_updates(self):
        """They are equal epochs at one batch size only."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT), contextlib.ExitStack() as held:
            recipe = pathlib.Path(folder, "r.flags")
            recipe.write_text("--model=lenet1989\n--steps=300\n")
            argv = ["compare.py", f"--recipes={recipe}", f"--out={folder}/out"]

            def plan(*flags):
                own = command.define()
                own([*argv, *flags])
                with held:
                    return "\n".join(command.prepare(own, argv, held).plan)

            with self.assertRaisesRegex(UsageError, r"--epochs. Received: --steps=300 --batch_sizes=64,128$"):
                plan("--batch_sizes=128,64")
            self.assertIn("lenet1989, 300 updates on 160 images", plan("--batch_sizes=64"))
            self.assertIn("lenet1989, 2 epochs on 160 images", plan("--batch_sizes=64,128", "--epochs=2"))

    def test_help(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(command.run(["compare.py", "--help"], "usage"), 0)
        text = out.getvalue()
        for flag in set(command.define()) - {"h"}:
            self.assertRegex(text, rf"\n  --(\[no\])?{flag}\b")
        self.assertIn("--optimizer=lars|lamb|sgd|momentum|adam\n        Compare this optimizer; repeat", text)
        self.assertLessEqual(max(map(len, text.splitlines())), 120)

    def test_a_folder_in_use_is_refused(self):
        """Two comparisons in one folder would write over each other's results."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT), lock_folder(pathlib.Path(folder), "out"):
            before = sorted(os.listdir(folder))
            arguments = ["--recipes=flags/recipes/digits_lenet.flags", "--optimizer=lars", "--jit_compile=recipe"]
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                code = command.run(["compare.py", *arguments, f"--out={folder}"])
            self.assertEqual(code, 2)
            self.assertIn("--out is in use by", err.getvalue())
            self.assertEqual(sorted(os.listdir(folder)), before)

    def test_the_plan_counts_the_trials_of_the_mode(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT), contextlib.ExitStack() as held:
            argv = ["compare.py", "--recipes=flags/recipes/digits_lenet.flags", "--optimizer=lars", "--seeds=1,2"]
            argv += ["--batch_sizes=64", "--tuning_runs=0", f"--out={folder}"]
            for mode, left in (("fastest", 4), ("off", 2)):
                own = command.define()
                own([*argv, f"--jit_compile={mode}"])
                ready = command.prepare(own, argv, held)
                self.assertIn(f"0 finished, {left} left", "\n".join(ready.plan))
                held.close()


if __name__ == "__main__":
    absltest.main()
