"""The mesh of a run's devices on JAX, and the order in which they take ghost batches."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh of all devices: an axis for each direction of a TPU's torus, else one axis.

    A TPU reduces and scatters along one direction of its torus at a time. Along one axis of all of its chips, the
    compiler turns a reduce-scatter into an all-reduce of full size. `jax.experimental.mesh_utils.create_device_mesh`
    would take these lengths as given, and on small slices follows rings that leave the torus's axes.
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
    """Return the devices in the order of their coordinates in the torus.

    Without a torus the devices of a process are neighbors in the order, so that they take consecutive ghost batches.
    """
    return sorted(devices, key=lambda device: _coordinates(device) or (device.process_index, device.id))


def ghost_numbers(devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the number of the ghost batch in a micro-batch that each device takes, int32, in the order of `devices`.

    A process reads consecutive ghost batches, and its devices take them in the order of `devices`. In a torus the
    devices of several processes may alternate.
    """
    numbers = np.empty(len(devices), np.int32)
    numbers[np.argsort([device.process_index for device in devices], kind="stable")] = np.arange(len(devices))
    return numbers


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    """Return the coordinates in the torus, then the core in its chip; empty for a device that is not a TPU."""
    if device.platform != "tpu":
        return ()
    return (*device.coords, device.core_on_chip)
