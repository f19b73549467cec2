"""Make or load the model of a run, and compile it."""

import weakref
from pathlib import Path
from typing import Any

import keras

import models
from flags.config import RunConfig
from lars_keras._keras_internals import layers_of
from lars_keras.data import ImageData
from lars_keras.metrics import MaskedExamples
from lars_keras.reference import Reference
from lars_keras.runtime.errors import UsageError
from running.optimizers import make_optimizer, make_schedule

# Layers with weights that a process has made, so that no run begins with the weights of another.
_layers_of_own_models: weakref.WeakSet[keras.layers.Layer] = weakref.WeakSet()


def make_model(config: RunConfig, data: ImageData) -> keras.Model:
    """Make the network for the classes and images of the data.

    Raises:
        ValueError: if the user's own function is not found, or its model does not fit the data.
    """
    if config.is_own_model:
        return _own_model(config.model, data)
    model = models.get(
        config.model,
        num_classes=data.num_classes,
        input_shape=data.image_shape,
        mean=data.mean,
        # The original AlexNet's initial values are made for pixels that are centered but not scaled.
        std=None if config.model == "alexnet" else data.std,
        sync_batch_norm=config.sync_batch_norm,
        seed=config.seed,
    )
    models.adapt(model, lambda count: next(data.train_numpy(min(count, data.num_train), count=1, augment=False))[0])
    return model


def _own_model(name: str, data: ImageData) -> keras.Model:
    make = Reference(name, "model").resolve()
    try:
        model = make(data.image_shape, data.num_classes)
    except ValueError as e:
        raise RuntimeError(f"--model={name} failed") from e  # with its traceback, not as a wrong flag
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must return a Keras model. Received: a {type(model).__name__} from model={name}")
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if shapes != ((None, *data.image_shape), (None, data.num_classes)):
        raise ValueError(
            f"`model` must return a functional or Sequential model from images of shape {data.image_shape} to "
            f"{data.num_classes} logits. Received: shapes {shapes[0]} and {shapes[1]} from model={name}"
        )
    try:
        keras.saving.serialize_keras_object(model)
    except Exception as e:  # whatever a layer raises that has no config
        reason = " ".join(str(e).strip().partition("\n\n")[0].split())
        raise ValueError(f"`model` cannot be saved: {reason} Received: model={name}") from e
    layers = [layer for layer in layers_of(model) if layer.weights]
    if again := [layer.name for layer in layers if layer in _layers_of_own_models]:
        raise ValueError(
            "`model` must make new layers at each call, or two runs of one process would share their weights. "
            f"Received: model={name}, whose {again[0]} was in an earlier model"
        )
    _layers_of_own_models.update(layers)
    return model


def compile_model(model: keras.Model, config: RunConfig, data: ImageData) -> None:
    """Compile the model with optimizer, schedule, loss and metrics."""
    schedule = make_schedule(**config.schedule_arguments(data.num_train))
    model.compile(
        make_optimizer(config.optimizer, schedule, model.trainable_variables, **config.optimizer_options),
        **scoring(config, data),
    )


def scoring(config: RunConfig, data: ImageData) -> dict[str, Any]:
    """Make the loss and metrics that `compile` takes."""
    return {
        "loss": keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing),
        "weighted_metrics": [
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(k=min(5, data.num_classes), name="top5"),
            MaskedExamples(),
        ],
    }


def load_model(run_dir: Path, config: RunConfig, data: ImageData) -> keras.Model:
    """Load the model that a run saved. One of the user's own is made again, because its layers may not be registered.

    Raises:
        UsageError: if the file is damaged.
        ValueError: if the user's own function is not found, or its model does not fit the data.
    """
    path = run_dir / "model.keras"
    own = make_model(config, data) if config.is_own_model else None
    try:
        if own:
            own.load_weights(path)
            return own
        return keras.models.load_model(path, compile=False)
    except Exception as e:  # whatever the libraries make of a damaged archive
        raise UsageError(f"{path} cannot be loaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
