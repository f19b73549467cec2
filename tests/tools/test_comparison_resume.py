"""`compare.py` on a folder that holds results: what may change, and what is kept."""

import contextlib
import itertools
import pathlib
import shutil
import tempfile

from absl.testing import absltest, parameterized

from lars_keras.runtime.errors import UsageError
from tests.data.images import jpeg
from tools.comparison import command
from tools.comparison.store import differing


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

    def test_what_is_known_of_the_images_is_compared_by_candidate(self):
        now = {"candidates": {"a": "", "b": ""}, "data": {"a": "1", "b": "2"}}
        for then, other in (({"a": "1"}, []), ({"b": "3", "c": "4"}, ["data"]), (None, [])):
            before = {"candidates": {"a": ""}} | ({} if then is None else {"data": then})
            self.assertEqual(differing(now, before), other, then)


if __name__ == "__main__":
    absltest.main()
