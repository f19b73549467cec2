"""Find the metrics whose value for a global batch depends on how the batch was split.

A metric sees the micro-batches of a device one after the other. Every replica has its own state, and the states are
added up. A maximum survives the micro-batches, but not the sum of states; a moving average of the values of batches
survives neither.
"""

from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from lars_keras import _keras_internals as keras_internals
from lars_keras.training.loss_terms import is_known_mean, made_up_batch, part_of
from lars_keras.training.overrides import is_overridden

_TOLERANCE = 1e-3
State = list[np.ndarray]


class MetricTerms:
    """Finds the metrics of a built model whose values depend on how a batch was split.

    Args:
        model: compiled and built.
        batch: a `TensorSpec` for each array of `(x, y, y_pred)`.
    """

    def __init__(self, model: keras.Model, batch: tuple[Any, Any, Any]):
        self._model, self._batch = model, batch
        self._found: dict[str, list[str]] | None = None

    def check(self, parts: int, replicas: int) -> None:
        """Refuse metrics whose value would not be that of the whole batch.

        Args:
            parts: number of pieces that the whole batch comes in.
            replicas: number of states that are added up.

        Raises:
            ValueError: for such metrics; the message names them.
        """
        if parts == 1:
            return
        if self._found is None:
            self._found = _probed(self._model, self._batch)
        names = self._found["parts"] + (self._found["sums"] if replicas > 1 else [])
        if names:
            why = f"its {parts} parts" if self._found["parts"] else f"the added states of {replicas} replicas"
            raise ValueError(
                f"These metrics would be wrong: from {why} they have another value than from the whole batch. Leave "
                f"them out of `compile`, and use `model.evaluate`. Received: {', '.join(names)}"
            )


def _probed(model: keras.Model, batch: tuple[Any, Any, Any]) -> dict[str, list[str]]:
    """Return the names of the metrics that must not be split, and of the metrics whose states must not be added."""
    if all(map(is_known_sum, keras_internals.single_metrics(model))):
        return {"parts": [], "sums": []}
    arrays = made_up_batch(batch, 8)
    variables = [v for metric in model.metrics for v in metric.variables]

    def within(state: State | None, *part: int) -> tuple[State, dict[str, Any]]:
        """Return the state after a part of the batch, and the results; start from a reset if there is no state."""
        x, y, y_pred = part_of(arrays, batch, *(part or (0, 1)))
        values = [(v, ops.convert_to_tensor(v)) for v in model.variables]
        before = state or [np.zeros(v.shape) for v in variables]
        values += [(v, ops.convert_to_tensor(a, v.dtype)) for v, a in zip(variables, before, strict=True)]
        with (
            keras_internals.losses_of_one_replica(),
            keras.StatelessScope(values, collect_losses=True) as scope,
        ):
            if state is None:
                model.reset_metrics()
            if part and is_overridden(model, "compute_loss"):
                keras_internals.compute_loss(model, x, y, y_pred, None, training=False)
            if part:
                model.compute_metrics(x, y, y_pred, None)
            new = [ops.convert_to_numpy(scope.get_current_value(v)) for v in variables]
            return new, {name: ops.convert_to_numpy(value) for name, value in model.get_metrics_result().items()}

    def after(*parts: tuple[int, int], state: State | None = None) -> State:
        for part in parts:
            state = within(state, *part)[0]
        return state or within(None)[0]

    def results(state: State) -> dict[str, Any]:
        return within(state)[1]

    try:
        zeros = [np.zeros_like(a) for a in after()]
        wholes = [results(after((0, 4))), results(after((0, 4), (4, 8)))]
        first, both = after((0, 2), (2, 4)), after((0, 2), (2, 4), (4, 6), (6, 8))
        halves = [results(first), results(both)]
        apart = [
            results(_sum(after((0, 2)), after((2, 4)))),
            results(_sum(first, after((4, 6), state=zeros), after((6, 8), state=zeros))),
        ]
    except Exception as error:
        logging.warning("Whether the metrics may be split over micro-batches and replicas cannot be tried: %s", error)
        return {"parts": [], "sums": []}
    parts = [name for name in wholes[0] if not _same(name, wholes, halves)]
    sums = [name for name in wholes[0] if name not in parts and not _same(name, halves, apart)]
    return {"parts": parts, "sums": sums}


def is_known_sum(metric: keras.metrics.Metric) -> bool:
    """Return True for Keras's own metrics, whose states are sums."""
    function = keras_internals.metric_function(metric)
    return type(metric).__module__.startswith("keras.") and (function is None or is_known_mean(function))


def _sum(*states: State) -> State:
    return [np.sum(values, axis=0) for values in zip(*states, strict=True)]


def _same(name: str, some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(some, others, strict=True)]
    return all(np.allclose(a, b, rtol=_TOLERANCE, atol=1e-6, equal_nan=True) for a, b in pairs)
