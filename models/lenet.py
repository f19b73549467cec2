"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, Gradient-based learning applied to document recognition, figure 2)."""

from collections.abc import Iterator

import keras
from keras import layers


def lenet5(
    x: keras.KerasTensor,
    num_classes: int,
    seeds: Iterator[int | None],
    *,
    synchronized: bool,
) -> keras.KerasTensor:
    """LeNet-5 for images of 12 to 64 pixels, small enough to train in seconds. No normalisation, no dropout.

    As it is trained today: rectifiers, max pooling, every filter over all channels, a linear layer last, kernels He
    initialised. The first convolution is padded, so that small images keep their edges. Pixels are expected in about
    [-1, 1].
    """
    del synchronized  # there is nothing to synchronise
    for i, (filters, padding) in enumerate(((6, "same"), (16, "valid")), start=1):
        x = layers.Conv2D(
            filters,
            5,
            padding=padding,
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(next(seeds)),
            name=f"conv{i}",
        )(x)
        x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    for i, units in ((3, 120), (4, 84)):
        x = layers.Dense(
            units,
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(next(seeds)),
            name=f"fc{i}",
        )(x)
    return layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.HeNormal(next(seeds)),
        dtype="float32",
        name="fc5",
    )(x)
