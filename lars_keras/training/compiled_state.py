"""Record the parts of a compiled model that an engine is built for, and check that they are unchanged."""

import keras

from lars_keras._keras_internals import compiled_parts, inner_optimizer, layers_of, optimized_variables


class CompiledState:
    """Records the parts of a compiled and built model, to compare them with its parts later.

    Keras's own programs keep the state that they were compiled with. If a layer is frozen without another `compile`,
    Keras's `fit` silently goes on with the old state on TensorFlow, and fails on JAX.

    Args:
        model: compiled and built.
    """

    def __init__(self, model: keras.Model):
        # The objects themselves: an `id` may come again.
        self._parts = compiled_parts(model)
        self._layers = layers_of(model)
        self._trainable_flags = [layer.trainable for layer in self._layers]
        self._trainable = list(model.trainable_variables)

    def compiled_again(self, model: keras.Model) -> bool:
        """Return True if the optimizer, its learning rate, the loss or the metrics are other objects than before."""
        return not _same(self._parts, compiled_parts(model))

    def check(self, model: keras.Model, training: bool) -> None:
        """Refuse a model that was changed, but not compiled again.

        Args:
            model: the same model, not compiled again.
            training: also check which variables are trainable; an evaluation does not depend on this.

        Raises:
            ValueError: if the layers differ, or the trainable ones do; the message names a layer.
        """
        layers = layers_of(model)
        if not _same(self._layers, layers):
            changed = [layer for layer in layers if not any(layer is own for own in self._layers)]
            what = f"has a new layer, {changed[0].name}" if changed else "has lost or moved a layer"
        elif not training:
            return
        else:
            flags = zip(layers, self._trainable_flags, strict=True)
            changed = [layer for layer, before in flags if layer.trainable != before]
            if not changed and _same(self._trainable, model.trainable_variables):
                return
            name = changed[-1].name if changed else "variables of a layer"
            what = f"was frozen or unfrozen in part: `trainable` of {name} has changed"
        raise ValueError(f"Since it was compiled, the model {what}. Call `model.compile` again, with a new optimizer.")


def check_trainable(model: keras.Model) -> None:
    """Refuse a built model without trainable variables, or with other variables than its optimizer was built for.

    Raises:
        ValueError: for such a model.
    """
    if not model.trainable_variables:
        raise ValueError(
            "The model has no trainable variables, so there is nothing to train. Set `trainable = True` on some of its "
            f"layers, and call `model.compile` again. Received: model of name {model.name}"
        )
    optimizer = inner_optimizer(model.optimizer)
    known = optimized_variables(optimizer)
    if not _same(known, model.trainable_variables):
        raise ValueError(
            f"The optimizer was built for {len(known)} variables, which are not the {len(model.trainable_variables)} "
            "trainable variables that the model has now. Call `model.compile` with a new optimizer. Received: "
            f"optimizer={optimizer.name}"
        )


def _same(before: list, now: list) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
