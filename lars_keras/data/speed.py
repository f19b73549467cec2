"""Say how fast a data set becomes batches, where the time goes, and what would help.

    python -m lars_keras.data.speed -n imagenet2012 -d DATA_DIR -w 3000

reads the training images for 20 seconds. The option -w gives the number of images that the model takes in a second, and
-h lists all options.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_keras.data.base import AUGMENTS, ImageData, check_arguments
from lars_keras.data.image_files import ImageFileData
from lars_keras.data.limits import cores, free_memory
from lars_keras.data.loading import CACHES, NAMES, load
from lars_keras.data.resized import Storage

if TYPE_CHECKING:
    import tensorflow as tf

_MOSTLY = 0.5  # of the processor time: a part that is worth another form of the images
_NEAR = 1.5  # times the speed of the batches: reading alone is not much faster, so it is the limit


@dataclasses.dataclass(frozen=True)
class Part:
    """Throughput and processor time of images up to some point on their way to a batch.

    Attributes:
        name: description of the work.
        images_per_second: by wall time.
        milliseconds: milliseconds of processor time, over all threads, for an image.
    """

    name: str
    images_per_second: float
    milliseconds: float


def measure(data: ImageData, batch_size: int = 256, seconds: float = 20.0) -> list[Part]:
    """Time the training data of this host.

    Args:
        data: from `lars_keras.data.load`.
        batch_size: images of a batch.
        seconds: total time to read; positive.

    Returns:
        "reading" and "decoding", if images are decoded when they are used, and "batches". Each part includes the work
        of the part before it.

    Raises:
        ValueError: if `batch_size` is not positive, or no training image can be read and decoded.
    """
    check_arguments(batch_size, (0, 1))
    parts: dict[str, Callable[[], Iterable[Any]]] = {}
    if isinstance(data, ImageFileData):
        parts["reading"] = lambda: _images(data, batch_size, _length_of_file)
        if data.resizes:
            parts["decoding"] = lambda: _images(data, batch_size, _decoded)
    parts["batches"] = lambda: data.train_batches(batch_size)
    return [_timed(name, make(), batch_size, seconds / len(parts)) for name, make in parts.items()]


def _images(data: ImageFileData, batch_size: int, stage: Callable[[Any, Any], Any]) -> Any:
    """Apply `stage` to the files of random training images, in as many threads as `data`; return the batches.

    Raises:
        ValueError: if that fails for all images, because the endless stream without them would never yield any.
    """
    import tensorflow as tf

    ids = tf.data.Dataset.from_tensor_slices(np.random.default_rng(0).permutation(data.num_train))

    def rows(ids: tf.data.Dataset) -> tf.data.Dataset:
        return ids.map(
            lambda i: stage(data.train_examples.example(i)[0], i),
            num_parallel_calls=data.threads or tf.data.AUTOTUNE,
            deterministic=False,
        ).ignore_errors()

    if not list(rows(ids).take(1)):
        raise ValueError(f"None of the {data.num_train:,} training images can be read and decoded: {data.description}")
    return rows(ids.repeat()).batch(batch_size, drop_remainder=True).prefetch(2)


def _length_of_file(image: Any, i: Any) -> Any:
    import tensorflow as tf

    return tf.strings.length(image)


def _decoded(image: Any, i: Any) -> Any:
    """Return one pixel of the random window that training would decode."""
    import tensorflow as tf

    from lars_keras.data.decode import NUM_DRAWS, decode_window, random_window

    draws = tf.random.stateless_uniform((NUM_DRAWS,), tf.stack([i, 0]))
    return decode_window(image, lambda shape: random_window(shape, draws))[0, 0]


def _timed(name: str, batches: Iterable[Any], batch_size: int, seconds: float) -> Part:
    """Take batches for this many seconds, after a first one."""
    iterator = iter(batches)
    next(iterator)
    started, processor = time.perf_counter(), time.process_time()
    images, elapsed = 0, 0.0
    while elapsed < seconds:
        next(iterator)
        images, elapsed = images + batch_size, time.perf_counter() - started
    return Part(name, images / elapsed, 1e3 * (time.process_time() - processor) / images)


def report(data: ImageData, parts: Sequence[Part], wanted: float | None = None, cache: str = "none") -> str:
    """Return the measurement and its consequences, as lines of text.

    Args:
        data: the data set.
        parts: from `measure`.
        wanted: images per second that the model takes.
        cache: the cache in use; see `lars_keras.data.load`.
    """
    whole = parts[-1]
    lines = [
        f"{data.description}, {data.image_shape[0]} x {data.image_shape[1]} pixels, augment={data.augment}; "
        f"{cores()} cores",
        f"{'':<12}{'images/s':>12}{'ms of processor time per image':>32}",
        *(f"{part.name:<12}{part.images_per_second:>12,.0f}{part.milliseconds:>32.2f}" for part in parts),
    ]
    if len(parts) > 1:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in _shares(parts).items())
        lines.append(f"Processor time: {shares}.")
    if wanted:
        wait = max(0.0, 1 - whole.images_per_second / wanted)
        lines.append(f"A model that takes {wanted:,.0f} images/s would wait {100 * wait:.0f} % of its time.")
    advice = suggestions(data, parts, wanted, free_memory(), cache)
    if wanted and whole.images_per_second >= wanted:
        nothing = "The images come fast enough."
    elif not isinstance(data, ImageFileData) or (data.storage and data.storage.encoding == "raw"):
        nothing = "The images are in their fastest form already."
    else:
        nothing = "No single part takes most of the time."
    return "\n".join([*lines, *(advice or [nothing])])


def _shares(parts: Sequence[Part]) -> dict[str, float]:
    """Return the fraction of the processor time of each part alone."""
    total = max(parts[-1].milliseconds, 1e-9)
    before, shares = 0.0, {}
    for part in parts:
        shares[part.name] = max(0.0, min(part.milliseconds, total) - before) / total
        before = max(before, min(part.milliseconds, total))
    return shares


def suggestions(
    data: ImageData, parts: Sequence[Part], wanted: float | None, free: int, cache: str = "none"
) -> list[str]:
    """Return ways to make the batches come faster, a sentence each, the most promising first.

    Args:
        data: the data set.
        parts: from `measure`.
        wanted: images per second that the model takes; None if not known.
        free: bytes of memory that are free.
        cache: the cache in use; see `lars_keras.data.load`.
    """
    if not isinstance(data, ImageFileData) or (wanted and parts[-1].images_per_second >= wanted):
        return []
    found, shares = [], _shares(parts)
    if parts[0].images_per_second < _NEAR * parts[-1].images_per_second:
        size = data.train_examples.nbytes + data.test_examples.nbytes
        fits = "memory" if 2 * size < free else "disk"
        where = "in memory" if fits == "memory" else "on a local disk"
        if cache not in ("memory", fits):
            found.append(
                f'Reading is the limit. `cache="{fits}"` keeps the files, {size / 2**30:.1f} GiB, {where}; it pays '
                "from the second epoch on."
            )
    if data.resizes:
        if shares["decoding"] + shares["batches"] > _MOSTLY:
            store = (
                'Store the images once at 256 x 256 with `lars_keras.data.prepare` and `resize="squash256"`, and train'
            )
            found.append(
                f"Decoding and resizing take most of the time. {'Train' if data.storage else store} with "
                '`augment="crop_mirror"`: another augmentation, that of AlexNet.'
            )
    elif data.storage and data.storage.encoding != "raw" and shares["batches"] > _MOSTLY:
        raw = (data.num_train + data.num_test) * 3 * data.storage.size**2
        form = Storage(data.storage.mode, data.storage.size, "raw")
        found.append(
            f'Decoding takes most of the time. `resize="{form}"` stores pixels, {raw / 2**30:.1f} GiB, which the disk '
            f"must read at {3 * data.storage.size**2 * (wanted or parts[0].images_per_second) / 1e6:,.0f} MB/s."
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit code: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m lars_keras.data.speed", description="Say how fast a data set becomes batches."
    )
    parser.add_argument("-n", "--dataset", required=True, choices=NAMES, help="name of the data set")
    parser.add_argument("-d", "--data_dir", help="its folder (default: ~/tensorflow_datasets)")
    parser.add_argument("-s", "--image_size", type=int, help="height and width of the images")
    parser.add_argument("-a", "--augment", choices=AUGMENTS, help="augmentation")
    parser.add_argument("-r", "--resized", metavar="FORM", help="form of the stored images, such as squash256")
    parser.add_argument("-c", "--cache", default="none", choices=CACHES)
    parser.add_argument("--cache_dir", help="folder of the copies on disk (default: ~/.cache/lars_keras)")
    parser.add_argument("--validation_split", type=float, default=0.0, help="fraction of the images to hold out")
    parser.add_argument("-b", "--batch_size", type=int, default=256, help="images of a batch (default: 256)")
    parser.add_argument("-t", "--seconds", type=float, default=20.0, help="how long to read (default: 20)")
    parser.add_argument("-w", "--wanted", type=float, metavar="IMAGES", help="images that the model takes in a second")
    options = parser.parse_args(arguments)
    try:
        if not (options.seconds > 0 and (options.wanted is None or options.wanted > 0)):
            raise ValueError(
                f"`seconds` and `wanted` must be positive. Received: seconds={options.seconds}, wanted={options.wanted}"
            )
        data = load(
            options.dataset,
            data_dir=options.data_dir,
            image_size=options.image_size,
            augment=options.augment,
            resized=options.resized,
            cache=options.cache,
            cache_dir=options.cache_dir,
            validation_split=options.validation_split,
        )
        print(report(data, measure(data, options.batch_size, options.seconds), options.wanted, options.cache))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
