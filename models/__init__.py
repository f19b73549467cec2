"""Image classifiers by name. They take raw pixels and return logits."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np

from models import alexnet, fast_cifar, lenet, resnet
from models.views import VIEWS, with_views

__all__ = ["VIEWS", "adapt", "default_image_size", "get", "names", "with_views"]


class _Spec(NamedTuple):
    build: Callable[..., keras.KerasTensor]
    image_size: int
    min_size: int
    std: float = 127.5  # Default; with the default mean, pixels become [-1, 1].
    adapt: Callable[[keras.Model, np.ndarray], None] | None = None  # Takes training images.


_SPECS = {
    # The initial values of the original expect unscaled pixels.
    "alexnet": _Spec(functools.partial(alexnet.alexnet, batch_norm=False), 227, 67, std=1.0),
    "alexnet_bn": _Spec(functools.partial(alexnet.alexnet, batch_norm=True), 227, 67),
    "alexnet_small": _Spec(functools.partial(alexnet.alexnet_small, batch_norm=True), 32, 16),
    "alexnet_small_lrn": _Spec(functools.partial(alexnet.alexnet_small, batch_norm=False), 32, 16),
    "fast_cifar": _Spec(fast_cifar.fast_cifar, 32, 9, adapt=fast_cifar.whiten),
    "fast_cifar_gelu": _Spec(
        functools.partial(fast_cifar.fast_cifar, activation="gelu"), 32, 9, adapt=fast_cifar.whiten
    ),
    "fast_cifar_medium": _Spec(
        functools.partial(fast_cifar.fast_cifar, widths=(64, 128, 128)), 32, 9, adapt=fast_cifar.whiten
    ),
    "fast_cifar_small": _Spec(
        functools.partial(fast_cifar.fast_cifar, widths=(32, 64, 128)), 32, 9, adapt=fast_cifar.whiten
    ),
    "lenet1989": _Spec(lenet.lenet1989, 16, 8),
    "resnet18": _Spec(resnet.resnet18, 32, 8),
    "resnet50": _Spec(resnet.resnet50, 224, 32),
}
_DEFAULT_MEAN = 127.5


def names() -> tuple[str, ...]:
    """Return the names that `get` accepts."""
    return tuple(_SPECS)


def default_image_size(name: str) -> int:
    """Return the image size that a model was designed for: height and width in pixels.

    Raises:
        ValueError: if `name` is not one of `names()`.
    """
    return _spec(name).image_size


def get(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    sync_batch_norm: bool = False,
    seed: int | None = None,
) -> keras.Model:
    """Build a functional model, not compiled.

    The model takes decoded images, uint8 `(batch, height, width, channels)`. Its first layer, `normalize`, subtracts
    `mean` and divides by `std` in float32, on the device. Do not scale images beforehand: Keras casts inputs to uint8,
    which would truncate them. The output is float32 logits `(batch, num_classes)` under every dtype policy. No layer
    has a weight regularizer, because the optimizer decays the weights.

    Args:
        name: one of `names()`.
        num_classes: positive int, the number of logits.
        input_shape: `(height, width, channels)`. By default an RGB image of `default_image_size(name)`.
        mean: mean of the pixels, on their scale of 0 to 255: a number, or one number per channel. Default 127.5.
        std: standard deviation of the pixels, on the same scale. Default 127.5, but 1 for `"alexnet"`, whose published
            initial values expect unscaled pixels: with another `std` it starts very slowly.
        sync_batch_norm: whether to take batch statistics over all replicas; see `models.batch_norm`. Models without
            batch normalization ignore it.
        seed: int that determines every layer's initial values and dropout masks, independent of the global random
            state. None uses the global state (`keras.utils.set_random_seed`).

    Returns:
        A `keras.Model` called `name`. `model.save("x.keras")` stores it completely.

    Raises:
        ValueError: for an unknown name or an argument out of range, or if Keras's image data format is another one.
    """
    spec = _spec(name)
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "The networks need channels last: call `keras.config.set_image_data_format('channels_last')`. Received: "
            f"{keras.config.image_data_format()}"
        )
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"`num_classes` must be a positive integer. Received: {num_classes=}")
    if input_shape is None:
        input_shape = (spec.image_size, spec.image_size, 3)
    if len(input_shape) != 3 or any(not isinstance(n, int) or n < 1 for n in input_shape):
        raise ValueError(
            "`input_shape` must be (height, width, channels), three positive integers. "
            f"Received: input_shape={input_shape}"
        )
    height, width, channels = input_shape
    if min(height, width) < spec.min_size:
        raise ValueError(
            f"`input_shape` is too small: '{name}' needs images of at least "
            f"{spec.min_size} x {spec.min_size} pixels. Received: input_shape={input_shape}"
        )
    means = _per_channel("mean", _DEFAULT_MEAN if mean is None else mean, channels)
    stds = _per_channel("std", spec.std if std is None else std, channels)
    if min(stds) <= 0:
        raise ValueError(f"`std` must be > 0. Received: std={std}")

    images = keras.Input(input_shape, dtype="uint8", name="images")
    x = keras.layers.Normalization(mean=means, variance=[s**2 for s in stds], dtype="float32", name="normalize")(images)
    logits = spec.build(x, num_classes, _seeds(seed), synchronized=sync_batch_norm)
    return keras.Model(images, logits, name=name)


def adapt(model: keras.Model, images: Callable[[int], np.ndarray]) -> None:
    """Set the weights that are computed from training images.

    These are the whitening kernels of the `fast_cifar` models. Other models have none and are unchanged.

    Args:
        model: from `get`.
        images: takes a number and returns that many training images, not augmented: uint8 `(n, height, width,
            channels)`.
    """
    change = _spec(model.name).adapt
    if change:
        change(model, images(fast_cifar.WHITENING_IMAGES))


def _spec(name: str) -> _Spec:
    if name not in _SPECS:
        raise ValueError(f"`name` must be one of {', '.join(_SPECS)}. Received: name={name!r}")
    return _SPECS[name]


def _seeds(seed: int | None) -> Iterator[int | None]:
    """Return an endless iterator of unrelated seeds. With `seed + i`, two runs would share layers."""
    if seed is None:
        return itertools.repeat(None)
    rng = random.Random(seed)
    return (rng.getrandbits(31) for _ in itertools.count())


def _per_channel(argument: str, value: float | Sequence[float], channels: int) -> list[float]:
    if np.ndim(value) > 0 and np.shape(value) != (channels,):
        raise ValueError(
            f"`{argument}` must be a number or one number for each of the {channels} channels. "
            f"Received: {argument}={value}"
        )
    return np.broadcast_to(np.asarray(value, "float64"), (channels,)).tolist()
