"""AlexNet with local response normalization or batch normalization, full size and small."""

from collections.abc import Iterator
from typing import NamedTuple

import keras
from keras import ops

from models.batch_norm import batch_normalization
from models.lrn import LocalResponseNormalization


@keras.saving.register_keras_serializable(package="lars_keras")
class GroupedConv2D(keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that computes its groups as separate convolutions.

    On the CPU outside XLA, TensorFlow has no gradient of a grouped convolution. The kernel stays one variable of shape
    `(height, width, channels // groups, filters)`, so that an optimizer takes one norm over all groups. Channels are
    last.
    """

    def convolution_op(self, inputs, kernel):
        convolve = super().convolution_op
        inputs = ops.split(inputs, self.groups, axis=-1)
        kernels = ops.split(kernel, self.groups, axis=-1)
        return ops.concatenate([convolve(x, k) for x, k in zip(inputs, kernels, strict=True)], axis=-1)


@keras.saving.register_keras_serializable(package="lars_keras")
class CentredHeNormal(keras.initializers.HeNormal):
    """A `keras.initializers.HeNormal` that subtracts from each filter its mean over the inputs.

    The inputs of a layer behind a ReLU are positive. The part that all images share outweighs their differences, the
    more the deeper the layer. A filter of mean 0 starts without the shared part.
    """

    def __call__(self, shape, dtype=None):
        kernel = super().__call__(shape, dtype)
        return kernel - ops.mean(kernel, axis=tuple(range(len(shape) - 1)), keepdims=True)


class _Conv(NamedTuple):
    filters: int
    size: int
    strides: int = 1
    padding: str = "same"
    groups: int = 1
    bias: float = 0.0  # initial value


def alexnet(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    batch_norm: bool,
    synchronized: bool,
) -> keras.KerasTensor:
    """Build AlexNet, or AlexNet-BN, for images of about 227 x 227 pixels.

    AlexNet (Krizhevsky, Sutskever, Hinton 2012):

    - Five convolutions; the second, fourth and fifth have two groups.
    - Local response normalization (n=5, k=2, alpha=1e-4, beta=0.75) after the first two convolutions.
    - Overlapping 3x3 / 2 max pooling after the first, second and fifth.
    - Two hidden dense layers of 4096 units with dropout 0.5.
    - Initial kernels N(0, 0.01), for fc6 and fc7 N(0, 0.005). The biases of conv2, conv4, conv5, fc6 and fc7 start at
      0.1, all others at 0. These are the initial values of Caffe's bvlc_alexnet, which the LARS experiments used. Its
      authors report a flat loss with the 2012 paper's biases of 1. Pixels are expected minus their mean, unscaled.

    AlexNet-BN (You, Gitman, Ginsburg 2017, arXiv 1708.03888): the paper replaces the response normalization by batch
    normalization, and gives no details. The authors' published network definition (NVCaffe,
    models/alexnet_bn/train_val.prototxt) has batch normalization with scale and shift after each convolution and before
    its ReLU, momentum 0.9, epsilon 1e-4, two groups, dropout 0.5, and convolutions without bias. Our choice: conv5 has
    no bias either. In the authors' definition it has one, which the normalization cancels.
    """
    convs = (
        _Conv(96, 11, strides=4, padding="valid"),
        _Conv(256, 5, groups=2, bias=0.1),
        _Conv(384, 3),
        _Conv(384, 3, groups=2, bias=0.1),
        _Conv(256, 3, groups=2, bias=0.1),
    )
    for i, conv in enumerate(convs, start=1):
        x = GroupedConv2D(
            conv.filters,
            conv.size,
            strides=conv.strides,
            padding=conv.padding,
            groups=conv.groups,
            use_bias=not batch_norm,
            kernel_initializer=_normal(0.01, next(seeds)),
            bias_initializer=keras.initializers.Constant(conv.bias),
            name=f"conv{i}",
        )(x)
        if batch_norm:
            x = _batch_norm(i, synchronized)(x)
        x = keras.layers.ReLU(name=f"relu{i}")(x)
        if i <= 2 and not batch_norm:
            x = LocalResponseNormalization(name=f"lrn{i}")(x)
        if i in (1, 2, 5):
            x = keras.layers.MaxPooling2D(3, 2, name=f"pool{i}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i in (6, 7):
        x = keras.layers.Dense(
            4096,
            activation="relu",
            kernel_initializer=_normal(0.005, next(seeds)),
            bias_initializer=keras.initializers.Constant(0.1),
            name=f"fc{i}",
        )(x)
        x = keras.layers.Dropout(0.5, seed=next(seeds), name=f"drop{i}")(x)
    return keras.layers.Dense(num_classes, kernel_initializer=_normal(0.01, next(seeds)), dtype="float32", name="fc8")(
        x
    )


def alexnet_small(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    batch_norm: bool,
    synchronized: bool,
) -> keras.KerasTensor:
    """Build AlexNet's sequence of layers at a small width, for images of 16 to 64 pixels.

    This network is ours, not a published one. The first convolution is 5x5 without padding, with stride 1. There are no
    groups, pools are padded, and dropout is 0.1. Pixels are expected in about [-1, 1].

    With response normalization, kernels are `CentredHeNormal`, with which LARS learns faster. Activations are about 10
    times smaller than in the original, so alpha is 100 times larger for the same effect; the constant k is 1. With
    `batch_norm`, kernels are He initialized, and batch normalization is as in `alexnet`.
    """
    initializer = keras.initializers.HeNormal if batch_norm else CentredHeNormal
    for i, (filters, size) in enumerate(((16, 5), (32, 5), (48, 3), (48, 3), (48, 3)), start=1):
        x = keras.layers.Conv2D(
            filters,
            size,
            padding="valid" if i == 1 else "same",
            use_bias=not batch_norm,
            kernel_initializer=initializer(next(seeds)),
            name=f"conv{i}",
        )(x)
        if batch_norm:
            x = _batch_norm(i, synchronized)(x)
        x = keras.layers.ReLU(name=f"relu{i}")(x)
        if i <= 2 and not batch_norm:
            x = LocalResponseNormalization(bias=1.0, alpha=0.01, name=f"lrn{i}")(x)
        if i in (1, 2, 5):
            x = keras.layers.MaxPooling2D(3, 2, padding="same", name=f"pool{i}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i in (6, 7):
        x = keras.layers.Dense(
            128,
            activation="relu",
            kernel_initializer=initializer(next(seeds)),
            name=f"fc{i}",
        )(x)
        x = keras.layers.Dropout(0.1, seed=next(seeds), name=f"drop{i}")(x)
    return keras.layers.Dense(
        num_classes,
        kernel_initializer=initializer(next(seeds)),
        dtype="float32",
        name="fc8",
    )(x)


def _normal(stddev: float, seed: int | None) -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=stddev, seed=seed)


def _batch_norm(i: int, synchronized: bool) -> keras.layers.Layer:
    return batch_normalization(momentum=0.9, epsilon=1e-4, synchronized=synchronized, name=f"bn{i}")
