"""k-means over token embeddings (Lloyd), on one or many devices, over points that stay on the host.

One block of points is on a device at a time, so the points may be a memory-mapped file of any size;
the centroids, their sums and counts stay on the device. Each device sums over its share of every
block; the sums of all devices are added once in each iteration.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from colbert_jax import runtime
from colbert_jax.compression import cpu
from colbert_jax.compression.assign import block_size, nearest, pad_to
from colbert_jax.compression.refill import refill
from colbert_jax.compression.sharding import (
    auto_mesh,
    data_mesh,
    replicate,
    rows_spec,
    shard_rows,
)
from colbert_jax.processes import Group
from colbert_jax.progress import progress_bar

_BLOCK = 1 << 16  # points of a device in a step


def sample_size_for(num_documents: int) -> int:
    """Return the number of documents to train on: Stanford's rule, `1 + 16 sqrt(120 N)`, at most N.

    120 is a typical document length.
    """
    return min(1 + int(16 * math.sqrt(120 * num_documents)), num_documents)


def num_centroids_for(num_tokens: float) -> int:
    """Return Stanford's number of centroids: the power of two at or below `16 sqrt(T)`."""
    return 1 << int(math.log2(most_centroids_for(num_tokens)))


def most_centroids_for(num_tokens: float) -> float:
    """Return `16 sqrt(T)`, what Stanford's number of centroids is rounded down from."""
    return 16 * math.sqrt(max(num_tokens, 1))


@runtime.apart()
def train_kmeans(
    points: Any,
    num_centroids: int,
    *,
    rows: np.ndarray | None = None,
    iterations: int = 4,
    max_points_per_centroid: int = 256,
    seed: int = 123,
    progress: bool | None = None,
    mesh: Mesh | None = None,
    group: Group | None = None,
) -> np.ndarray:
    """Train centroids of unit length.

    It runs Euclidean Lloyd iterations from randomly chosen points and normalises the centroids at
    the end, as Stanford does. A cluster that loses all its points gets half of one of the largest.
    On a CPU, without a mesh, it works on two levels (`compression.cpu`).

    A device holds the centroids twice (K * D * 8 bytes), a block of 65,536 points, and its scores.

    Args:
      points: [n, D], float16 or float32, in memory or mapped, n >= 1; or an object with a length
        that is indexed by an ascending int array of rows.
      num_centroids: K, at most n of which are made.
      rows: int[m], ascending, the points to train on. If None, all.
      iterations: of Lloyd.
      max_points_per_centroid: a random subset of this many times K points is trained on, if there
        are more.
      seed: for the subset and the initial centroids.
      progress: whether to show a bar. If None, only on a terminal.
      mesh: devices that share the work, of one or several processes, in one axis. If
        None, the default device. Several processes must make the same call, with the same points.
      group: the processes, if the mesh has devices of several.

    Returns:
      float32[min(K, n), D]. The number of devices changes them only by the rounding of sums.

    Raises:
      ValueError: no points, or a mesh of several axes.
    """
    rows = np.arange(len(points)) if rows is None else rows
    if len(rows) == 0:
        raise ValueError("k-means needs at least one point, got none")
    no_mesh = mesh is None
    mesh = data_mesh() if mesh is None else auto_mesh(mesh)
    num_centroids = min(num_centroids, len(rows))
    rng = np.random.default_rng(seed)
    most = max_points_per_centroid * num_centroids
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
    n = len(rows)
    if no_mesh and runtime.use_cpu_kernels():
        centroids = cpu.train(points, rows, num_centroids, iterations, rng, progress)
        return _normalised(centroids)
    initial = np.sort(rng.choice(rows, num_centroids, replace=False))
    centroids = np.asarray(points[initial], np.float32)

    with progress_bar(
        iterations * n, f"k-means, {num_centroids} centroids", "tok", progress
    ) as bar:
        for _ in range(iterations):
            sums, counts = _sum_clusters(mesh, centroids, points, rows, bar)
            if group is not None:
                group.exchange(
                    "k-means"
                )  # a process that failed while reading must not be waited for
            means = _means(mesh, sums, counts)
            centroids = refill(*(np.asarray(part.addressable_data(0)) for part in means))
    return _normalised(centroids)


def _normalised(centroids: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids / np.maximum(norms, 1e-12)


def _sum_clusters(
    mesh: Mesh, centroids: np.ndarray, points: Any, rows: np.ndarray, bar: Any
) -> tuple[jax.Array, jax.Array]:
    """Each device's sums [n, K, D] and counts [n, K] over its share of the points."""
    shape, n = centroids.shape, len(rows)
    sums = shard_rows(mesh, (1, *shape), lambda _: np.zeros((1, *shape), np.float32))
    counts = shard_rows(mesh, (1, shape[0]), lambda _: np.zeros((1, shape[0]), np.float32))
    bias = -0.5 * (centroids**2).sum(axis=1)
    on_devices = replicate(mesh, (centroids, bias))
    for start in range(0, n, mesh.size * _BLOCK):
        count = min(mesh.size * _BLOCK, n - start)
        size = block_size(-(-count // mesh.size), _BLOCK)

        def read(device: int, start: int = start, count: int = count, size: int = size):
            first = min(device * size, count)
            part = rows[start + first : start + min(first + size, count)]
            return pad_to(points[part], size)

        block = shard_rows(mesh, (size, shape[1]), read)
        counts.block_until_ready()  # of the block before: this one was read meanwhile
        sums, counts = _accumulate_sharded(mesh, *on_devices, sums, counts, block, count)
        bar.update(count)
    return sums, counts


@partial(jax.jit, static_argnames="mesh", donate_argnames=("sums", "counts"))
def _accumulate_sharded(
    mesh: Mesh,
    centroids: jax.Array,
    bias: jax.Array,
    sums: jax.Array,
    counts: jax.Array,
    points: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Run `_accumulate` on every device; the first `count` of all points are real."""
    spread = rows_spec(mesh)

    def one(centroids, bias, sums, counts, points, count):
        first = jax.lax.axis_index(mesh.axis_names[0]) * len(points)
        valid = jnp.clip(count - first, 0, len(points))
        sums, counts = _accumulate(centroids, bias, sums[0], counts[0], points, valid)
        return sums[None], counts[None]

    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), spread, spread, spread, PartitionSpec()),
        out_specs=spread,
    )(centroids, bias, sums, counts, points, count)


@partial(jax.jit, static_argnames="mesh")
def _means(mesh: Mesh, sums: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means [K, D] and counts [K] over all devices, on each of them."""

    def one(sums, counts):
        sums, counts = jax.lax.psum((sums[0], counts[0]), mesh.axis_names[0])
        return sums / jnp.maximum(counts, 1)[:, None], counts

    return jax.shard_map(one, mesh=mesh, in_specs=rows_spec(mesh), out_specs=PartitionSpec())(
        sums, counts
    )


@partial(jax.jit, donate_argnames=("sums", "counts"))
def _accumulate(
    centroids: jax.Array,
    bias: jax.Array,
    sums: jax.Array,
    counts: jax.Array,
    points: jax.Array,
    valid: int,
) -> tuple[jax.Array, jax.Array]:
    """Add the first `valid` points of a block [b, D] to their clusters."""
    weight = (jnp.arange(points.shape[0]) < valid).astype(jnp.float32)
    points = points.astype(jnp.float32)
    codes = nearest(points, centroids, bias)
    sums = sums.at[codes].add(points * weight[:, None])
    return sums, counts.at[codes].add(weight)
