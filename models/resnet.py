"""ResNet-18 in its CIFAR form and ResNet-50 v1.5 (He et al. 2015, arXiv 1512.03385)."""

from collections.abc import Iterator

import keras
from keras import layers

from models.batch_norm import batch_normalization


def resnet18(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    synchronized: bool,
) -> keras.KerasTensor:
    """Build ResNet-18 for small images, with the layers of kuangliu/pytorch-cifar.

    A 3x3 stem without pooling precedes four stages of 2 basic blocks, with 64, 128, 256 and 512 channels. The last
    three stages halve the image. Our choices: He initialization by fan-out; a 3x3 convolution with stride 2 pads an
    image of even size by no row above and one below ("same"), not by one on each side.
    """
    build = _Builder(seeds, synchronized)
    x = build.conv_bn(x, 64, 3, name="{}1")
    for stage, filters in enumerate((64, 128, 256, 512), start=1):
        for block in "ab":
            strides = 2 if stage > 1 and block == "a" else 1
            name = f"block{stage}{block}_"
            y = build.conv_bn(x, filters, 3, strides=strides, name=name + "{}1")
            y = build.conv_bn(y, filters, 3, relu=False, name=name + "{}2")
            if strides == 2:
                x = build.conv_bn(x, filters, 1, strides=2, relu=False, name=name + "{}_shortcut")
            x = build.join(x, y, name)
    return build.head(x, num_classes)


def resnet50(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    synchronized: bool,
) -> keras.KerasTensor:
    """Build ResNet-50 v1.5 for images of about 224 x 224 pixels.

    v1.5 puts the stride of a stage into the 3x3 convolution of its first block, not into the 1x1 before. The scale of
    the last batch normalization of each block starts at 0, so that every block starts as the identity (Goyal et al.
    2017, arXiv 1706.02677, section 5.1).

    The stem pads by 3 on each side, as in the published networks. The pooling and the 3x3 convolutions with stride 2
    pad an image of even size by no row above and one below ("same"), where the published networks pad by one on each
    side.
    """
    build = _Builder(seeds, synchronized)
    # "same" would pad 2 and 3 pixels.
    x = layers.ZeroPadding2D(3, name="pad1")(x)
    x = build.conv_bn(x, 64, 7, strides=2, padding="valid", name="{}1")
    x = layers.MaxPooling2D(3, 2, padding="same", name="pool1")(x)
    for stage, (filters, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in "abcdef"[:blocks]:
            strides = 2 if stage > 1 and block == "a" else 1
            name = f"block{stage}{block}_"
            y = build.conv_bn(x, filters, 1, name=name + "{}1")
            y = build.conv_bn(y, filters, 3, strides=strides, name=name + "{}2")
            y = build.conv_bn(y, 4 * filters, 1, relu=False, gamma="zeros", name=name + "{}3")
            if block == "a":
                x = build.conv_bn(x, 4 * filters, 1, strides=strides, relu=False, name=name + "{}_shortcut")
            x = build.join(x, y, name)
    return build.head(x, num_classes)


class _Builder:
    """Builds the layers that both networks repeat."""

    def __init__(self, seeds: Iterator[int | None], synchronized: bool) -> None:
        self.seeds = seeds
        self.synchronized = synchronized

    def conv_bn(
        self,
        x: keras.KerasTensor,
        filters: int,
        size: int,
        *,
        name: str,
        strides: int = 1,
        padding: str = "same",
        relu: bool = True,
        gamma: str = "ones",
    ) -> keras.KerasTensor:
        """Append a convolution, batch normalization and ReLU. `name` is formatted with "conv", "bn" and "relu"."""
        x = layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding=padding,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal", seed=next(self.seeds)
            ),
            name=name.format("conv"),
        )(x)
        x = batch_normalization(
            momentum=0.9,
            epsilon=1e-5,
            gamma_initializer=gamma,
            synchronized=self.synchronized,
            name=name.format("bn"),
        )(x)
        return layers.ReLU(name=name.format("relu"))(x) if relu else x

    def join(self, x: keras.KerasTensor, y: keras.KerasTensor, name: str) -> keras.KerasTensor:
        """Add a block's output `y` to its input `x`, and append a ReLU."""
        x = layers.Add(name=name + "add")([x, y])
        return layers.ReLU(name=name + "out")(x)

    def head(self, x: keras.KerasTensor, num_classes: int) -> keras.KerasTensor:
        """Append global average pooling and the float32 logits."""
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        kernel = keras.initializers.RandomNormal(stddev=0.01, seed=next(self.seeds))
        return layers.Dense(num_classes, kernel_initializer=kernel, dtype="float32", name="fc")(x)
