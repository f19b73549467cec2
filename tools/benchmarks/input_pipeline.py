"""Time how JPEGs become batches, against the decoder alone and against other pipelines.

    python -m tools.benchmarks.input_pipeline --data_dir=DIR --out=results/input_pipeline.json

DIR holds `imagenet2012` as `lars_keras.data.prepare` writes it. A few hundred images will do; they are repeated. All
candidates run in one process, in turn, on the training images, each with a fresh iterator that has already given two
batches. `ms` is the processor time of all threads and processes for an image, which says more than images/s on a busy
machine. `--folder=DIR` adds image files in DIR/train/CLASS and DIR/val/CLASS. Grain and torchvision are timed if they
are installed.

    python -m tools.benchmarks.input_pipeline --data_dir=DIR --memory --out=results/input_memory.json

feeds updates of 32,768 images in micro-batches of 256, as training does, and reports the memory of the process.
"""

import argparse
import atexit
import contextlib
import functools
import os
import pathlib
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_datasets as tfds

from lars_keras.data import ImageFileData, load
from lars_keras.data.cache import InMemory
from lars_keras.data.decode import NUM_DRAWS, central_window, random_window
from lars_keras.data.limits import cores
from lars_keras.data.loading import prepared_dir
from lars_keras.data.prepare import prepare_resized
from lars_keras.data.resized import Storage
from lars_keras.training.tensorflow.inputs import training_iterator
from tools.benchmarks import input_peers as peers
from tools.committed import write_json

STORED = ("squash256", "squash256_q90", "squash256_raw")
DECODER, RESIZED, FULL_SIZE = "decode_and_crop_jpeg alone", "decode_and_crop_jpeg and resize", "lars_keras, full size"
Candidate = Callable[[], Iterator[Any]]


class Repeated:
    """Repeat a split."""

    def __init__(self, examples, length: int):
        self._examples, self._length = examples, length
        self.nbytes = examples.nbytes

    def __len__(self) -> int:
        return self._length

    def example(self, i):
        return self._examples.example(i % len(self._examples))

    def where(self, i: int) -> str:
        return self._examples.where(i % len(self._examples))


def decoded(files: tf.Tensor, windows: np.ndarray, batch: int, size: int | None) -> tf.data.Dataset:
    """Return the upper bound: files in memory and known windows, decoded, and resized if `size` is given."""

    def pixels(i: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_and_crop_jpeg(files[i], window, channels=3)
        if size is None:
            return image[0, 0]  # so that they can be batched; all is decoded nevertheless
        return tf.cast(tf.image.resize(image, (size, size)) + 0.5, tf.uint8)

    rows = tf.data.Dataset.from_tensor_slices((np.arange(len(windows)) % files.shape[0], windows)).repeat()
    return rows.map(pixels, num_parallel_calls=cores()).batch(batch, drop_remainder=True).prefetch(2)


@functools.cache
def prepared(data_dir: str, form: str) -> str:
    """Store the images in another form, in a folder that is removed at the end."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    prepare_resized("imagenet2012", data_dir, form, folder)
    return folder


def full_size(data_dir: str, folder: str | None, batch: int, size: int) -> dict[str, dict[str, Candidate]]:
    """Return the candidates of training and of evaluation by name."""
    data = load("imagenet2012", data_dir=data_dir, image_size=size)
    assert isinstance(data, ImageFileData)
    builder = tfds.builder_from_directory(prepared_dir(pathlib.Path(data_dir), "imagenet2012"))
    held = InMemory(data.train_examples)
    files = [held.example(tf.constant(i))[0].numpy() for i in range(len(held))]
    shapes = [tf.image.extract_jpeg_shape(file)[:2] for file in files]
    rng = np.random.default_rng(0)
    count = len(files) * 20
    random = np.array([random_window(shapes[i % len(files)], rng.random(NUM_DRAWS, np.float32)) for i in range(count)])
    central = np.array([central_window(shape, size) for shape in shapes])

    def ours(examples: Any) -> ImageFileData:
        return ImageFileData("images", Repeated(examples, 10**6), Repeated(examples, 10**6), 1000, image_size=size)

    tensor = tf.constant(files)
    in_folder = load("folder", data_dir=folder, image_size=size) if folder else None

    def group(
        train: bool, windows: np.ndarray, batches: Callable[[ImageFileData], tf.data.Dataset]
    ) -> dict[str, Candidate]:
        found: dict[str, Candidate] = {
            DECODER: lambda: iter(decoded(tensor, windows, batch, None)),
            RESIZED: lambda: iter(decoded(tensor, windows, batch, size)),
            "lars_keras": lambda: iter(batches(ours(data.train_examples))),
            "lars_keras, --cache=memory": lambda: iter(batches(ours(held))),
            "tutorial: tfds, whole image, resize": lambda: iter(peers.tutorial(builder, train, batch, size)),
        }
        if isinstance(in_folder, ImageFileData):
            folder_split = in_folder.train_examples
            found["lars_keras, --dataset=folder"] = lambda: iter(batches(ours(folder_split)))
        return found | others(files, windows, batch, size, train, folder, resize=True)

    return {
        "training": group(True, random, lambda data: data.train_batches(batch)),
        "evaluation": group(False, central, lambda data: data.test_batches(batch)),
    }


def others(
    files: list[bytes], windows: np.ndarray, batch: int, size: int, train: bool, folder: str | None, *, resize: bool
) -> dict[str, Candidate]:
    """Return the candidates of other libraries, as far as they are installed."""
    found: dict[str, Candidate] = {}
    if peers.installed("Pillow"):
        pixels = peers.by_pillow(files, windows, size, resize)
        found["Pillow, threads"] = lambda: peers.pillow(pixels, batch)
        if peers.installed("Grain"):
            found["Grain with Pillow, threads"] = lambda: peers.grain(pixels, batch)
    if peers.installed("torchvision") and folder:
        crop = peers.torchvision_crop(train, size, stored=not resize)
        found["torchvision, processes"] = lambda: peers.torchvision(folder, batch, train, crop)
    return found


def stored(data_dir: str, batch: int, size: int) -> dict[str, Candidate]:
    """Return the candidates that read images stored at 256 x 256, which are stored for it."""
    full = load("imagenet2012", data_dir=data_dir, image_size=size)
    assert isinstance(full, ImageFileData)
    many = ImageFileData(
        "images", Repeated(full.train_examples, 10**6), full.test_examples, 1000, image_size=size, augment="crop_flip"
    )
    found: dict[str, Candidate] = {FULL_SIZE: functools.partial(_batches, many, batch)}
    for form in STORED:
        folder = prepared(data_dir, form)
        data = load("imagenet2012", data_dir=folder, image_size=size, augment="crop_mirror", resized=form)
        assert isinstance(data, ImageFileData)
        many = ImageFileData(
            "images",
            Repeated(data.train_examples, 10**6),
            data.test_examples,
            1000,
            image_size=size,
            augment="crop_mirror",
            storage=Storage.parse(form),
        )
        found[f"lars_keras, --resized={form}"] = functools.partial(_batches, many, batch)
        if form == STORED[0]:
            files = [data.train_examples.example(tf.constant(i))[0].numpy() for i in range(data.num_train)]
            start = np.random.default_rng(0).integers(0, 257 - size, (data.num_train * 20, 2))
            windows = np.concatenate([start, np.full_like(start, size)], 1).astype(np.int32)
            as_files = _written(files, pathlib.Path(folder) / "files") if peers.installed("torchvision") else None
            found[DECODER] = functools.partial(_decoder, tf.constant(files), windows, batch)
            found |= others(files, windows, batch, size, True, as_files, resize=False)
    return found


def _written(files: list[bytes], folder: pathlib.Path) -> str:
    """Write the stored images as files of one class."""
    (folder / "train" / "all").mkdir(parents=True)
    for i, file in enumerate(files):
        (folder / "train" / "all" / f"{i}.jpg").write_bytes(file)
    return str(folder)


def _decoder(files: tf.Tensor, windows: np.ndarray, batch: int) -> Iterator[Any]:
    return iter(decoded(files, windows, batch, None))


def _batches(data: ImageFileData, batch: int) -> Iterator[Any]:
    return iter(data.train_batches(batch))


def measure(candidate: Candidate, batch: int, images: int) -> tuple[float, float]:
    """Return images per second, and milliseconds of processor time for an image."""
    batches = candidate()
    for _ in range(2):
        next(batches)
    wall, busy = time.perf_counter(), _processor_time()
    for _ in range(images // batch):
        next(batches)
    count = images // batch * batch
    return count / (time.perf_counter() - wall), (_processor_time() - busy) / count * 1e3


def _processor_time() -> float:
    """Return the processor time of this process, of its ended children and of those that live."""
    total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:2])
    return total


def speeds(args: argparse.Namespace) -> dict[str, Any]:
    """Time all candidates in turn, print their tables and return them.

    A row's `of` has two ratios to each of two candidates of its table: of images/s, and of processor time.
    """
    for name in peers.PACKAGES:
        if not peers.installed(name):
            print(f"{name} is not installed: not run")
    tables: dict[str, Any] = {}
    groups = full_size(args.data_dir, args.folder, args.batch, args.size)
    groups["stored at 256 x 256"] = stored(args.data_dir, args.batch, args.size)
    for kind, group in groups.items():
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in group}
        for _ in range(args.rounds):
            for name, candidate in group.items():
                found[name].append(measure(candidate, args.batch, args.images))
        references = [name for name in (DECODER, RESIZED, FULL_SIZE) if name in found]
        tables[kind] = {}
        print(f"\n{kind}: images/s, ms; times {' and times '.join(references)} (by images/s; by ms)")
        for name, rounds in found.items():
            row: dict[str, Any] = {
                "images_per_second": statistics.median(r[0] for r in rounds),
                "ms": statistics.median(r[1] for r in rounds),
            }
            row["of"] = {
                reference: [
                    statistics.median(r[0] / o[0] for r, o in zip(rounds, found[reference], strict=True)),
                    statistics.median(o[1] / r[1] for r, o in zip(rounds, found[reference], strict=True)),
                ]
                for reference in references
            }
            row["rounds"] = rounds
            tables[kind][name] = row
            ratios = "  ".join(f"{speed:>8.2f}; {busy:.2f}" for speed, busy in row["of"].values())
            print(f"{name:<38}{row['images_per_second']:>7,.0f}{row['ms']:>8.2f}  {ratios}", flush=True)
    return tables


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Feed three epochs of 32,768 images, an update each, in micro-batches of 256."""
    data = load("imagenet2012", data_dir=args.data_dir, image_size=args.size)
    assert isinstance(data, ImageFileData)
    data = ImageFileData("images", Repeated(data.train_examples, 32768), data.test_examples, 1000, image_size=args.size)
    process, gib = psutil.Process(), 2**30
    before = process.memory_info().rss / gib

    def feed(worker: tf.distribute.InputContext, first_update: int) -> tf.data.Dataset:
        return data.train_batches(256, first=128 * first_update).map(lambda x, y, m: (x, tf.one_hot(y, 1000), m))

    epochs: list[float] = []
    iterator = training_iterator(feed, tf.distribute.get_strategy(), 256, 128, 0, updates=3)
    for epoch in range(3):
        most = 0.0
        for _ in range(128):
            next(iterator)
            most = max(most, process.memory_info().rss / gib)
        epochs.append(most)
        print(f"epoch {epoch + 1}: at most {most:.2f} GiB", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"before: {before:.2f} GiB; peak of the process: {peak:.2f} GiB")
    return {"gib_before": before, "gib_of_epochs": epochs, "gib_peak": peak}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--folder", help="images in DIR/train/CLASS and DIR/val/CLASS")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=227, help="height and width of the images made")
    parser.add_argument("--images", type=int, default=2048, help="images of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    results = memory(args) if args.memory else speeds(args)
    versions = {"tensorflow": tf.__version__, "cores": cores(), "machine": platform.machine()}
    print(
        f"\n{versions['cores']} cores, {platform.machine()}, tensorflow {tf.__version__}, {args.rounds} rounds, medians"
    )
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "data_dir", "folder")}
        results = {"versions": versions, "settings": settings, "results": results}
        write_json(pathlib.Path(args.out), results)


if __name__ == "__main__":
    main()
