"""Paths as people give them: with ~, of buckets, of other versions, not UTF-8."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import unittest.mock

import tensorflow as tf
from absl.testing import parameterized

import compare
import lars_keras.data
import lars_keras.report.__main__ as report
from lars_keras.data import prepare
from lars_keras.files import local_path
from lars_keras.report.log import MetricsLog
from lars_keras.runtime.checkpoint import CheckpointManager
from tests import prepared
from tests.cli.runs import SMALL, few_digits, run

ADDRESSES = ("gs://bucket/r", "s3://bucket/r", "hdfs://host/r", "file:///srv/r", "gs:/bucket/r")


class PathsTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.home = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(unittest.mock.patch.dict(os.environ, {"HOME": str(self.home)}))
        # A path that is taken as it stands would be a folder here.
        self.enterContext(contextlib.chdir(self.enterContext(tempfile.TemporaryDirectory())))

    def check_nothing_written(self):
        self.assertEqual((os.listdir("."), os.listdir(self.home)), ([], []))

    def test_home(self):
        self.assertEqual(local_path("~/r", "run_dir"), self.home / "r")
        self.assertEqual(local_path("~root/r", "run_dir"), pathlib.Path(os.path.expanduser("~root/r")))
        self.assertEqual(local_path("a/~/c:/b", "run_dir"), pathlib.Path("a/~/c:/b"))
        data = few_digits()
        data.warnings = ("2 of 10 classes have no training images: c, d.",)
        code, out, err = run(*SMALL, "--run_dir=~/r", "--steps=1", data=data)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("\nWARNING: 2 of 10 classes have no training images: c, d.\n", out)
        self.assertIn(f"report: {self.home}/r/report.html", out)
        self.assertTrue((self.home / "r" / "results.json").is_file())
        self.assertEqual(run(*SMALL, "--run_dir=~/r", "--eval_only")[0], 0)
        self.assertRegex(run(*SMALL, "--run_dir=~/r", "--steps=1")[2], "holds a finished run")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(report.main(["~/r"]), 0)
        self.assertEqual(out.getvalue(), f"{self.home}/r/report.html\n")
        self.assertEqual(CheckpointManager("~/c").directory, self.home / "c")
        self.assertEqual(os.listdir("."), [])

    def test_home_of_data(self):
        shutil.copytree(prepared.imagenet(), self.home / "data")
        options = {"image_size": 16, "cache": "disk", "cache_dir": "~/copies"}
        lars_keras.data.load("imagenet2012", data_dir="~/data", **options)
        self.assertNotEmpty(os.listdir(self.home / "copies"))
        with self.assertRaisesRegex(FileNotFoundError, f"^{self.home}/tars/ILSVRC2012_img_train.tar does not exist"):
            prepare.prepare("imagenet2012", "~/new", manual_dir="~/tars")
        self.assertEqual(os.listdir("."), [])

    @parameterized.parameters(*ADDRESSES, "~no-such-user/r")
    def test_run_dir_that_is_not_local(self, path):
        for more in ((), ("--dry_run",), ("--eval_only",)):
            code, _, err = run(*SMALL, f"--run_dir={path}", *more)
            self.assertEqual(code, 2)
            self.assertRegex(err, rf"^train.py: error: --run_dir .*Received: --run_dir={path}\n$")
        self.check_nothing_written()

    def test_other_folders_that_are_not_local(self):
        for path in ADDRESSES:
            for call, name in (
                (lambda path: CheckpointManager(path), "directory"),
                (lambda path: MetricsLog(path), "run_dir"),
                (lambda path: prepare.prepare("digits", path), "data_dir"),
                (lambda path: prepare.prepare("imagenet2012", self.home, manual_dir=path), "manual_dir"),
                (lambda path: lars_keras.data.load("folder", data_dir=path), "data_dir"),
            ):
                with self.assertRaisesRegex(ValueError, rf"Received: {name}={path}$"):
                    call(path)
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(report.main([path]), 2)
                self.assertEqual(prepare.main(["-n", "digits", "-d", path]), 2)
            self.assertEqual(err.getvalue().count(f"Received: run_dir={path}\n"), 1)
        self.check_nothing_written()

    def test_compare(self):
        recipe = self.home / "r.flags"
        recipe.write_text("\n".join(SMALL))
        data_dir = prepared.digits()
        for out in ADDRESSES:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                code = compare.run(["compare.py", f"--recipes={recipe}", f"--out={out}", f"--data_dir={data_dir}"])
            self.assertEqual(code, 2)
            self.assertRegex(err.getvalue(), rf"^compare.py: error: --out must be .*Received: --out={out}\n$")
        self.assertEqual(os.listdir("."), [])

    def test_names_that_are_not_utf_8(self):
        code, _, err = run(*SMALL, "--run_dir=caf\udce9")
        self.assertEqual((code, err), (2, "train.py: error: --run_dir must be UTF-8. Received: --run_dir=caf\\xe9\n"))
        with self.assertRaisesRegex(ValueError, r"`data_dir` must be UTF-8 for digits. Received: data_dir=caf\\xe9"):
            lars_keras.data.load("digits", data_dir="caf\udce9")
        self.check_nothing_written()


class OtherVersionTest(tf.test.TestCase):
    """A folder that another version of tensorflow-datasets has written."""

    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "data")
        shutil.copytree(prepared.imagenet(), self.root)
        self.folder = next(self.root.glob("imagenet2012/*"))

    def load(self):
        return lars_keras.data.load("imagenet2012", data_dir=self.root, image_size=16)

    def check(self, message):
        with self.assertRaisesRegex(ValueError, rf"{self.folder} {message}"):
            self.load()

    def test_it_is_said(self):
        cannot = r"cannot be read by tensorflow-datasets [\d.]+.*, so another version has probably written it: .*"
        features = json.loads((self.folder / "features.json").read_text())
        info = json.loads((self.folder / "dataset_info.json").read_text())
        for name, content in (
            ("features.json", None),  # up to 3.2.1
            ("features.json", features | {"pythonClassName": "tensorflow_datasets.core.features.New"}),
            ("features.json", {}),
            ("dataset_info.json", info | {"ofTheFuture": 1}),
            ("dataset_info.json", info | {"fileFormat": "new"}),
            ("dataset_info.json", []),
        ):
            path = self.folder / name
            before = path.read_text()
            path.unlink()
            if content is not None:
                path.write_text(json.dumps(content))
            with self.subTest(name=name, content=str(content)[:60]):
                self.check(cannot)
            path.write_text(before)
        self.load()

    def test_folders_beside_it(self):
        for name in ("5.1.0.incompleteABC", ".9.9.9", "v6.0.0", "6.0.x"):
            shutil.copytree(self.folder, self.folder.with_name(name))
        self.assertIn("imagenet2012/5.1.0", self.load().description)


if __name__ == "__main__":
    tf.test.main()
