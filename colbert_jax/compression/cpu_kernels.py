"""The loops of k-means and compression on a CPU, compiled by numba; see `compression.cpu`.

Every function releases the GIL and works on one block of points. The inner loops that search uses
too are here. Constants are those of this file: `compiled` looks at no other for changes.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.compiled import compiled

_ZERO = np.float32(0)
_TILE = 32  # centroids that fit into the first-level cache


@compiled
def dots(a, b, q0, q1, q2, q3):
    """Multiply a and b with four vectors each, sharing loads: eight dot products, float32."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _ZERO
    for d in range(len(a)):
        x, y = a[d], b[d]
        a0 += x * q0[d]
        a1 += x * q1[d]
        a2 += x * q2[d]
        a3 += x * q3[d]
        b0 += y * q0[d]
        b1 += y * q1[d]
        b2 += y * q2[d]
        b3 += y * q3[d]
    return a0, a1, a2, a3, b0, b1, b2, b3


@compiled
def insert(value, place, count, filled, values, places):
    """Insert a value into a list of the `count` largest, the largest first.

    Equal values stay in the order in which they were inserted.

    Args:
      filled: the length of the list.
      values, places: [count], the list, updated.

    Returns:
      the new length of the list.
    """
    if filled == count and value <= values[count - 1]:
        return filled
    at = filled if filled < count else count - 1
    while at > 0 and values[at - 1] < value:
        values[at] = values[at - 1]
        places[at] = places[at - 1]
        at -= 1
    values[at] = value
    places[at] = place
    return min(filled + 1, count)


@compiled
def _nearest_of(points, members, centroids, bias, rows, best, code):
    """Compare points with centroids; of equal scores the smaller centroid is nearer.

    Args:
      points: float32[n, D].
      members: int32[...], the points.
      centroids, bias: float32[K, D] and [K].
      rows: int32[...], the centroids, ascending.
      best, code: float32[n] and int32[n], updated.
    """
    for start in range(0, len(rows), _TILE):
        stop = min(start + _TILE, len(rows))
        for m in range(0, len(members), 2):
            i, j = members[m], members[min(m + 1, len(members) - 1)]
            a, b = points[i], points[j]
            best_a, best_b, code_a, code_b = best[i], best[j], code[i], code[j]
            for r in range(start, stop, 4):
                n = min(4, stop - r)
                c0, c1 = rows[r], rows[r + min(1, n - 1)]
                c2, c3 = rows[r + min(2, n - 1)], rows[r + min(3, n - 1)]
                products = dots(a, b, centroids[c0], centroids[c1], centroids[c2], centroids[c3])
                for t in range(n):
                    c = rows[r + t]
                    score = products[t] + bias[c]
                    if score > best_a or (score == best_a and c < code_a):
                        best_a, code_a = score, c
                    score = products[4 + t] + bias[c]
                    if score > best_b or (score == best_b and c < code_b):
                        best_b, code_b = score, c
            best[i], code[i] = best_a, code_a
            best[j], code[j] = best_b, code_b


@compiled
def nearest_all(points, centroids, bias, best, code):
    """Find the nearest of all centroids for every point.

    Args:
      points: float32[n, D].
      centroids, bias: float32[K, D] and [K].
      best, code: float32[n] and int32[n], filled.
    """
    members = np.arange(len(points)).astype(np.int32)
    best[:] = -np.inf
    code[:] = 0
    rows = np.arange(len(centroids)).astype(np.int32)
    _nearest_of(points, members, centroids, bias, rows, best, code)


@compiled
def _top(scores, count, found, values):
    """Fill `found` with the places of the `count` largest scores, the largest first."""
    filled = 0
    for g in range(len(scores)):
        filled = insert(scores[g], g, count, filled, values, found)


@compiled
def nearest_in_groups(
    points, coarse, coarse_bias, probes, members, starts, centroids, bias, best, code
):
    """Find the nearest centroid for every point among those of its `probes` nearest groups.

    Args:
      points: float32[n, D].
      coarse, coarse_bias: float32[G, D] and [G], the centres of the groups.
      members, starts: int32[K] and int32[G+1], the centroids of each group.
      centroids, bias: float32[K, D] and [K].
      best, code: float32[n] and int32[n], filled.
    """
    n = len(points)
    num_groups = len(coarse)
    groups = np.empty((n, probes), np.int32)
    counts = np.zeros(num_groups + 1, np.int32)
    first, second = np.empty(num_groups, np.float32), np.empty(num_groups, np.float32)
    values = np.empty(probes, np.float32)
    last = num_groups - 1
    for i in range(0, n, 2):
        j = min(i + 1, n - 1)
        for g in range(0, num_groups, 4):
            g1, g2, g3 = min(g + 1, last), min(g + 2, last), min(g + 3, last)
            products = dots(points[i], points[j], coarse[g], coarse[g1], coarse[g2], coarse[g3])
            for t in range(min(4, num_groups - g)):
                first[g + t] = products[t] + coarse_bias[g + t]
                second[g + t] = products[4 + t] + coarse_bias[g + t]
        _top(first, probes, groups[i], values)
        if j > i:
            _top(second, probes, groups[j], values)
    for i in range(n):
        for p in range(probes):
            counts[groups[i, p] + 1] += 1
    for g in range(num_groups):
        counts[g + 1] += counts[g]
    places = counts[:-1].copy()
    order = np.empty(n * probes, np.int32)
    for i in range(n):
        for p in range(probes):
            g = groups[i, p]
            order[places[g]] = i
            places[g] += 1
    best[:] = -np.inf
    code[:] = 0
    for g in range(num_groups):
        if counts[g] < counts[g + 1] and starts[g] < starts[g + 1]:
            rows = members[starts[g] : starts[g + 1]]
            _nearest_of(points, order[counts[g] : counts[g + 1]], centroids, bias, rows, best, code)


@compiled
def add_to_clusters(points, code, start, stop, sums, counts):
    """Add the points of clusters start..stop-1 to their sums [K, D] and counts [K]."""
    for i in range(len(points)):
        c = code[i]
        if start <= c < stop:
            counts[c] += 1
            target, point = sums[c], points[i]
            for d in range(len(point)):
                target[d] += point[d]


@compiled
def pack_residuals(points, code, centroids, cutoffs, reversed_bits, nbits, packed):
    """Compute residuals, their buckets, and pack these; see `codec.compress`.

    A value equal to a cutoff is below it.

    Args:
      points: float32[n, D].
      code: int32[n].
      centroids: float32[K, D].
      cutoffs: float32[2^b - 1], ascending.
      reversed_bits: uint8[2^b], see `codec.reversed_bits`.
      packed: uint8[n, D * b / 8], filled.
    """
    dim = points.shape[1]
    per_byte = 8 // nbits
    residual = np.empty(dim, np.float32)
    bucket = np.empty(dim, np.int32)
    for i in range(len(points)):
        point, centroid = points[i], centroids[code[i]]
        for d in range(dim):
            residual[d] = point[d] - centroid[d]
            bucket[d] = 0
        if nbits <= 4:
            for cutoff in cutoffs:
                for d in range(dim):
                    bucket[d] += residual[d] > cutoff
        else:
            for d in range(dim):
                low, high = 0, len(cutoffs)
                while low < high:
                    middle = (low + high) // 2
                    if cutoffs[middle] < residual[d]:
                        low = middle + 1
                    else:
                        high = middle
                bucket[d] = low
        target = packed[i]
        for p in range(len(target)):
            byte = 0
            for g in range(per_byte):
                byte = (byte << nbits) | reversed_bits[bucket[p * per_byte + g]]
            target[p] = byte
