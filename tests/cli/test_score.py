"""`train.py --eval_only`: what is scored, and which flags and data are refused."""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile

import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from PIL import Image

import flags
from flags.config import FOR_SCORING
from lars_keras import data as datasets
from tests.cli.runs import few_digits, run

LOAD = datasets.load  # `run` replaces it


def write_images(folder, counts):
    """Write so many random images into each folder of a class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([count, i]).integers(0, 256, (18, 18, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


class ScoreTest(parameterized.TestCase, tf.test.TestCase):
    """A run on a folder of images, finished and unfinished, and one that held out its images for validation."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.images, cls.only_train = cls.dir / "images", cls.dir / "only_train"
        write_images(cls.images / "train", {"cat": 6, "dog": 6})
        write_images(cls.images / "val", {"cat": 2, "dog": 3})
        shutil.copytree(cls.images / "train", cls.only_train / "train")
        common = ("--model=lenet1989", "--dataset=folder", "--image_size=16", "--batch_size=4", "--strategy=single")
        length = ("--steps=2", "--warmup=0.3", "--learning_rate=0.1", "--checkpoint_minutes=1e9")
        for name, more in (
            ("finished", [f"--data_dir={cls.images}"]),
            ("held_out", [f"--data_dir={cls.only_train}", "--validation_split=0.25"]),
        ):
            code, _, err = run(*common, *length, *more, f"--run_dir={cls.dir}/{name}", data=LOAD)
            assert code == 0, err
        shutil.copytree(cls.dir / "finished", cls.dir / "unfinished")
        for name in ("results.json", "model.keras"):
            (cls.dir / "unfinished" / name).unlink()

    def score(self, name, *arguments, data=LOAD):
        return run(f"--run_dir={self.dir / name}", "--eval_only", *arguments, data=data)

    def refused(self, name, *arguments, data=LOAD):
        """Return the one line by which a scoring is refused."""
        code, out, err = self.score(name, *arguments, data=data)
        self.assertEqual((code, out), (2, ""), err)
        self.assertRegex(err, r"\Atrain.py: error: .*\n\Z")
        return err

    def copy_of(self, folder):
        copy = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "copy"
        shutil.copytree(folder, copy)
        return copy

    def renamed(self):
        """Return a copy of the images in which the dogs are ants, so class 0."""
        copy = self.copy_of(self.images)
        for split in ("train", "val"):
            (copy / split / "dog").rename(copy / split / "ant")
        return copy

    def earlier(self, name):
        """Return a copy of a run as an earlier version saved it, which kept nothing of its data."""
        copy = self.copy_of(self.dir / name)
        config = json.loads((copy / "config.json").read_text())
        del config["data"]
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    @parameterized.parameters("finished", "unfinished")
    def test_a_run_on_its_own_data(self, name):
        code, out, err = self.score(name, "--batch_size=16", "--cache=memory")
        self.assertEqual(code, 0, err)
        results = json.loads((self.dir / "finished/results.json").read_text())
        line = (
            f"top-1 {100 * results['top1']:.2f} %  top-5 100.00 %  loss {results['loss']:.4f}  n=5, each image once\n"
        )
        self.assertEqual(out, "after update 2:\n" * (name == "unfinished") + line)
        self.assertEqual(self.score(name, f"--data_dir={self.copy_of(self.images)}")[1], out)

    @parameterized.parameters("finished", "unfinished")
    def test_other_classes(self, name):
        other = f"--data_dir={self.renamed()}"
        self.assertIn("class 0 is 'cat' there, and 'ant' in the data. A file labels.txt", self.refused(name, other))
        code, out, err = self.score(self.earlier(name), other)  # nobody knows
        self.assertEqual(code, 0, err)
        self.assertIn("n=5", out)
        more = self.copy_of(self.images)
        write_images(more / "train", {"eel": 1})
        self.assertIn("class 2 is missing there, and 'eel' in the data", self.refused(name, f"--data_dir={more}"))

    def test_classes_in_the_order_of_the_run(self):
        """Number the classes by labels.txt."""
        other = self.renamed()
        (other / "labels.txt").write_text("cat\nant\n")
        self.assertIn("class 1 is 'dog' there, and 'ant' in the data", self.refused("finished", f"--data_dir={other}"))
        for split in ("train", "val"):
            (other / split / "ant").rename(other / split / "dog")
        (other / "labels.txt").write_text("cat\ndog\n")
        self.assertEqual(self.score("finished", f"--data_dir={other}")[:2], self.score("finished")[:2])

    @parameterized.parameters("finished", "unfinished")
    def test_other_data_of_the_same_classes(self, name):
        """Say that they are other data. By their number the warm-up would be longer than the run."""
        other = self.dir / f"other_{name}"
        write_images(other / "train", {"cat": 20, "dog": 20})
        write_images(other / "val", {"cat": 4, "dog": 3})
        code, out, err = self.score(name, f"--data_dir={other}")
        self.assertEqual(code, 0, err)
        self.assertIn("scored on other data than the run's: 40 train and 7 test images in 2 classes, ", out)
        self.assertIn("; the run has 12 train and 5 test images in 2 classes, ", out)
        self.assertIn("n=7", out)

    def test_other_shapes(self):
        took = "takes images of 16 x 16 x 3 in 2 classes. Received: images of "
        more = self.copy_of(self.images)
        write_images(more / "train", {"eel": 1})
        for name in ("finished", "unfinished"):
            self.assertIn(took + "24 x 24 x 3 in 2 classes", self.refused(name, "--image_size=24"))
            self.assertIn(took + "16 x 16 x 1 in 10 classes", self.refused(name, data=few_digits()))
        error = self.refused(self.earlier("finished"), f"--data_dir={more}")
        self.assertIn(took + "16 x 16 x 3 in 3 classes", error)
        for argument in ("--image_size=32", f"--data_dir={more}"):
            error = self.refused(self.earlier("unfinished"), argument)
            message = r"it has \S+/kernel in the shape \(.*\), and the model has it in the shape \(.*\)\.$"
            self.assertRegex(error, message)

    def test_without_a_test_split(self):
        own = "There is no test split.\nscored on the 3 images held out by --validation_split=0.25\n"
        results = json.loads((self.dir / "held_out/results.json").read_text())
        for more in ((), ("--validation_split=0.25",)):
            code, out, err = self.score("held_out", *more)
            self.assertEqual(code, 0, err)
            self.assertStartsWith(out, own if not more else own.splitlines(True)[1])
            self.assertRegex(out, rf"top-1 {100 * results['top1']:.2f} % .* loss {results['loss']:.4f}  n=3,")
        with self.subTest("with one, it is scored, unless the flag is given"):
            for more, n in ((), 5), (("--validation_split=0.25",), 3):
                code, out, err = self.score("held_out", f"--data_dir={self.images}", *more)
                self.assertEqual(code, 0, err)
                self.assertIn(f"n={n},", out)
                self.assertNotIn("no test split", out)
        with self.subTest("other images than the run held out"):
            error = self.refused("held_out", "--validation_split=0.5")
            self.assertIn("Received: --validation_split=0.5 where the run has 0.25", error)
        with self.subTest("a run that held out nothing"):
            self.assertIn("without a folder val", self.refused("finished", f"--data_dir={self.only_train}"))

    @parameterized.product(
        name=("finished", "unfinished"),
        flag=("--warmup=9999", "--label_smoothing=0.9", "--optimizer=lamb", "--learning_rate=3.0", "--seed=3"),
    )
    def test_flags_that_describe_another_run(self, name, flag):
        error = self.refused(name, flag)
        self.assertIn(f"Received: {flag} where the run has ", error)

    def test_flags_of_a_scoring_exist(self):
        self.assertContainsSubset(FOR_SCORING, [field.name for field in dataclasses.fields(flags.RunConfig)])

    def test_a_damaged_config(self):
        path = self.copy_of(self.dir / "finished")
        (path / "config.json").write_text("{")
        self.assertIn(f"{path}/config.json is damaged", self.refused(path))

    def test_digits_have_no_class_names(self):
        path = self.copy_of(self.dir / "finished")
        code, _, err = run(
            "--model=lenet1989", "--batch_size=64", "--steps=1", "--warmup=0", f"--run_dir={path}/digits"
        )
        self.assertEqual(code, 0, err)
        code, out, err = self.score(path / "digits", data=few_digits())
        self.assertEqual(code, 0, err)
        self.assertTrue(re.match(r"top-1 .* n=37", out), out)


if __name__ == "__main__":
    tf.test.main()
