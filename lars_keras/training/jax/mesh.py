"""Where things lie on JAX: the mesh of a run's devices, and the share of a weight that each of them keeps."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Thinner shares are not worth their own traffic, and lie badly in a TPU's tiles of 8 x 128.
_THINNEST = 8
_SMALLEST = 2**14  # elements of a weight that is cut


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of all devices: an axis for each direction of a TPU's torus, else one axis.

    A TPU reduces and scatters along one direction of its torus at a time; over all of its chips as one axis the
    compiler makes a whole all-reduce of it.
    """
    devices = torus_order(devices)
    places = [place for place in map(_coordinates, devices) if place]
    if len(places) == len(devices):
        lengths = [len(set(along)) for along in zip(*places, strict=True)]
        lengths = [n for n in lengths if n > 1] or [1]
        if math.prod(lengths) == len(devices):
            return Mesh(np.array(devices).reshape(lengths), tuple("xyzc"[: len(lengths)]))
    return Mesh(np.array(devices), ("batch",))


def torus_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """By their place in the torus; else those of one process side by side, which take consecutive ghost batches."""
    return sorted(devices, key=lambda device: _coordinates(device) or (device.process_index, device.id))


def ghost_numbers(devices: Sequence[jax.Device]) -> np.ndarray:
    """Which ghost batch of a pass each device takes, int32, in the order of `devices`.

    A process reads consecutive ghost batches, and its devices take them in their order here. In a torus the devices of
    several processes may alternate.
    """
    numbers = np.empty(len(devices), np.int32)
    numbers[np.argsort([device.process_index for device in devices], kind="stable")] = np.arange(len(devices))
    return numbers


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    """Coordinates in the torus, and the core in a chip that has several; empty for what is no TPU."""
    if device.platform != "tpu":
        return ()
    return (*device.coords, device.core_on_chip)


def shard_dims(shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...] | None:
    """How a weight is dims into shares: for each axis of the mesh, the dimension cut along it; None if it stays whole.

    Each axis shard_dims the dimension that is then the longest.
    """
    if mesh.devices.size == 1 or math.prod(shape) < _SMALLEST:
        return None
    left, chosen = list(shape), []
    for length in mesh.devices.shape:
        able = [d for d, size in enumerate(left) if size % length == 0 and size // length >= _THINNEST]
        if not able:
            return None
        dimension = max(able, key=lambda d: left[d])
        left[dimension] //= length
        chosen.append(dimension)
    return tuple(chosen)


def shard_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The specification of a weight in shares, or of a whole one where it is not cut."""
    chosen = shard_dims(shape, mesh)
    if chosen is None:
        return PartitionSpec()
    names = [tuple(name for name, c in zip(mesh.axis_names, chosen, strict=True) if c == d) for d in range(len(shape))]
    return PartitionSpec(*(name or None for name in names))


def shard_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a weight in shares lies."""
    return NamedSharding(mesh, shard_spec(shape, mesh))
