"""The network of LeCun et al. 1989 for handwritten digits."""

from collections.abc import Iterator

import keras
from keras import layers


def lenet1989(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    synchronized: bool,
) -> keras.KerasTensor:
    """Build two strided convolutions and two dense layers, for images of 8 to 64 pixels. They train in seconds.

    As in the source: twice 12 maps of 5x5 with stride 2, then 30 hidden units, without pooling, normalization or
    dropout. Our choice, as networks are trained today: rectifiers, He initialization, a linear last layer, and filters
    over all maps. Pixels are expected in about [-1, 1].

    Source: LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition".
    """
    del synchronized  # the network has no batch normalization
    for i in (1, 2):
        x = layers.Conv2D(
            12,
            5,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(next(seeds)),
            name=f"conv{i}",
        )(x)
    x = layers.Flatten(name="flatten")(x)
    for name, units, activation in (("fc3", 30, "relu"), ("fc4", num_classes, None)):
        x = layers.Dense(
            units,
            activation=activation,
            kernel_initializer=keras.initializers.HeNormal(next(seeds)),
            dtype=None if activation else "float32",
            name=name,
        )(x)
    return x
