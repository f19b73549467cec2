"""Private names of JAX, each behind one function.

`tests/optimizers/test_internals.py` reports a name that a new version of JAX has changed.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval


def used_inputs(function: Callable[..., Any], axis_env: Sequence[tuple[str, int]], *arguments: Any) -> list[bool]:
    """Return, for each array among the arguments, whether the function's one output depends on it.

    Args:
        function: returns one array; it may use collectives over the axes of `axis_env`.
        axis_env: names and sizes of mesh axes.
        *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`.
    """
    jaxpr = jax.make_jaxpr(function, axis_env=list(axis_env))(*arguments).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True])
    return list(used)


def compile_stablehlo(text: str, device: jax.Device) -> Any:
    """Compile a StableHLO program of one replica for a device, which may belong to another machine.

    Returns:
        An object with `cost_analysis()`, `memory_analysis()` and `as_text()`, as `jax.jit(...).lower(...).compile()`
        returns.
    """
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=device.client
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        executable = device.client.compile(module, xla_client.DeviceList((device,)), options)
    memory = executable.get_compiled_memory_stats()
    hlo = executable.hlo_modules()[0]
    return types.SimpleNamespace(
        cost_analysis=executable.cost_analysis, memory_analysis=lambda: memory, as_text=hlo.to_string
    )
