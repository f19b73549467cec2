"""Refuse models that would count the padding of an evaluation whose last batch is filled up.

If hosts or TPU cores must take equally many batches, the last batch is filled up with copies of an example, of weight
0. Keras's losses and metrics leave the copies out. Losses of layers do not, nor does a loss or metric that ignores
weights.
"""

from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from lars_keras import _keras_internals as keras_internals
from lars_keras.metrics import MaskedExamples
from lars_keras.training.loss_terms import LossTerms, made_up_batch, part_of, suspects
from lars_keras.training.metric_terms import is_known_sum
from lars_keras.training.scoring import broadcastable

Tensor = Any


def check_padding(model: keras.Model, terms: LossTerms) -> None:
    """Refuse a model that would count padding.

    Args:
        model: compiled and built.
        terms: terms of its loss.

    Raises:
        ValueError: for such a model; the message names the part.
    """
    found = ["losses that layers add, such as activity regularizers"] * bool(terms.layer_losses)
    found += ["`metrics=`, which ignore weights"] * keras_internals.has_unweighted_metrics(model)
    metrics = keras_internals.single_metrics(model)
    counts = [m for m in metrics if isinstance(m, MaskedExamples)]  # what has weight 0 is what they are for
    losses = suspects(model)
    if losses or not all(is_known_sum(m) or m in counts for m in metrics):
        found += _that_ignore_weights(model, terms.batch, losses, tuple(m.name for m in counts))
    if found:
        raise ValueError(
            "On several hosts, and on a TPU, the last batch of an evaluation is filled up with examples of weight 0. "
            f"They would count in: {', '.join(found)}. Use the weights there (`weighted_metrics=` do), or score with "
            "`model.evaluate`."
        )


def _that_ignore_weights(
    model: keras.Model, batch: tuple[Any, Any, Any], losses: list[str], meant: tuple[str, ...]
) -> list[str]:
    """Score synthetic examples: three, the same with a fourth of weight 0, and the same with another fourth.

    Args:
        model: compiled and built.
        batch: the form of a batch.
        losses: names of the losses that may ignore weights.
        meant: names of the metrics that count padding on purpose.
    """
    arrays = made_up_batch(batch, 5)
    variables = [v for metric in model.metrics for v in metric.variables]

    def scored(rows: list[int], weights: list[float]) -> tuple[float, dict[str, Any]]:
        chosen = keras.tree.map_structure(lambda a: None if a is None else a[rows], arrays)
        x, y, y_pred = part_of(chosen, batch, 0, len(rows))
        weight = ops.convert_to_tensor(np.array(weights, "float32"))
        values = [(v, ops.convert_to_tensor(v)) for v in model.variables]
        values += [(v, ops.zeros(v.shape, v.dtype)) for v in variables]
        with keras_internals.losses_of_one_replica(), keras.StatelessScope(values, collect_losses=True):
            model.reset_metrics()
            loss = keras_internals.compute_loss(model, x, y, y_pred, broadcastable(weight, y_pred), training=False)
            model.compute_metrics(x, y, y_pred, weight)
            results = {name: ops.convert_to_numpy(value) for name, value in model.get_metrics_result().items()}
            return float(loss), results

    try:
        _, three = scored([0, 1, 2], [1, 1, 1])
        (loss, padded), (other_loss, other) = (scored([0, 1, 2, i], [1, 1, 1, 0]) for i in (3, 4))
    except Exception as error:
        logging.warning("Whether the loss and the metrics leave out examples of weight 0 cannot be tried: %s", error)
        return []
    found = losses if losses and not _same(loss, other_loss) else []
    names = [n for n in three if not n.endswith(meant)]
    return found + [n for n in names if not (_same(three[n], padded[n]) and _same(three[n], other[n]))]


def _same(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True))
