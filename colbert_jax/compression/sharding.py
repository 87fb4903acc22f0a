"""Rows of points over the devices of a mesh, centroids on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Any = None) -> Mesh:
    """A mesh of one axis; `devices` None: the default device alone."""
    if devices is None:
        devices = jax.numpy.zeros(0).devices()
    return Mesh(np.array(list(devices)), ("data",), axis_types=(AxisType.Auto,))


def check_mesh(mesh: Mesh) -> None:
    """Raise ValueError unless the mesh has one axis, of type Auto."""
    if len(mesh.axis_names) != 1 or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(
            f"expected a mesh of one axis of type Auto, got {mesh}; make it with "
            'jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))'
        )


def local_part(mesh: Mesh) -> Mesh:
    """The devices of a mesh that belong to this process."""
    return data_mesh([d for d in mesh.devices.flat if d.process_index == jax.process_index()])


def rows_spec(mesh: Mesh) -> PartitionSpec:
    """The first axis spread over the mesh."""
    return PartitionSpec(mesh.axis_names[0])


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Host arrays, the same in every process, on all devices."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def shard_rows(mesh: Mesh, shape: tuple[int, ...], read: Callable[[int], np.ndarray]) -> jax.Array:
    """[n * shape[0], ...]: device i of the n holds `read(i)`, an array of `shape`.

    A process reads only what its own devices hold.
    """
    whole = (mesh.size * shape[0], *shape[1:])
    sharding = NamedSharding(mesh, rows_spec(mesh))

    def piece(index: Any) -> np.ndarray:
        return read((index[0].start or 0) // shape[0])

    return jax.make_array_from_callback(whole, sharding, piece)
