"""Turn train.py's flags into arguments of `lars_keras.pod.check`: a function that returns the model, and a batch."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from absl import flags as absl_flags

import flags
from running.model import compile_model, make_model

# Classes, training examples, and shape, as `lars_keras.data.load` gives them: no data are needed here.
_DATA = {"digits": (10, 49152, (16, 16, 1)), "cifar10": (10, 50000, (32, 32, 3)), "imagenet2012": (1000, 1281167, None)}


def read_config(arguments: list[str]) -> flags.RunConfig:
    """Read the flags of train.py; the default precision is that of a TPU, mixed_bfloat16.

    Raises:
        ValueError: if a flag is wrong, or the data set has no known shape.
    """
    try:
        values, rest = flags.parse(["pod_check", *arguments])
        if rest:
            raise ValueError(f"Every argument must be a flag, --name=value. Received: {' '.join(rest)}")
        config = flags.read(values)
    except absl_flags.Error as e:
        raise ValueError(str(e)) from e
    if config.dataset not in _DATA:
        raise ValueError(f"--dataset must be one of {', '.join(_DATA)} here. Received: --dataset={config.dataset}")
    return config if values["precision"].present else dataclasses.replace(config, precision="mixed_bfloat16")


def updates_of(config: flags.RunConfig) -> int:
    """Return the updates of the whole recipe."""
    return config.total_updates(_DATA[config.dataset][1])


def model_function(config: flags.RunConfig) -> Callable[[], keras.Model]:
    """Return a function that another process can import, which makes train.py's model."""
    return functools.partial(recipe_model, config)


def recipe_model(config: flags.RunConfig) -> keras.Model:
    """Make train.py's model, compiled."""
    shape = _image_shape(config)
    zeros, ones = ([value] * shape[2] for value in (0.0, 1.0))
    classes, examples, _ = _DATA[config.dataset]

    def train_numpy(batch_size: int, **_: Any) -> Iterator[tuple[np.ndarray]]:
        """Yield images for the weights that are computed from them; an update costs the same with any."""
        yield (np.random.default_rng(0).integers(0, 256, (batch_size, *shape), "uint8"),)

    data: Any = types.SimpleNamespace(
        num_classes=classes, num_train=examples, image_shape=shape, mean=zeros, std=ones, train_numpy=train_numpy
    )
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    model = make_model(config, data)
    compile_model(model, config, data)
    return model


def batch_spec(config: flags.RunConfig) -> tuple[str, str, str]:
    """Return the arrays of train.py's batches: images, one-hot labels, weights."""
    images = ",".join(map(str, _image_shape(config)))
    return f"uint8:{images}", f"float32:{_DATA[config.dataset][0]}", "float32"


def check_options(config: flags.RunConfig) -> dict[str, Any]:
    """Return the arguments of `lars_keras.pod.check` that the flags decide; train.py always measures the norms."""
    return {
        "make_model": model_function(config),
        "batch_spec": batch_spec(config),
        "batch_size": config.batch_size,
        "microbatch_size": config.microbatch_size,
        "shard_optimizer_state": config.shard_optimizer_state,
        "reduce_dtype": config.reduce_dtype,
        "variable_norms": True,
    }


def _image_shape(config: flags.RunConfig) -> tuple[int, int, int]:
    if shape := _DATA[config.dataset][2]:
        return shape
    size = config.input_size
    assert size is not None  # a data set of no size of its own
    return size, size, 3
