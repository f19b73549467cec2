"""The speed of data: the clock, the parts, and what follows from them."""

import contextlib
import io
import pathlib
import tempfile
from unittest import mock

import tensorflow as tf
from absl.testing import parameterized

import lars_keras.data
from lars_keras.data import prepare, speed
from lars_keras.data.speed import Part
from tests import prepared
from tests.data.streams import small_arrays


def parts(reading, batches, decoding=None):
    """Return parts from (images/s, milliseconds)."""
    found = {"reading": reading, "decoding": decoding, "batches": batches}
    return [Part(name, *measured) for name, measured in found.items() if measured]


class SpeedTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.images = lars_keras.data.load("imagenet2012", data_dir=prepared.imagenet(), image_size=32)
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        prepare.prepare_resized("imagenet2012", prepared.imagenet(), "crop40_q90", folder)
        cls.stored = lars_keras.data.load(
            "imagenet2012", data_dir=folder, image_size=32, resized="crop40_q90", augment="crop_mirror"
        )
        cls.resized = lars_keras.data.load(
            "imagenet2012", data_dir=folder, image_size=32, resized="crop40_q90", augment="crop_flip"
        )
        cls.arrays = small_arrays()

    @parameterized.parameters(
        ("images", ["reading", "decoding", "batches"]),
        ("resized", ["reading", "decoding", "batches"]),
        ("stored", ["reading", "batches"]),
        ("arrays", ["batches"]),
    )
    def test_parts(self, name, expected):
        found = speed.measure(getattr(self, name), batch_size=8, seconds=0.01)
        self.assertEqual([part.name for part in found], expected)
        for part in found:
            self.assertGreater(part.images_per_second, 0)

    def test_no_image_can_be_decoded(self):
        folder = pathlib.Path(self.get_temp_dir())
        for i, split in enumerate(("train", "train", "val")):
            (folder / split / "a").mkdir(parents=True, exist_ok=True)
            (folder / split / "a" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(speed.main(["-n", "folder", "-d", str(folder), "-t", "0.01", "-b", "2"]), 2)
        self.assertIn("None of the 2 training images can be read and decoded", err.getvalue())

    def test_an_image_is_timed_by_both_clocks(self):
        clock = mock.Mock(wall=7.0, cpu=3.0)
        clock.perf_counter, clock.process_time = lambda: clock.wall, lambda: clock.cpu

        def batches():
            while True:
                yield
                clock.wall, clock.cpu = clock.wall + 0.5, clock.cpu + 1.0

        with mock.patch.object(speed, "time", clock):
            part = speed._timed("batches", batches(), batch_size=8, seconds=2.0)
        self.assertEqual(part, Part("batches", images_per_second=16.0, milliseconds=125.0))

    @parameterized.named_parameters(
        ("decoding", "images", parts((9000, 0.1), (1000, 2.0), (1500, 1.4)), 'resize="squash256"'),
        ("resizing", "images", parts((9000, 0.1), (1000, 2.0), (3000, 0.8)), 'resize="squash256"'),
        ("stored_and_resized", "resized", parts((9000, 0.1), (1000, 2.0), (1500, 1.4)), "^[^.]*time. Train with"),
        ("reading_fits", "images", parts((1100, 0.1), (1000, 0.15), (1050, 0.14)), 'cache="memory"'),
        ("stored", "stored", parts((9000, 0.1), (1000, 2.0)), 'resize="crop40_raw"'),
    )
    def test_what_would_help(self, name, measured, expected):
        (sentence,) = speed.suggestions(getattr(self, name), measured, None, free=2**40)
        self.assertRegex(sentence, expected)
        self.assertEqual(speed.suggestions(getattr(self, name), measured, 1000, free=2**40), [])  # it is fast enough
        self.assertLen(speed.suggestions(getattr(self, name), measured, 1001, free=2**40), 1)

    def test_little_memory(self):
        size = self.images.train_examples.nbytes + self.images.test_examples.nbytes
        measured = parts((1100, 0.1), (1000, 0.15), (1050, 0.14))
        for free, cache in ((2 * size, "disk"), (2 * size + 1, "memory")):
            (sentence,) = speed.suggestions(self.images, measured, None, free=free)
            self.assertIn(f'cache="{cache}"', sentence)
            for used in {cache, "memory"}:  # what is in use is not proposed
                self.assertEqual(speed.suggestions(self.images, measured, None, free=free, cache=used), [])

    def test_bytes_of_the_pixels(self):
        measured = parts((9000, 0.1), (1000, 2.0))
        (sentence,) = speed.suggestions(self.stored, measured, 5000, free=2**40)
        self.assertIn("24 MB/s", sentence)  # 5,000 x 40 x 40 x 3 bytes

    def test_report(self):
        measured = parts((9000, 0.1), (1000, 2.0), (1500, 1.4))
        text = speed.report(self.images, measured, 4000)
        self.assertIn("Processor time: reading 5 %, decoding 65 %, batches 30 %.", text)
        self.assertIn("A model that takes 4,000 images/s would wait 75 % of its time.", text)
        self.assertIn("squash256", text)
        self.assertIn("in their fastest form already", speed.report(self.arrays, [Part("batches", 1e6, 0.01)]))
        spread = parts((1667, 0.6), (1000, 1.0), (1111, 0.9))
        self.assertIn("No single part takes most of the time.", speed.report(self.images, spread))
        self.assertIn("The images come fast enough.", speed.report(self.images, measured, 1000))

    def test_command(self):
        arguments = ["-n", "imagenet2012", "-d", prepared.imagenet(), "-s", "32", "-b", "8", "-t", "0.01", "-w", "1e9"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(speed.main(arguments), 0)
        self.assertRegex(out.getvalue(), r"(?s)images/s.*reading .*decoding .*batches .*would wait (99|100) %")
        copies = pathlib.Path(self.get_temp_dir(), "copies")
        cached = ["--cache=disk", f"--cache_dir={copies}", "--validation_split=0.25"]
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(speed, "load", wraps=speed.load) as loaded:
            self.assertEqual(speed.main([*arguments, *cached]), 0)
        self.assertEqual(loaded.call_args.kwargs["validation_split"], 0.25)
        self.assertNotEmpty(list(copies.iterdir()))

    @parameterized.parameters(
        (["-t", "0"], "`seconds` and `wanted` must be positive. Received: seconds=0.0, wanted=None"),
        (["-w", "-1"], "wanted=-1.0"),
        (["-r", "crop9"], "`resized` must be crop or squash"),
        (["-b", "0"], "`batch_size` must be a positive multiple"),
    )
    def test_mistakes(self, arguments, message):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(speed.main(["-n", "imagenet2012", "-d", prepared.imagenet(), *arguments]), 2)
        self.assertIn(message, err.getvalue())


if __name__ == "__main__":
    tf.test.main()
