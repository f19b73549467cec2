"""Compile an optimizer's whole update, from its own rule, into one program.

Operation by operation, an update reads and writes every weight many times. A compiled update reads weights and
gradients once for the norms and once for the step, and writes the new weights over the old ones.
"""

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from lars_keras._tensorflow_internals import optimization_barrier

Tensor = Any
# Takes of one variable: gradient, weights, slots, role; then the scalars of the update, and whether to measure.
Step = Callable[..., list[Tensor]]

_tracing = contextvars.ContextVar("tracing", default=False)


def has_accelerator() -> bool:
    """Return whether TensorFlow has a GPU or TPU, on this machine or on one that it is connected to."""
    import tensorflow as tf

    return any(device.device_type in ("GPU", "TPU") for device in tf.config.list_logical_devices())


def distributed() -> bool:
    """Return whether a `tf.distribute` strategy is in force."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def being_traced(tensors: Sequence[Tensor]) -> bool:
    """Return whether an outer function of TensorFlow or JAX is being traced, which keeps Python values as they are."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.inside_function()
    if keras.backend.backend() == "jax":
        import jax

        return any(isinstance(t, jax.core.Tracer) for t in tensors)
    return False


def recomputed(*tensors: Tensor) -> Sequence[Tensor]:
    """Return the same tensors in a form for which XLA repeats computations that it made on the originals.

    On a CPU, XLA would otherwise keep an expensive intermediate in memory, as large as the weights.
    """
    if not _tracing.get():
        return tensors
    return optimization_barrier(tensors)


def rounded(x: Tensor, dtype: str) -> Tensor:
    """Return `x` rounded to `dtype`, in the dtype of `x`.

    XLA may drop a rounding. It then computes from a copy of the old values, not from the values that it has just
    written.
    """
    if keras.backend.standardize_dtype(x.dtype) == dtype:
        return x
    (short,) = recomputed(ops.cast(x, dtype))
    return ops.cast(short, x.dtype)


class CompiledUpdate:
    """Updates every variable, through XLA on the TensorFlow backend.

    On other backends, and where XLA cannot be used, it is a loop over the variables. Under `jax.jit` this loop is one
    program, too.

    Args:
        step: updates one variable and its slots in place, and may return tensors.
    """

    def __init__(self, step: Step):
        self._step = step
        self._programs: dict[Any, Callable[..., list[Tensor]]] = {}
        self._constants: tuple[Any, ...] = ()

    def __call__(
        self,
        gradients: Sequence[Tensor],
        variables: Sequence[Any],
        slots: Sequence[Sequence[Any]],
        roles: Sequence[Any],
        scalars: Sequence[Tensor],
        measure: bool,
        constants: tuple[Any, ...] = (),
    ) -> list[Tensor]:
        """Update `variables` and `slots`.

        Args:
            gradients: one for each variable.
            variables: the weights.
            slots: the slots of each variable.
            roles: the role of each variable.
            scalars: tensors that change from update to update.
            measure: passed to `step`.
            constants: values that are compiled in. Other values compile another program, which replaces this one.

        Returns:
            The tensors that `step` returns, in the order of the variables.
        """

        def loop(gradients: Any, variables: Any, slots: Any, scalars: Any) -> list[Tensor]:
            outputs = []
            for gradient, *of_variable in zip(gradients, variables, slots, roles, strict=True):
                outputs += self._step(gradient, *of_variable, scalars, measure)
            return outputs

        if keras.backend.backend() != "tensorflow":
            return loop(gradients, variables, slots, scalars)
        import tensorflow as tf

        local, local_slots = [_local(v) for v in variables], [[_local(s) for s in of_one] for of_one in slots]
        if not _can_compile(gradients, local):
            return loop(gradients, variables, slots, scalars)
        if constants != self._constants:  # a schedule of the decay would otherwise keep a program for each update
            self._programs.clear()
            self._constants = constants
        key = (measure, *map(id, local))
        if key not in self._programs:

            def program(gradients: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
                with _compiling():
                    return loop(gradients, local, local_slots, scalars)

            self._programs[key] = tf.function(program, jit_compile=True, autograph=False)
        return self._programs[key](list(gradients), [tf.convert_to_tensor(s) for s in scalars])

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledUpdate":
        return CompiledUpdate(copy.deepcopy(self._step, memo))  # the copy has other variables, so other programs


def _local(variable: Any) -> Any:
    """Return the TensorFlow variable that this replica of a strategy owns."""
    import tensorflow as tf

    value = variable.value if isinstance(variable, keras.Variable) else variable  # a `tf.Variable` has a method `value`
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return value
    local = tf.distribute.get_strategy().experimental_local_results(value)
    replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
    return value if replica is None else local[replica % len(local)]


def _can_compile(gradients: Sequence[Tensor], variables: Sequence[Any]) -> bool:
    """Return False for gradients that are no tensors, variables on several devices, or a TPU, which compiles anyway."""
    import tensorflow as tf

    return (
        all(isinstance(g, tf.Tensor) for g in gradients)
        and all(isinstance(v, tf.Variable) for v in variables)
        and len({v.device for v in variables}) == 1
        and not isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)
    )


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    import tensorflow as tf

    token = _tracing.set(not tf.executing_eagerly())  # eagerly under `tf.config.run_functions_eagerly`
    try:
        yield
    finally:
        _tracing.reset(token)
