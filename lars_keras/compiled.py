"""Runs an optimizer's whole update as one compiled program, made of the optimizer's own rule.

Operation by operation, an update reads and writes every weight many times. Compiled, it reads weights and gradients
once for the norms and once for the step, and the new weights take the place of the old.
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
# Of one variable: gradient, weights, slots, what is fixed about it, the scalars of the update, whether to measure it.
Step = Callable[..., list[Tensor]]

_tracing = contextvars.ContextVar("tracing", default=False)


def has_accelerator() -> bool:
    """Whether TensorFlow has a GPU or TPU, of this machine or of those that it is connected to."""
    import tensorflow as tf

    return any(device.device_type in ("GPU", "TPU") for device in tf.config.list_logical_devices())


def distributed() -> bool:
    """Whether a `tf.distribute` strategy is in force."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def recomputed(*tensors: Tensor) -> Sequence[Tensor]:
    """The same tensors, but what is computed from them XLA neither merges with what is computed from the originals nor
    stores for both: on a CPU it would keep an expensive intermediate in memory, as large as the weights."""
    if not _tracing.get():
        return tensors
    return optimization_barrier(tensors)


def rounded(x: Tensor, dtype: str) -> Tensor:
    """`x` rounded to `dtype`, in its own dtype. XLA may leave a rounding out, and then computes from the old values
    what it could from those it has just written, for which it copies them."""
    if keras.backend.standardize_dtype(x.dtype) == dtype:
        return x
    (short,) = recomputed(ops.cast(x, dtype))
    return ops.cast(short, x.dtype)


class CompiledUpdate:
    """A step of every variable, through XLA on the TensorFlow backend.

    On other backends, and where XLA cannot serve, it is a loop over the variables; under `jax.jit` that is one program
    too.

    Args:
        step: updates one variable and its slots in place, and may return tensors.
    """

    def __init__(self, step: Step):
        self._step = step
        self._programs: dict[Any, Callable[..., list[Tensor]]] = {}

    def __call__(
        self,
        gradients: Sequence[Tensor],
        variables: Sequence[Any],
        slots: Sequence[Sequence[Any]],
        roles: Sequence[Any],
        scalars: Sequence[Tensor],
        measure: bool,
    ) -> list[Tensor]:
        """Updates `variables` and `slots`.

        Args:
            gradients, variables, slots, roles: of each variable.
            scalars: of the update.
            measure: as `step` takes it.

        Returns:
            What `step` returns of the variables, in their order.
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
        key = (measure, *map(id, local))
        if key not in self._programs:

            def program(gradients: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
                with _compiling():
                    return loop(gradients, local, local_slots, scalars)

            self._programs[key] = tf.function(program, jit_compile=True, autograph=False)
        return self._programs[key](list(gradients), [tf.convert_to_tensor(s) for s in scalars])

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledUpdate":
        return CompiledUpdate(copy.deepcopy(self._step, memo))  # the copy has other variables, so other programs


def _local(variable: keras.Variable) -> Any:
    """The TensorFlow variable that this replica of a strategy owns."""
    import tensorflow as tf

    value = getattr(variable, "value", variable)
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return value
    local = tf.distribute.get_strategy().experimental_local_results(value)
    replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
    return value if replica is None else local[replica % len(local)]


def _can_compile(gradients: Sequence[Tensor], variables: Sequence[Any]) -> bool:
    """Not with sparse gradients, variables on several devices, or where everything is compiled already (a TPU)."""
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
