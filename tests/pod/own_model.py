"""A user's own module: models that the pod check is asked about, good and bad."""

import keras

from lars_keras import LARS


def make_model(width: int = 32) -> keras.Model:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(width, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, dtype="float32"),
        ],
        name="own",
    )
    model.compile(LARS(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def batch_spec():
    return ("uint8:16,16,3", "int32")


def not_compiled() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(10)])


def no_model() -> str:
    return "resnet"


def failing() -> keras.Model:
    raise KeyError("no such layer")


SIZE = 3  # no function
