"""Orientation of encoded images, wherever it stands, against Pillow."""

import io
import itertools
import warnings

import tensorflow as tf
from PIL import Image

from lars_keras.data.orientation import may_be_turned, orientation
from tests.data.images import pillow_pixels

ORIENTATION, DESCRIPTION, MAKER = 0x0112, 0x010E, 0x010F
SHORT, LONG, BYTE = 3, 4, 1


def tiff(turn, order="MM", kind=SHORT, count=1, thumbnail=None, before=(), end=None):
    """Return the contents of an EXIF block: a directory with entries and the orientation, and that of a thumbnail."""
    big = "big" if order == "MM" else "little"

    def directory(turn, following):
        entries = [(tag, LONG, 1, 7) for tag in before]
        if turn is not None:
            entries.append((ORIENTATION, kind, count, turn))
        data = len(entries).to_bytes(2, big)
        for tag, kind_of, n, value in entries:
            size = {BYTE: 1, SHORT: 2}.get(kind_of, 4)
            data += tag.to_bytes(2, big) + kind_of.to_bytes(2, big) + n.to_bytes(4, big)
            data += value.to_bytes(size, big).ljust(4, b"\0")
        return data + following.to_bytes(4, big)

    size = len(directory(turn, 0))
    data = directory(turn, 0 if thumbnail is None else 8 + size)
    if thumbnail is not None:
        data += directory(thumbnail, 0)
    whole = order.encode() + (42).to_bytes(2, big) + (8).to_bytes(4, big) + data
    return whole[:end]


def app(code, body):
    """Return a segment of a JPEG."""
    return b"\xff" + bytes([code]) + (len(body) + 2).to_bytes(2, "big") + body


def exif(*args, **kwargs):
    return app(0xE1, b"Exif\0\0" + tiff(*args, **kwargs))


def saved(file_format="JPEG", **options):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, file_format, **options)
    return file.getvalue()


def jpeg(*segments, after_tables=False):
    """Return a JPEG with segments after its first two bytes, or right before its frame header."""
    whole = saved()
    place = whole.index(b"\xff\xc0") if after_tables else 2
    return whole[:place] + b"".join(segments) + whole[place:]


def jfif(thumbnail):
    return app(0xE0, b"JFIF\0\1\1\0\0\1\0\1" + bytes([thumbnail, thumbnail]) + bytes(3 * thumbnail**2))


def xmp(turn, form='<x tiff:Orientation="{}"/>'):
    return app(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + form.format(turn).encode())


ICC = app(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xda\xff\xe1" * 700)
EMBEDDED = app(0xED, b"Photoshop 3.0\0" + jpeg(exif(8)) + bytes(40_000))
JPEGS = {
    "nothing": jpeg(),
    "first": jpeg(exif(6)),
    "after JFIF": jpeg(jfif(0), exif(6)),
    "JFIF with a thumbnail": jpeg(jfif(2), exif(6)),
    "JFXX": jpeg(jfif(0), app(0xE0, b"JFXX\0\x13" + bytes(8)), exif(6)),
    "XMP first": jpeg(app(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), exif(6)),
    "ICC first": jpeg(ICC, exif(6)),
    "comment like pixels among the tables": jpeg(app(0xFE, b"\xff\xda" * 1500), exif(6), after_tables=True),
    "comment first": jpeg(app(0xFE, b"Exif\0\0 made by me"), exif(6)),
    "Adobe first": jpeg(app(0xEE, b"Adobe\0d\0\0\0\0\0"), exif(6)),
    "40 kB of Photoshop with a turned JPEG first": jpeg(EMBEDDED, exif(6)),
    "only a turned JPEG inside Photoshop's": jpeg(EMBEDDED),
    "many": jpeg(jfif(0), ICC, ICC, app(0xFE, b"c"), EMBEDDED, EMBEDDED, app(0xEC, b"Ducky"), exif(3)),
    "after the tables": jpeg(exif(6), after_tables=True),
    "fill bytes": jpeg(b"\xff" * 7, app(0xFE, b"c"), b"\xff" * 3, exif(6)),
    "two": jpeg(exif(6), exif(3)),
    "Intel": jpeg(exif(6, "II")),
    "LONG": jpeg(exif(6, kind=LONG)),
    "LONG, Intel": jpeg(exif(6, "II", kind=LONG)),
    "BYTE": jpeg(exif(6, kind=BYTE)),
    "of two values": jpeg(exif(6, count=2)),
    "behind other tags": jpeg(exif(5, before=(DESCRIPTION, MAKER) * 200)),
    "of the thumbnail only": jpeg(exif(None, thumbnail=6)),
    "of the thumbnail, too": jpeg(exif(1, "II", thumbnail=6)),
    "of the thumbnail is 1": jpeg(exif(6, thumbnail=1)),
    "0": jpeg(exif(0)),
    "9": jpeg(exif(9)),
    "256": jpeg(exif(256, "II")),
    "in the bytes of a value": jpeg(app(0xE1, b"Exif\0\0" + tiff(None, before=(MAKER,)) + exif(6)[-22:])),
    "cut off": jpeg(exif(6, before=(MAKER,), end=24)),
    "XMP": jpeg(xmp(8)),
    "XMP as an element": jpeg(xmp(3, "<tiff:Orientation>{}</tiff:Orientation>")),
    "XMP beside EXIF": jpeg(xmp(8), exif(6)),
    "XMP beside EXIF without it": jpeg(exif(None, before=(MAKER,)), xmp(8)),
    "more XMP": jpeg(xmp(8), app(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40))),
}
XML = '<x tiff:Orientation="7"/>'


class OrientationTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        string = [tf.TensorSpec([], tf.string)]
        # Compiled without a Python function, as for hosts that run none.
        cls.orientation = staticmethod(tf.function(orientation, input_signature=string))
        cls.may_be_turned = staticmethod(tf.function(may_be_turned, input_signature=string))
        operations = {node.op for node in cls.orientation.get_concrete_function().graph.as_graph_def().node}
        assert not operations & {"PyFunc", "EagerPyFunc", "PyFuncStateless"}

    def check(self, file):
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged blocks
            return self.compare(file)

    def compare(self, file):
        image = Image.open(io.BytesIO(file))
        image.load()
        expected = image.getexif().get(ORIENTATION, 1)
        if not isinstance(expected, int) or not 1 <= expected <= 8:
            expected = 1
        self.assertEqual(int(self.orientation(file)), expected)
        self.assertEqual(pillow_pixels(file).shape, (24, 16, 3) if expected >= 5 else (16, 24, 3))
        return expected

    # One test each for a table: TensorFlow optimizes a function again in every test.
    def test_jpegs(self):
        for name, file in JPEGS.items():
            with self.subTest(name):
                if self.check(file) != 1:
                    self.assertTrue(self.may_be_turned(file))

    def test_the_table_turns(self):
        turns = [int(self.orientation(file)) for file in JPEGS.values()]
        self.assertGreater(sum(turn > 1 for turn in turns), 20)
        comment = app(0xFE, b"Exif\0\0 made by me")
        for segments in ((), (ICC,), (comment, EMBEDDED, ICC)):  # before the segment that Pillow writes
            self.assertFalse(self.may_be_turned(jpeg(*segments)))

    def test_every_turn(self):
        for file_format, order, turn in itertools.product(("JPEG", "PNG", "WEBP"), ("MM", "II"), range(1, 9)):
            with self.subTest(file_format=file_format, order=order, turn=turn):
                block = b"Exif\0\0" + tiff(turn, order, thumbnail=2)
                self.assertEqual(self.check(saved(file_format, exif=block)), turn)

    def test_png_and_webp(self):
        block = tiff(6, "II", kind=LONG)
        png = saved("PNG", exif=block)
        chunk = png[png.index(b"eXIf") - 4 :][: len(block) + 12]
        without = png.replace(chunk, b"")
        last = without.index(b"IEND") - 4
        for file, turn in (
            (png, 6),
            (without, 1),
            (without[:last] + chunk + without[last:], 6),
            (saved("WEBP", exif=block), 6),
            (saved("WEBP", exif=block, lossless=True, icc_profile=b"EXIF" * 9), 6),
            (saved("WEBP", xmp=XML.encode()), 7),
            (saved("WEBP"), 1),
            (saved("GIF"), 1),
            (saved("BMP"), 1),
        ):
            self.assertEqual(self.check(file), turn)

    def test_damaged_files_mean_no_turn(self):
        good = jpeg(exif(6))
        for file in (
            b"",
            b"Exif",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\neXIf",
            b"RIFF1234WEBP",
            b"012345Exif",
            good[:20],
        ):
            self.assertEqual(int(self.orientation(file)), 1)
            self.may_be_turned(file)
        for cut in range(2, len(good), 3):
            self.assertIn(int(self.orientation(good[:cut])), (1, 6))


if __name__ == "__main__":
    tf.test.main()
