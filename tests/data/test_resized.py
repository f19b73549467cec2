"""Images stored at one size: against Pillow, as batches, and after a kill."""

import contextlib
import functools
import io
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import unittest.mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from PIL import Image, ImageOps

import lars_keras.data
from lars_keras.data import prepare, store
from lars_keras.data.resized import Storage
from lars_keras.runtime.folder_lock import lock_folder
from tests import prepared
from tests.data.images import parse, read_all
from tests.data.streams import train_ids

FORMS = ("crop40", "squash40_png", "crop40_raw")


def by_pillow(data, storage):
    """Return what Pillow makes of an encoded image."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if storage.mode == "crop":
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((storage.size, storage.size), Image.Resampling.BILINEAR))


class StoredTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.stored = {
            form: prepare.prepare_resized("imagenet2012", prepared.imagenet(), form, cls.folder) for form in FORMS
        }
        cls.original = lars_keras.data.load("imagenet2012", data_dir=prepared.imagenet(), image_size=32)

    def load(self, form, **options):
        options = {"augment": "crop_mirror", "image_size": 32} | options
        return lars_keras.data.load("imagenet2012", data_dir=self.folder, resized=form, **options)

    def pixels(self, form, data, split):
        """Return the stored images of a split, decoded by Pillow."""
        images = [image for image, _ in (parse(data, r) for r in read_all(data, split))]
        if form.endswith("raw"):
            return [np.frombuffer(image, np.uint8).reshape(40, 40, 3) for image in images]
        return [np.asarray(Image.open(io.BytesIO(image))) for image in images]

    @parameterized.parameters(*FORMS)
    def test_images_are_those_of_pillow_in_the_same_order(self, form):
        storage, data = Storage.parse(form), self.load(form)
        self.assertEqual((data.num_train, data.num_test, data.num_classes), (29, 11, 7))
        lossless = "jpeg" not in storage.encoding
        for split in ("_train", "_test"):
            originals = [parse(self.original, record) for record in read_all(self.original, split)]
            labels = [label for _, label in (parse(data, r) for r in read_all(data, split))]
            self.assertEqual(labels, [label for _, label in originals])
            found = self.pixels(form, data, split)
            for image, (encoded, _) in zip(found, originals, strict=True):
                difference = np.abs(image.astype(int) - by_pillow(encoded, storage))
                self.assertLess(difference.mean(), 0.6 if lossless else 3.0)
                self.assertLessEqual(difference.max(), 1 if lossless else 60)

    @parameterized.parameters(*FORMS)
    def test_windows_are_pixels_of_the_stored_image(self, form):
        """Images are one window of 81, or its mirror image; over an epoch they differ. Evaluation takes the center."""
        data = self.load(form)
        stored = self.pixels(form, data, "_train")
        windows = np.lib.stride_tricks.sliding_window_view
        images, _, mask = next(data.train_batches(58).as_numpy_iterator())
        self.assertAllEqual(mask, np.ones(58))
        places = set()
        for i, image in zip(train_ids(data, 58)[0], images, strict=True):
            all_windows = windows(stored[i], (32, 32, 3))[:, :, 0]
            matches = [np.argwhere((all_windows == x).all((2, 3, 4))) for x in (image, image[:, ::-1])]
            self.assertGreaterEqual(sum(map(len, matches)), 1)
            places |= {(flip, *place) for flip, found in enumerate(matches) for place in found[:1]}
        self.assertGreater(len(places), 30)
        tests, _, _ = next(data.test_batches(11).as_numpy_iterator())
        self.assertAllEqual(tests, np.stack(self.pixels(form, data, "_test"))[:, 4:36, 4:36])

    def test_a_stream_goes_on_in_the_middle_of_an_epoch(self):
        data = self.load("squash40_png")
        whole = list(data.train_batches(7, count=9).as_numpy_iterator())  # two epochs
        rest = list(data.train_batches(7, first=3, count=6).as_numpy_iterator())
        for expected, found in zip(whole[3:], rest, strict=True):
            self.assertAllEqual(expected[0], found[0])
            self.assertAllEqual(expected[1], found[1])
        self.assertNotAllEqual(whole[3][0], whole[4][0])

    def test_a_window_may_be_the_whole_image(self):
        data = self.load("crop40_raw", image_size=40, augment="none")
        images, _, _ = next(data.train_batches(29).as_numpy_iterator())
        self.assertAllEqual(images, np.stack(self.pixels("crop40_raw", data, "_train"))[train_ids(data, 29)[0]])

    def test_tensorflow_datasets_reads_them(self):
        import tensorflow_datasets as tfds

        for form in ("squash40_png", "crop40_raw"):
            read = tfds.builder_from_directory(self.stored[form]).as_dataset(split="train", shuffle_files=False)
            for found, example in zip(self.pixels(form, self.load(form), "_train"), read, strict=True):
                self.assertAllEqual(found, example["image"])

    @classmethod
    @functools.cache
    def whole(cls):
        """Return a folder with images in shards of 16, written by one call."""
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with unittest.mock.patch.object(store, "_SHARD", 16):
            prepare.prepare_resized("imagenet2012", prepared.imagenet(), "crop24", folder)
        return folder

    def test_a_call_that_was_killed_goes_on(self):
        """The bytes are those of a call that was not; what is complete is not written again."""
        killed = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        write = store._write_shard
        written = []

        def die(path, rows, done):
            if len(written) == 1:
                path.with_name(path.name + ".part").write_bytes(b"torn")
                raise KeyboardInterrupt
            written.append(path)
            return write(path, rows, done)

        with unittest.mock.patch.object(store, "_SHARD", 16):
            with unittest.mock.patch.object(store, "_write_shard", die), self.assertRaises(KeyboardInterrupt):
                prepare.prepare_resized("imagenet2012", prepared.imagenet(), "crop24", killed)
            with self.assertRaisesRegex(FileNotFoundError, "imagenet2012_crop24 is not in .*-r crop24"):
                lars_keras.data.load("imagenet2012", data_dir=killed, resized="crop24")
            first = {path: path.stat().st_mtime_ns for path in written}
            prepare.prepare_resized("imagenet2012", prepared.imagenet(), "crop24", killed)
        self.assertLen(first, 1)
        self.assertEqual(first, {path: path.stat().st_mtime_ns for path in written})
        self.assertEqual(contents(killed), contents(self.whole()))

    @pytest.mark.slow
    def test_processes_killed_at_random_moments(self):
        """Kill twenty processes; what is there is whole after each, and the last one ends with the same bytes."""
        whole, killed = (pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) for _ in range(2))
        imports = "import sys; from lars_keras.data import prepare, store"
        program = f"{imports}; store._SHARD = 2; sys.exit(prepare.main(sys.argv[1:]))"

        def start(out):
            arguments = ["-n", "imagenet2012", "-d", prepared.imagenet(), "-r", "crop64", "-o", out]
            return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])

        started = time.monotonic()
        self.assertEqual(start(whole).wait(), 0)
        seconds, complete = time.monotonic() - started, {}
        for moment in np.random.default_rng(0).uniform(0.3 * seconds, seconds, 20):
            process = start(killed)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            now = {p.relative_to(killed): p.stat().st_mtime_ns for p in killed.rglob("*") if p.suffix != ".part"}
            files = {p: time for p, time in now.items() if "tfrecord" in p.name}
            self.assertEqual(complete, {p: files[p] for p in complete})  # not written again
            for path in files.keys() - complete.keys():
                self.assertEqual((killed / path).read_bytes(), (whole / path).read_bytes(), path)
            complete = files
        self.assertEqual(start(killed).wait(), 0)
        self.assertGreater(len(complete), 2)
        self.assertEqual(contents(killed), contents(whole))

    def test_a_full_disk_is_one_line_and_the_same_call_goes_on(self):
        whole, full = self.whole(), pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        arguments = ["-n", "imagenet2012", "-d", str(prepared.imagenet()), "-r", "crop24", "-o"]
        with unittest.mock.patch.object(store, "_SHARD", 16):
            smallest, *_, largest = sorted(p.stat().st_size for p in whole.rglob("*tfrecord*"))
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                resource.setrlimit(resource.RLIMIT_FSIZE, ((smallest + largest) // 2, limits[1]))
                try:
                    self.assertEqual(prepare.main([*arguments, str(full)]), 2)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            self.assertIn("could not be written. The same call goes on", errors.getvalue())
            self.assertEmpty(list(full.rglob("*.part")))
            self.assertEqual(prepare.main([*arguments, str(full)]), 0)
        self.assertEqual(contents(full), contents(whole))

    def write_images(self, *colors):
        """Return a folder of images: one of each color in each class and split."""
        root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for color in colors:
            for name in ("train/a", "train/b", "val/a"):
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 20), (color, 0, 0)).save(root / name / f"{color}.png")
        return root

    def prepare(self, root, out):
        """Return exit code and the message of the command, which follows the progress bar."""
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            code = prepare.main(["-n", "folder", "-d", str(root), "-r", "crop24_raw", "-o", str(out)])
        return code, errors.getvalue().rstrip("\n").rpartition("\n")[2] if code else ""

    def test_a_finished_result_of_other_images_is_refused(self):
        root, out = self.write_images(10, 20), pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.assertEqual(self.prepare(root, out), (0, ""))
        self.assertEqual(self.prepare(os.path.relpath(root), out), (0, ""))  # the same by another path
        before = contents(out)
        other = self.write_images(10, 21)
        self.assertEqual(self.prepare(other, out)[0], 2)
        self.assertRegex(self.prepare(other, out)[1], "folder_crop24_raw/1.0.0 has other images: remove it")
        Image.new("RGB", (30, 20)).save(root / "train" / "a" / "30.png")
        self.assertRegex(self.prepare(root, out)[1], "has other images.*Now: .*5 train and 2 test images")
        self.assertEqual(contents(out), before)

    def test_names_of_classes_are_kept(self):
        """Names with spaces and other letters are kept. If one name cannot be a line of text, none is kept."""
        for known, names in ((True, ["a b", "é", "n01"]), (False, [" a", "b"]), (False, ["a\nb", "c"])):
            root, out = (pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) for _ in range(2))
            for name in names:
                for split in ("train", "val"):
                    (root / split / name).mkdir(parents=True)
                    Image.new("RGB", (30, 20)).save(root / split / name / "0.png")
            self.assertEqual(self.prepare(root, out), (0, ""))
            data = lars_keras.data.load("folder", data_dir=out, resized="crop24_raw", image_size=24, augment="none")
            of_folder = lars_keras.data.load("folder", data_dir=root, image_size=24)
            self.assertEqual(data.class_names, of_folder.class_names if known else ())
            self.assertEqual(data.num_classes, len(names))

    def test_a_second_process_does_not_write_the_same_result(self):
        root, out = self.write_images(10), pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        with lock_folder(out / "folder_crop24_raw", "out_dir"):
            code, errors = self.prepare(root, out)
        self.assertEqual((code, contents(out)), (2, {}))
        self.assertIn("`out_dir` is in use by process", errors)

    def test_a_disk_that_is_full_at_the_end_leaves_no_finished_result(self):
        import tensorflow_datasets as tfds

        root, out = self.write_images(10), pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

        def full(data_dir, **_):
            (pathlib.Path(data_dir) / "dataset_info.json").touch()
            raise OSError("No space left on device")

        with unittest.mock.patch.object(tfds.folder_dataset, "write_metadata", full):
            self.assertEqual(self.prepare(root, out), (2, "No space left on device"))
        self.assertEmpty(list(out.rglob("dataset_info.json")))
        self.assertEqual(self.prepare(root, out), (0, ""))
        data = lars_keras.data.load("folder", data_dir=out, resized="crop24_raw", image_size=24, augment="none")
        self.assertEqual(data.num_train, 2)

    def test_an_unreadable_image_keeps_its_place(self):
        self.check_unreadable("crop24_raw")

    @pytest.mark.slow
    def test_an_unreadable_image_keeps_its_place_among_jpegs(self):
        self.check_unreadable("crop24")

    def check_unreadable(self, form):
        root, out = (pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) for _ in range(2))
        for split in ("train", "val"):
            for name in "ab":
                (root / split / name).mkdir(parents=True)
                for i in range(3):
                    Image.new("RGB", (30, 20), (80 * i, 0, 0)).save(root / split / name / f"{i}.png")
        (root / "train" / "b" / "1.png").write_bytes(b"no image")
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(prepare.main(["-n", "folder", "-d", str(root), "-r", form, "-o", str(out)]), 0)
        self.assertRegex(logs.output[-1], r"1 unreadable images are stored as empty ones: \S+/train/b/1.png$")
        data = lars_keras.data.load("folder", data_dir=out, resized=form, image_size=24, augment="none")
        _, labels, mask = next(data.train_batches(6).as_numpy_iterator())
        ids = train_ids(data, 6)[0]
        self.assertAllEqual(mask, np.where(ids == 4, 0.0, 1.0))
        self.assertAllEqual(labels, np.where(ids == 4, 0, ids // 3))
        self.assertLen(data.unreadable_images.found, 1)

    def test_refusals(self):
        for text in ("256", "crop", "crop0", "crop256_q0", "crop256_q101", "fit256", "crop256_bmp"):
            with self.assertRaisesRegex(ValueError, "`resized` must be crop or squash"):
                Storage.parse(text)
        for form in ("crop256", "squash256_q90", "crop384_png", "crop64_raw"):
            self.assertEqual(str(Storage.parse(form)), form)
        with self.assertRaisesRegex(ValueError, "`image_size` must be at most the stored size"):
            self.load("crop40", image_size=41)
        with self.assertRaisesRegex(ValueError, "Raw images need `augment` crop_mirror or none"):
            self.load("crop40_raw", augment="mixup")
        with self.assertRaisesRegex(ValueError, "prepare them with `resize`"):
            lars_keras.data.load("imagenet2012", data_dir=prepared.imagenet(), augment="crop_mirror")
        with self.assertRaisesRegex(ValueError, "crop_mirror is for images that are stored at one size"):
            with prepared.without_decoding():
                lars_keras.data.load("digits", data_dir=prepared.digits(), augment="crop_mirror")
        with self.assertRaisesRegex(ValueError, "`resized` is for imagenet2012 and folder"):
            lars_keras.data.load("digits", data_dir=prepared.digits(), resized="crop40")
        with self.assertRaisesRegex(ValueError, "needs `out_dir`"):
            prepare.prepare_resized("folder", self.folder, "crop40")
        with self.assertRaisesRegex(ValueError, "need about .* MB in .*, and 0.0 MB are free"):
            with unittest.mock.patch("shutil.disk_usage", lambda path: unittest.mock.Mock(free=1000)):
                prepare.prepare_resized("imagenet2012", prepared.imagenet(), "crop48", self.folder)


def contents(root):
    """Return the bytes of all files in a folder by their paths."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


if __name__ == "__main__":
    tf.test.main()
