"""The engine of the current Keras backend."""

from typing import Any

import keras

from lars_keras.training.cluster import Cluster
from lars_keras.training.engine import Engine, EngineOptions


def engine_class() -> type[Engine]:
    """Return the engine class of the current Keras backend; import only that backend.

    Raises:
        ValueError: if the backend has no engine.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        from lars_keras.training.jax.engine import JaxEngine

        return JaxEngine
    if backend == "tensorflow":
        from lars_keras.training.tensorflow.engine import TensorFlowEngine

        return TensorFlowEngine
    raise ValueError(f"Training runs with KERAS_BACKEND=tensorflow or jax. Received: KERAS_BACKEND={backend}")


def make_engine(model: keras.Model, cluster: Cluster, options: EngineOptions, element_spec: Any) -> Engine:
    """Make the engine of the current Keras backend.

    Args:
        model: compiled, made under `cluster.scope()`.
        cluster: the replicas.
        options: how to take a step.
        element_spec: a `TensorSpec` for each array of a batch; see `lars_keras.training.inputs.element_spec`.

    Raises:
        ValueError: if the engine cannot do what is asked for.
    """
    engine = engine_class()
    engine.check(model, cluster, options)
    return engine(model, cluster, options, element_spec)
