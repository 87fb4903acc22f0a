"""k-means and compression on a CPU, where nearly all time would go into comparing with centroids.

Two levels: centroids fall into about sqrt(K) groups, and a point is compared with the groups, then
with the centroids of the few nearest groups. k-means starts hierarchically: points are cut into
groups, each with a share of the centroids, and each group runs some Lloyd iterations; iterations
over all points then correct the borders. `benchmarks/kmeans.py` measures what this loses against
comparing with all.

The loops are in `compression.cpu_kernels`. Results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.compression.refill import refill
from colbert_jax.progress import progress_bar
from colbert_jax.runtime import num_threads, spread

EXACT = 1024  # up to this number of centroids, points are compared with all of them
_BLOCK = 1 << 14  # points of a thread's step
_PROBES = 8  # groups that a point is compared with in compression
_TRAINING_PROBES = 4  # and in k-means
_COARSE_POINTS = 256  # points for each group, to find the groups
_GROUP_ITERATIONS = 6
_REGROUPED = 8  # more new centroids than this part of the known ones are grouped anew, with them


class Strips(NamedTuple):
    """Centroids laid out for `cpu_kernels`, see there.

    columns: float32[strips, D, LANES].
    places, bias: int32 and float32[strips, LANES]; the nearest centroid has the largest dot product
      plus bias.
    """

    columns: np.ndarray
    places: np.ndarray
    bias: np.ndarray


class CentroidGroups(NamedTuple):
    """Centroids and the groups they fall into.

    centroids: float32[K, D].
    coarse, columns, bias: float32[G, D], the centres of the groups; the same as columns of tiles;
      float32[G], what is added to a product.
    group: int32[K], the group of each centroid.
    starts: int32[G+1], the strips of each group.
    strips: all centroids, by group.
    """

    centroids: np.ndarray
    coarse: np.ndarray
    columns: np.ndarray
    bias: np.ndarray
    group: np.ndarray
    starts: np.ndarray
    strips: Strips


def group_centroids(centroids: np.ndarray, *, distance: bool) -> CentroidGroups:
    """Make two levels over centroids float32[K, D].

    Args:
      distance: whether the nearest centroid is the one at the smallest distance. Otherwise it is
        that with the largest dot product, which is the same if all centroids have unit length.
    """
    centroids = np.ascontiguousarray(centroids, np.float32)
    if len(centroids) <= EXACT:  # one group
        coarse = np.zeros((1, centroids.shape[1]), np.float32)
        group = np.zeros(len(centroids), np.int32)
    else:
        num_groups = _num_groups(len(centroids))
        coarse = _cluster(centroids, num_groups, np.random.default_rng(0))
        group = _assign(centroids, coarse)[1]
    return _grouped(centroids, coarse, group, distance)


def _grouped(
    centroids: np.ndarray, coarse: np.ndarray, group: np.ndarray, distance: bool
) -> CentroidGroups:
    from colbert_jax.compression import tiles

    bias = _half_squares(centroids) if distance else np.zeros(len(centroids), np.float32)
    order = np.argsort(group, kind="stable").astype(np.int32)
    ends = np.searchsorted(group[order], np.arange(len(coarse) + 1))
    members = [order[start:end] for start, end in itertools.pairwise(ends)]
    starts = np.cumsum([0, *(-(-len(some) // tiles.LANES) for some in members)]).astype(np.int32)
    strips = _strips(centroids, bias, members)
    columns, shifts = tiles.packed(coarse), _half_squares(coarse)
    return CentroidGroups(centroids, coarse, columns, shifts, group, starts, strips)


def _strips(centroids: np.ndarray, bias: np.ndarray, groups: list[np.ndarray]) -> Strips:
    """Lay out the centroids of each group, int32[...] ascending, from a strip of its own on."""
    from colbert_jax.compression import tiles

    counts = [-(-len(some) // tiles.LANES) for some in groups]
    columns = np.empty((sum(counts), centroids.shape[1], tiles.LANES), np.float32)
    places = np.zeros((sum(counts), tiles.LANES), np.int32)
    shifts = np.full((sum(counts), tiles.LANES), -np.inf, np.float32)
    start = 0
    for some, count in zip(groups, counts, strict=True):
        part = slice(start, start + count)
        tiles.pack(centroids, some, columns[part])
        places[part].reshape(-1)[: len(some)] = some
        shifts[part].reshape(-1)[: len(some)] = bias[some]
        start += count
    return Strips(columns, places, shifts)


def _assign(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare points [n, D] with all of a few centroids, by distance.

    Returns:
      float32[n], the dot product with the nearest minus half its square, and int32[n], which it is.
    """
    from colbert_jax.compression import cpu_kernels

    best, code = np.empty(len(points), np.float32), np.empty(len(points), np.int32)
    every = np.arange(len(centroids)).astype(np.int32)
    strips = _strips(centroids, _half_squares(centroids), [every])
    cpu_kernels.nearest_all(points, *strips, best, code)
    return best, code


def groups_of(centroids: Any) -> CentroidGroups:
    """Make two levels over unit centroids, and keep them for the next call with the same array."""
    global _kept
    kept = _kept
    if kept is None or kept[0] is not centroids:
        kept = _kept = centroids, group_centroids(np.asarray(centroids), distance=False)
    return kept[1]


_kept: tuple[Any, CentroidGroups] | None = None  # what `groups_of` has made last


def extend_groups(known: Any, centroids: Any) -> None:
    """Keep groups for `centroids`, unit vectors that begin with the `known` ones.

    Where few are new, they join the groups of the known ones, which takes a small part of the time.
    """
    global _kept
    rows = np.ascontiguousarray(centroids, np.float32)
    fresh = rows[len(known) :]
    if len(fresh) * _REGROUPED > len(known):
        return
    groups = groups_of(known)
    group = np.concatenate([groups.group, _assign(fresh, groups.coarse)[1]])
    _kept = centroids, _grouped(rows, groups.coarse, group, distance=False)


def _num_groups(num_centroids: int) -> int:
    """A power of two near the square root."""
    return 1 << round(np.log2(max(num_centroids, 1)) / 2)


def _half_squares(rows: np.ndarray) -> np.ndarray:
    return (-0.5 * np.square(rows).sum(axis=1)).astype(np.float32)


def nearest(groups: CentroidGroups, points: np.ndarray) -> np.ndarray:
    """Find the nearest centroid of every point [n, D], float16 or float32: int32[n]."""
    codes = np.empty(len(points), np.int32)

    def work(block: slice) -> None:
        codes[block] = _nearest(groups, np.ascontiguousarray(points[block], np.float32), _PROBES)

    _over_blocks(work, len(points))
    return codes


def _nearest(groups: CentroidGroups, points: np.ndarray, probes: int) -> np.ndarray:
    from colbert_jax.compression import cpu_kernels

    best, code = np.empty(len(points), np.float32), np.empty(len(points), np.int32)
    if len(groups.starts) == 2:
        cpu_kernels.nearest_all(points, *groups.strips, best, code)
        return code
    cpu_kernels.nearest_in_groups(
        points,
        groups.columns,
        groups.bias,
        min(probes, len(groups.coarse)),
        groups.starts,
        *groups.strips,
        best,
        code,
    )
    return code


def train(
    points: np.ndarray,
    rows: np.ndarray,
    num_centroids: int,
    iterations: int,
    rng: np.random.Generator,
    progress: bool | None,
) -> np.ndarray:
    """Run Euclidean k-means.

    Up to EXACT centroids it runs Lloyd iterations from random points. For more centroids, half as
    many iterations over all points follow the hierarchical start.

    Besides the centroids and their sums it takes 12 bytes for each row, and a group and a block of
    points for each thread.

    Args:
      points: [n, D], float16 or float32, in memory or mapped.
      rows: int[m], ascending, the points to train on; at least `num_centroids`.
      rng: for the initial centroids.
      progress: whether to show a bar. If None, only on a terminal.

    Returns:
      float32[K, D], not normalised.
    """
    if num_centroids <= EXACT:
        start = np.sort(rng.choice(rows, num_centroids, replace=False))
        centroids = np.asarray(points[start], np.float32)
        total = iterations
    else:
        total = max(iterations // 2, 1)
    title = f"k-means, {num_centroids} centroids"
    passes = total if num_centroids <= EXACT else total + 1
    with progress_bar(passes * len(rows), title, "tok", progress) as bar:
        if num_centroids > EXACT:
            centroids = _hierarchical(points, rows, num_centroids, rng, bar)
        for _ in range(total):
            centroids = _lloyd(points, rows, centroids, bar)
    return centroids


def _lloyd(points: np.ndarray, rows: np.ndarray, centroids: np.ndarray, bar: Any) -> np.ndarray:
    """One iteration over all points."""
    from colbert_jax.compression import cpu_kernels

    threads, num_centroids = num_threads(), len(centroids)
    groups = group_centroids(centroids, distance=True)
    sums, counts = np.zeros_like(centroids), np.zeros(num_centroids, np.int64)
    bounds = np.linspace(0, num_centroids, threads + 1).astype(int).tolist()
    for start in range(0, len(rows), threads * _BLOCK):
        block = np.asarray(points[rows[start : start + threads * _BLOCK]], np.float32)
        code = np.empty(len(block), np.int32)

        def assign(piece: slice, block=block, code=code) -> None:
            code[piece] = _nearest(groups, block[piece], _TRAINING_PROBES)

        def add(lane: int, block=block, code=code) -> None:
            cpu_kernels.add_to_clusters(block, code, bounds[lane], bounds[lane + 1], sums, counts)

        _over_blocks(assign, len(block))
        spread(add, threads)
        bar.update(len(block))
    return _means(sums, counts)


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    means = sums / np.maximum(counts, 1)[:, None].astype(np.float32)
    return np.ascontiguousarray(refill(means, counts.astype(np.float32)), np.float32)


def _hierarchical(
    points: np.ndarray, rows: np.ndarray, num_centroids: int, rng: np.random.Generator, bar: Any
) -> np.ndarray:
    """Cluster groups of points separately: float32[K, D].

    A group's share of the centroids is its share of the squared distances to the groups' centres.
    """
    num_groups = _num_groups(num_centroids)
    some = rng.choice(rows, min(len(rows), _COARSE_POINTS * num_groups), replace=False)
    coarse = _cluster(np.asarray(points[np.sort(some)], np.float32), num_groups, rng)
    group, spread_of = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)

    def assign(block: slice) -> None:
        values = np.asarray(points[rows[block]], np.float32)
        best, group[block] = _assign(values, coarse)
        spread_of[block] = np.square(values).sum(axis=1) - 2 * best

    _over_blocks(assign, len(rows))
    counts = np.bincount(group, minlength=num_groups)
    weights = np.bincount(group, weights=np.maximum(spread_of, 0), minlength=num_groups)
    shares = _shares(weights, counts, num_centroids)
    order = rows[np.argsort(group, kind="stable")]
    ends = np.cumsum(counts)
    seeds = rng.integers(0, 2**63, num_groups)
    parts: list[np.ndarray] = [np.empty(0)] * num_groups

    def cluster(first: int) -> None:
        for g in range(first, num_groups, threads):
            members = np.sort(order[ends[g] - counts[g] : ends[g]])
            values = np.asarray(points[members], np.float32)
            parts[g] = _cluster(values, int(shares[g]), np.random.default_rng(seeds[g]))
            bar.update(len(members))

    threads = num_threads()
    spread(cluster, threads)
    return np.concatenate(parts)


def _cluster(values: np.ndarray, num_centroids: int, rng: np.random.Generator) -> np.ndarray:
    """Run a few Lloyd iterations over points float32[n, D] that roughly fit into the cache."""
    from colbert_jax.compression import cpu_kernels

    start = np.sort(rng.choice(len(values), num_centroids, replace=False))
    centroids = values[start]
    for _ in range(_GROUP_ITERATIONS if num_centroids > 1 else min(num_centroids, 1)):
        code = _assign(values, centroids)[1]
        sums, counts = np.zeros_like(centroids), np.zeros(num_centroids, np.int64)
        cpu_kernels.add_to_clusters(values, code, 0, num_centroids, sums, counts)
        centroids = _means(sums, counts)
    return centroids


def _shares(weights: np.ndarray, counts: np.ndarray, total: int) -> np.ndarray:
    """Split `total` by weight into whole numbers, none above its count."""
    shares = np.zeros(len(counts), np.int64)
    while (left := total - int(shares.sum())) > 0:
        room = counts - shares
        open_ = np.where(room > 0, np.maximum(weights, 1e-12), 0)
        exact = open_ / open_.sum() * left
        more = np.minimum(np.floor(exact).astype(np.int64), room)
        if more.sum() == 0:  # less than one each: the largest remainders
            more[np.argsort(-np.where(room > 0, exact, -1), kind="stable")[:left]] = 1
            more = np.minimum(more, room)
        shares += more
    return shares


def compress(
    groups: CentroidGroups, codec: Any, reversed_bits: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compress embeddings [n, D].

    Args:
      groups: from `group_centroids`.
      codec: a `ResidualCodec`, for its buckets and scales.
      reversed_bits: int[2^b], see `codec.reversed_bits`.

    Returns:
      codes int32[n] and packed residuals uint8[n, D * b / 8].
    """
    from colbert_jax.compression import cpu_kernels

    cutoffs, weights = np.asarray(codec.bucket_cutoffs), np.asarray(codec.bucket_weights)
    scales = np.asarray(codec.scales, np.float32)
    nbits = len(cutoffs).bit_length()
    reversed_bits = reversed_bits.astype(np.uint8)
    codes = np.empty(len(values), np.int32)
    packed = np.empty((len(values), values.shape[1] * nbits // 8), np.uint8)

    def work(block: slice) -> None:
        points = np.ascontiguousarray(values[block], np.float32)
        codes[block] = _nearest(groups, points, _PROBES)
        cpu_kernels.pack_residuals(
            points,
            codes[block],
            groups.centroids,
            cutoffs,
            weights,
            scales,
            reversed_bits,
            nbits,
            packed[block],
        )

    _over_blocks(work, len(values))
    return codes, packed


def _over_blocks(work: Callable[[slice], None], n: int) -> None:
    """Run work on blocks of 0..n, spread over the threads."""
    threads = num_threads()
    size = min(_BLOCK, -(-n // threads)) or 1

    def lane(first: int) -> None:
        for start in range(first * size, n, threads * size):
            work(slice(start, min(start + size, n)))

    spread(lane, threads if n > size else 1)
