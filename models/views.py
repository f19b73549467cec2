"""Test-time views: logits averaged over flipped and shifted copies of each image."""

from typing import Any

import keras
from keras import layers, ops

VIEWS = (1, 2, 6)


@keras.saving.register_keras_serializable(package="lars_keras")
class View(layers.Layer):
    """Flip and shift images; a reflection fills the border that a shift uncovers.

    Args:
        flip: whether left and right change places.
        shift: pixels to move the images down and to the right; negative: up and to the left.
    """

    def __init__(self, flip: bool, shift: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.flip, self.shift = flip, shift

    def call(self, images: Any) -> Any:
        for axis in (1, 2):
            images = _shifted(images, self.shift, axis)
        return ops.flip(images, 2) if self.flip else images

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "flip": self.flip, "shift": self.shift}


def with_views(model: keras.Model, count: int) -> keras.Model:
    """Wrap a classifier so that it averages its logits over views of each image. The weights are shared.

    Source: the evaluation of airbench (Jordan 2024, arXiv 2404.00498, section 3.3).

    Args:
        model: images in, logits out.
        count: 1 for the image alone; 2 for the image and its mirror image; 6 for these with a weight of one half, and
            for the same two moved by a pixel along the diagonal either way with a weight of one quarter each.

    Returns:
        A model with the inputs and outputs of `model`.

    Raises:
        ValueError: for another count.
    """
    if count not in VIEWS:
        raise ValueError(f"`count` must be one of {VIEWS}. Received: count={count}")
    images = keras.Input(model.input_shape[1:], dtype=model.inputs[0].dtype, name="images")
    shifts = {0: 0.5, 1: 0.25, -1: 0.25} if count == 6 else {0: 1.0}
    flips = (False,) if count == 1 else (False, True)
    weighted: list[Any] = []
    for shift, weight in shifts.items():
        for flip in flips:
            name = f"view{len(weighted)}"
            logits = model(View(flip, shift, dtype="uint8", name=name)(images))
            weighted.append(layers.Rescaling(weight / len(flips), dtype="float32", name=f"{name}_share")(logits))
    logits = layers.Add(dtype="float32", name="mean")(weighted) if count > 1 else weighted[0]
    return keras.Model(images, logits, name=f"{model.name}_{count}_views")


def _shifted(images: Any, shift: int, axis: int) -> Any:
    """Move images along an axis by at most their size."""
    if not shift:
        return images
    size = images.shape[axis]

    def part(start: int, end: int) -> Any:
        return images[:, start:end] if axis == 1 else images[:, :, start:end]

    if shift > 0:
        return ops.concatenate([ops.flip(part(1, shift + 1), axis), part(0, size - shift)], axis)
    return ops.concatenate([part(-shift, size), ops.flip(part(size - 1 + shift, size - 1), axis)], axis)
