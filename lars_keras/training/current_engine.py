"""Make the engine of a model, and make it again when the model is compiled again."""

import dataclasses
from typing import Any

import keras

from lars_keras.training.array_data import ArrayBatches
from lars_keras.training.cluster import Cluster, unknown_backend
from lars_keras.training.compiled_state import CompiledState, check_trainable
from lars_keras.training.engine import Engine, EngineOptions
from lars_keras.training.inputs import Data, element_spec, known_structure
from lars_keras.training.loss_terms import check_terms
from lars_keras.training.overrides import check_loss, check_overrides, check_targets


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
    raise unknown_backend(backend)


class CurrentEngine:
    """Makes the engine of a model once the shapes of the data are known, and again when the model is recompiled.

    Args:
        model: compiled.
        cluster: cluster on which the model was made.
        options: how to take a step.

    Attributes:
        engine: None until it is made.

    Raises:
        ValueError: if the engine of this backend cannot train the model as Keras does.
    """

    def __init__(self, model: keras.Model, cluster: Cluster, options: EngineOptions):
        self.engine: Engine | None = None
        self._arguments = (model, cluster, options)
        self._model, self._cluster, self._class = model, cluster, engine_class()
        self._spec: Any = None  # of the last data, if known
        self._built_for: CompiledState | None = None
        self._tried: list[Any] = []  # the specs of weights with which the loss was tried, on this engine
        self._ghost_batches = cluster.replicas * options.accumulation_steps
        self._check_model()

    def _check_model(self) -> None:
        check_overrides(self._model)
        check_loss(self._model)
        self._class.check(*self._arguments)

    def is_current(self) -> bool:
        """Return True if there is an engine for the model in its current compiled state."""
        return self._built_for is not None and not self._built_for.compiled_again(self._model)

    def of(self, data: Data, *first_update: int) -> Engine:
        """Return the engine.

        Args:
            data: as `lars_keras.training.inputs.element_spec` takes them.
            *first_update: 0 if `data` is for training; left out for an evaluation.

        Raises:
            ValueError: if the model was compiled again and cannot be trained; if the data lack targets; if layers were
                added or removed without another `compile`.
        """
        context = self._cluster.input_context()
        if self.engine is not None and self.is_current():
            self._spec = known_structure(data.look(context, *first_update) if hasattr(data, "look") else data)
            check_targets(self._model, self._spec)
        else:
            self._check_model()
            self._spec = element_spec(data, context, *first_update)
            check_targets(self._model, self._spec)
            self.engine, self._tried = None, []  # before another is made, for its memory
            self.engine = self._class(*self._arguments, self._spec)
            self._built_for = CompiledState(self._model)
        assert self._built_for
        self._built_for.check(self._model, training=False)
        return self.engine

    def for_training(self, data: Data, scored: Data | None) -> Engine:
        """Return the engine, once the model is known to train as with Keras's `fit`.

        Args:
            data: for training.
            scored: data on which the model is also evaluated, or None.

        Raises:
            ValueError: if the model was changed without another `compile`; if its optimizer, loss or metrics do not
                work with the model or with several ghost batches.
        """
        engine = self.of(data, 0)
        self.check_unchanged(engine)
        check_trainable(self._model)
        engine.prepare_training()
        terms = engine.loss_terms
        if isinstance(self._spec, tuple) and len(self._spec) > 2:
            terms = dataclasses.replace(terms, weights=self._spec[2])
        if terms.weights not in self._tried:
            check_terms(self._model, terms, self._ghost_batches)
            self._tried.append(terms.weights)
        engine.metric_terms.check(self._ghost_batches, self._cluster.replicas)
        if scored is not None:
            check_targets(self._model, known_structure(scored))
            engine.check_scoring(scored.examples if isinstance(scored, ArrayBatches) else None)
        return engine

    def to_restore(self) -> Engine:
        """Return the engine, which an earlier call made for the model in its current compiled state.

        Raises:
            ValueError: if layers were added or removed without another `compile`.
        """
        assert self.engine and self._built_for
        self._built_for.check(self._model, training=False)
        return self.engine

    def running(self) -> Engine:
        """Return the engine that an earlier call made.

        Raises:
            RuntimeError: if there is none, or the model was compiled again since then.
        """
        if self.engine is None or not self.is_current():
            raise RuntimeError(
                "`Trainer` has no state yet, or the model was compiled again since then. Call `fit`, `evaluate` "
                "or `restore` first."
            )
        return self.engine

    def check_unchanged(self, engine: Engine) -> None:
        """Refuse to train a model that has changed since `engine` was made.

        Raises:
            ValueError: if the model was compiled again, or changed without another `compile`.
        """
        if engine is not self.engine or not self.is_current():
            raise ValueError("The model was compiled again while it was trained. Do so between two calls of `fit`.")
        assert self._built_for
        self._built_for.check(self._model, training=True)
