"""Input pipelines of others, for `tools.benchmarks.input_pipeline`: each yields batches of uint8 images, endlessly."""

import concurrent.futures
import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from lars_keras.data.limits import cores

PACKAGES = {"Pillow": "PIL", "Grain": "grain", "torchvision": "torchvision"}


def installed(name: str) -> bool:
    """Return whether the package of a peer is installed."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def tutorial(builder: Any, train: bool, batch: int, size: int) -> tf.data.Dataset:
    """Decode the whole image, then resize it, as most tutorials do."""

    def pixels(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.image.resize(example["image"], (size, size))
        image = tf.image.random_flip_left_right(image) if train else image
        return image / 255.0, example["label"]

    config = tfds.ReadConfig(try_autocache=False)  # ImageNet is too large to hold its pixels; this sample is not
    examples = builder.as_dataset(split="train", shuffle_files=train, read_config=config).repeat()
    return examples.map(pixels, tf.data.AUTOTUNE).batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def by_pillow(files: list[bytes], windows: np.ndarray, size: int, resize: bool) -> Callable[[int], np.ndarray]:
    """Return a function that decodes window `i` and resizes it if `resize`. Pillow releases Python's lock for both."""
    from PIL import Image

    def pixels(i: int) -> np.ndarray:
        top, left, height, width = windows[i % len(windows)]
        box = (left, top, left + width, top + height)
        image = Image.open(io.BytesIO(files[i % len(files)])).convert("RGB")
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box) if resize else image.crop(box))

    return pixels


def pillow(pixels: Callable[[int], np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Yield batches from Pillow in a thread per core."""
    rows = itertools.count()
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        while True:
            yield np.stack(list(pool.map(pixels, itertools.islice(rows, batch))))


def grain(pixels: Callable[[int], np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Return an iterator of Grain over a shuffled range, in a thread per core."""
    from grain.python import MapDataset, ReadOptions

    rows = MapDataset.range(10**6).shuffle(seed=0).map(pixels).batch(batch, drop_remainder=True)
    return iter(rows.to_iter_dataset(ReadOptions(num_threads=cores(), prefetch_buffer_size=2 * cores())))


def torchvision(folder: str, batch: int, train: bool, crop: list[Any]) -> Iterator[Any]:
    """Return an iterator of torchvision's ImageFolder and DataLoader, with a worker process per core."""
    import torch
    from torchvision import datasets, transforms

    images = datasets.ImageFolder(f"{folder}/train", transforms.Compose([*crop, transforms.PILToTensor()]))
    many = torch.utils.data.ConcatDataset([images] * (100_000 // len(images)))
    return iter(torch.utils.data.DataLoader(many, batch, shuffle=train, num_workers=cores()))


def torchvision_crop(train: bool, size: int, stored: bool) -> list[Any]:
    """Return torchvision's transforms for the windows of training or evaluation."""
    from torchvision import transforms

    if not train:
        return [transforms.Resize(256), transforms.CenterCrop(size)]
    window = transforms.RandomCrop(size) if stored else transforms.RandomResizedCrop(size)
    return [window, transforms.RandomHorizontalFlip()]
