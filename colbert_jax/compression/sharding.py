"""Place rows of points over the devices of a mesh, and centroids on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Any = None) -> Mesh:
    """Make a mesh of one axis, "data". If `devices` is None, of the default device."""
    if devices is None:
        devices = jax.numpy.zeros(0).devices()
    return Mesh(np.array(list(devices)), ("data",), axis_types=(AxisType.Auto,))


def auto_mesh(mesh: Mesh) -> Mesh:
    """Return a mesh of one axis as one whose axis is of type Auto, which programs here are for.

    Raises ValueError for a mesh of several axes.
    """
    if len(mesh.axis_names) != 1:
        raise ValueError(
            f"expected a mesh of one axis, got {mesh}; make it with "
            'jax.make_mesh((jax.device_count(),), ("data",))'
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))


def local_part(mesh: Mesh) -> Mesh:
    """Make a mesh of this process's devices of a mesh."""
    return data_mesh([d for d in mesh.devices.flat if d.process_index == jax.process_index()])


def rows_spec(mesh: Mesh) -> PartitionSpec:
    """Return the specification of rows that are spread over the mesh."""
    return PartitionSpec(mesh.axis_names[0])


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy host arrays, the same in every process, to all devices of a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def shard_rows(mesh: Mesh, shape: tuple[int, ...], read: Callable[[int], np.ndarray]) -> jax.Array:
    """Make an array [n * shape[0], ...] over n devices, of which device i holds `read(i)`.

    A process reads only the parts of its devices.

    Args:
      shape: of each part.
      read: i -> the part of device i, on the host.
    """
    whole = (mesh.size * shape[0], *shape[1:])
    sharding = NamedSharding(mesh, rows_spec(mesh))

    def piece(index: Any) -> np.ndarray:
        return read((index[0].start or 0) // shape[0])

    return jax.make_array_from_callback(whole, sharding, piece)
