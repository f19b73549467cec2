"""Images that tests make, and the oracles of what decoding makes of them."""

import io
import os
import pathlib

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def jpeg(height, width, channels=3, seed=0):
    """Return a smooth random JPEG."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3, 4, channels))
    image = tf.image.resize(coarse, (height, width), method="bicubic")
    return tf.io.encode_jpeg(tf.saturate_cast(image, tf.uint8), quality=95).numpy()


def write_imagenet(root, file_format):
    """Write 29 training and 11 validation JPEGs of many sizes as the data set `imagenet2012`."""
    shapes = [(80, 120, 3), (120, 80, 3), (50, 50, 1), (90, 300, 3), (9, 7, 3), (1, 1, 3)]

    def split(n, seed):
        for i in range(n):
            data = jpeg(*shapes[i % len(shapes)], seed=seed + i)
            yield i, {"image": data, "label": i % 7, "file_name": f"{seed + i}.JPEG"}

    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet2012",
        version="5.1.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=7),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={"train": split(29, 0), "validation": split(11, 1000)},
        data_dir=os.fspath(root),
        file_format=file_format,
    )


def read_all(data, split):
    """Return all records of a split."""
    return list(getattr(data, split).records.dataset().as_numpy_iterator())


def parse(data, record):
    """Return the JPEG and the label of a record."""
    image, label = data._train.parse(record)
    return image.numpy(), int(label)


def read_with_tfds(root):
    """Return (JPEG, label) of both splits, as tfds itself reads them."""
    builder = tfds.builder_from_directory(os.path.join(root, "imagenet2012", "5.1.0"))
    examples = []
    for split in ("train", "validation"):
        dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        examples += [(e["image"], int(e["label"])) for e in dataset.as_numpy_iterator()]
    return examples


def photographs(count):
    """Return JPEGs like those of cameras: textures and edges; all samplings of color, qualities, turns; some gray."""
    for i in range(count):
        rng = np.random.default_rng(i)
        shape = rng.integers(180, 420, 2)
        pixels = np.full((*shape, 3), 128.0)
        for octave in range(1, 7):  # details of a photograph fall off with their frequency
            coarse = rng.normal(0, 128 / octave**1.5, (2**octave, 2**octave, 3)) * (1, 0.5, 0.5)
            pixels += tf.image.resize(coarse, shape, method="bicubic").numpy()
        top, left = rng.integers(0, shape // 2)
        pixels[top : top + shape[0] // 3, left : left + shape[1] // 3] *= 0.5
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "YCbCr").convert("L" if i % 8 == 7 else "RGB")
        tags = Image.Exif()
        if i % 4 == 1:
            tags[0x0112] = 1 + i // 4 % 8
        file = io.BytesIO()
        options = {} if image.mode == "L" else {"subsampling": ("4:4:4", "4:2:2", "4:2:0")[i % 3]}
        image.save(file, "JPEG", quality=(60, 75, 90, 95)[i // 3 % 4], progressive=i % 5 == 0, exif=tags, **options)
        yield file.getvalue()


def pillow_pixels(file):
    """Decode an image by Pillow: float64 RGB, upright."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    return np.asarray(image.convert("RGB")).astype(np.float64)


def reference_window(shape, draws):
    """Return the window of `random_crop`, one try at a time: (top, left, height, width)."""
    height, width = shape
    tries = [
        (height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * ratio - 1))
        for area, ratio in zip(draws[:10], draws[10:20], strict=True)
    ]
    sides = [(round((a / r) ** 0.5), round((a * r) ** 0.5)) for a, r in tries]
    fitting = [(h, w) for h, w in sides if h <= height and w <= width]
    h, w = fitting[0] if fitting else np.clip(sides[0], 1, shape)
    h, w = max(h, 1), max(w, 1)
    return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w


def reference_resize(image, size):
    """Resize by bilinear interpolation between pixel centers, in float64."""

    def along(length):
        points = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(points).astype(int)
        matrix = np.zeros((size, length))
        matrix[np.arange(size), low] = 1 - (points - low)
        matrix[np.arange(size), np.minimum(low + 1, length - 1)] += points - low
        return matrix

    columns = np.tensordot(along(image.shape[0]), image, 1)
    return np.tensordot(along(image.shape[1]), columns, (1, 1)).swapaxes(0, 1)


def little_endian(data):
    """Return the same JPEG with its EXIF tags, which Pillow writes in big-endian order, in little-endian order."""
    start = data.index(b"MM\x00*")
    count = int.from_bytes(data[start + 8 : start + 10], "big")
    tags = b"II*\x00" + (8).to_bytes(4, "little") + count.to_bytes(2, "little")
    for i in range(count):
        entry = data[start + 10 + 12 * i :][:12]
        tag, kind, n = (int.from_bytes(entry[a:b], "big") for a, b in ((0, 2), (2, 4), (4, 8)))
        value = int.from_bytes(entry[8:10], "big") if kind == 3 else int.from_bytes(entry[8:12], "big")
        tags += b"".join(x.to_bytes(size, "little") for x, size in ((tag, 2), (kind, 2), (n, 4), (value, 4)))
    return data[:start] + tags + data[start + len(tags) :]
