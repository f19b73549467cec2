"""The network for handwritten digits of LeCun et al. 1989."""

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
    """Two strided convolutions and two dense layers, for images of 8 to 64 pixels. It trains in seconds.

    LeCun et al. 1989, Backpropagation Applied to Handwritten Zip Code Recognition: 12 maps of 5x5 and stride 2, twice,
    30 hidden units; no pooling, normalisation or dropout. As networks are trained today, with rectifiers, He
    initialisation, a linear layer last, and every filter over all maps. Pixels are expected in about [-1, 1].
    """
    del synchronized  # there is nothing to synchronise
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
