"""The loops of k-means and compression on a CPU, compiled by numba; see `compression.cpu`.

Every function releases the GIL and works on one block of points. The inner loops that search uses
too are here. Constants are those of this file: `compiled` looks at no other for changes.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.compiled import compiled
from colbert_jax.compression.tiles import (
    LANES,
    PAIRED,
    ROWS,
    best_of_tile,
    best_of_two,
    find_larger,
    find_larger_two,
    multiply,
)

_TOKENS = 512  # that one strip of columns after the other is multiplied with


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
def _nearest_of(points, members, columns, places, bias, start, stop, best, code):
    """Compare points with centroids; of equal scores the smaller centroid is nearer.

    Args:
      points: float32[n, D].
      members: int32[...], the points.
      columns: float32[strips, D, LANES], the centroids, see `tiles.pack`.
      places, bias: int32[strips, LANES], which centroids these are, in every lane ascending, and
        float32[strips, LANES]; -inf where there is none.
      start, stop: the range of strips.
      best, code: float32[n] and int32[n], updated.
    """
    order = np.empty(ROWS, np.int32)
    values = np.empty((ROWS, LANES), np.float32)
    strips = np.empty((ROWS, LANES), np.int32)
    paired = stop - (stop - start) % 2 if PAIRED else start
    for first in range(0, len(members), ROWS):
        for t in range(ROWS):
            order[t] = members[min(first + t, len(members) - 1)]
        values[:] = -np.inf
        strips[:] = start
        for s in range(start, paired, 2):
            find_larger_two(points, order, columns, bias, s, values, strips)
        for s in range(paired, stop):
            find_larger(points, order, columns, bias, s, values, strips)
        for t in range(min(ROWS, len(members) - first)):
            i = order[t]
            score, found = best[i], code[i]
            for lane in range(LANES):
                value, c = values[t, lane], places[strips[t, lane], lane]
                if value > score or (value == score and c < found):
                    score, found = value, c
            best[i], code[i] = score, found


@compiled
def nearest_all(points, columns, places, bias, best, code):
    """Find the nearest of all centroids for every point.

    Args:
      points: float32[n, D].
      columns, places, bias: see `_nearest_of`.
      best, code: float32[n] and int32[n], filled.
    """
    members = np.arange(len(points)).astype(np.int32)
    best[:] = -np.inf
    code[:] = 0
    _nearest_of(points, members, columns, places, bias, 0, len(columns), best, code)


@compiled
def _top(scores, count, found, values):
    """Fill `found` with the places of the `count` largest scores, the largest first."""
    filled = 0
    for g in range(len(scores)):
        filled = insert(scores[g], g, count, filled, values, found)


@compiled
def nearest_in_groups(
    points, coarse, coarse_bias, probes, starts, columns, places, bias, best, code
):
    """Find the nearest centroid for every point among those of its `probes` nearest groups.

    Args:
      points: float32[n, D].
      coarse, coarse_bias: float32[strips, D, LANES] and float32[G], the centres of the groups.
      starts: int32[G+1], the strips of each group.
      columns, places, bias: see `_nearest_of`.
      best, code: float32[n] and int32[n], filled.
    """
    n = len(points)
    num_groups = len(coarse_bias)
    groups = np.empty((n, probes), np.int32)
    counts = np.zeros(num_groups + 1, np.int32)
    values = np.empty(probes, np.float32)
    order = np.empty(ROWS, np.int32)
    out = np.empty((ROWS, LANES), np.float32)
    scores = np.empty((ROWS, len(coarse) * LANES), np.float32)
    for first in range(0, n, ROWS):
        for t in range(ROWS):
            order[t] = min(first + t, n - 1)
        for s in range(len(coarse)):
            multiply(points, order, 0, coarse[s], out)
            for t in range(ROWS):
                for lane in range(LANES):
                    scores[t, s * LANES + lane] = out[t, lane]
        for t in range(min(ROWS, n - first)):
            row = scores[t, :num_groups]
            for g in range(num_groups):
                row[g] += coarse_bias[g]
            _top(row, probes, groups[first + t], values)
    for i in range(n):
        for p in range(probes):
            counts[groups[i, p] + 1] += 1
    for g in range(num_groups):
        counts[g + 1] += counts[g]
    after = counts[:-1].copy()
    members = np.empty(n * probes, np.int32)
    for i in range(n):
        for p in range(probes):
            g = groups[i, p]
            members[after[g]] = i
            after[g] += 1
    best[:] = -np.inf
    code[:] = 0
    for g in range(num_groups):
        if counts[g] < counts[g + 1] and starts[g] < starts[g + 1]:
            some = members[counts[g] : counts[g + 1]]
            _nearest_of(points, some, columns, places, bias, starts[g], starts[g + 1], best, code)


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
def pack_residuals(points, code, centroids, cutoffs, weights, scales, reversed_bits, nbits, packed):
    """Compute residuals, their buckets, and pack these; see `codec.compress`.

    A value equal to a cutoff is below it.

    Args:
      points: float32[n, D].
      code: int32[n].
      centroids: float32[K, D].
      cutoffs, weights: float32[2^b - 1], ascending, and float32[2^b].
      scales: float32[S]; several at up to 4 bits only.
      reversed_bits: uint8[2^b], see `codec.reversed_bits`.
      packed: uint8[n, D * b / 8], filled.
    """
    dim = points.shape[1]
    per_byte = 8 // nbits
    residual, rounded = np.empty(dim, np.float32), np.empty(dim, np.float32)
    bucket, other = np.empty(dim, np.int32), np.empty(dim, np.int32)
    for i in range(len(points)):
        point, centroid = points[i], centroids[code[i]]
        if nbits <= 4:
            best = np.float32(-np.inf)
            for scale in scales:
                for d in range(dim):
                    residual[d] = scale * point[d] - centroid[d]
                    rounded[d] = centroid[d] + weights[0]
                    other[d] = 0
                for j in range(len(cutoffs)):
                    cutoff, step = cutoffs[j], weights[j + 1] - weights[j]
                    for d in range(dim):
                        above = residual[d] > cutoff
                        other[d] += above
                        rounded[d] += step if above else np.float32(0)
                dot, norm = np.float32(0), np.float32(1e-24)
                for d in range(dim):
                    dot += point[d] * rounded[d]
                    norm += rounded[d] * rounded[d]
                cosine = dot / np.sqrt(norm)
                if cosine > best or best == -np.inf:
                    best = cosine
                    bucket, other = other, bucket
        else:
            for d in range(dim):
                residual[d] = point[d] - centroid[d]
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


@compiled
def products(rows, columns):
    """Multiply all rows float32[n, D] with the columns of tiles: float32[n, W]."""
    out = np.empty((len(rows), len(columns) * LANES), np.float32)
    order = np.empty(ROWS, np.int32)
    tile = np.empty((ROWS, LANES), np.float32)
    for first in range(0, len(rows), ROWS):
        for t in range(ROWS):
            order[t] = min(first + t, len(rows) - 1)
        for s in range(len(columns)):
            multiply(rows, order, 0, columns[s], tile)
            for t in range(min(ROWS, len(rows) - first)):
                for lane in range(LANES):
                    out[first + t, s * LANES + lane] = tile[t, lane]
    return out


@compiled
def update_best(tokens, scale, n, columns, best):
    """Raise best[q] to the largest column q . tokens[t] * scale[t] of the first n, one at least.

    Args:
      tokens: float32[T, D].
      columns: float32[W / LANES, D, LANES], see `tiles.pack`.
      best: float32[W].
    """
    paired = len(columns) - len(columns) % 2 if PAIRED else 0
    for first in range(0, n, ROWS):
        for s in range(0, paired, 2):
            best_of_two(tokens, first, n - 1, columns, s, scale, best)
        for s in range(paired, len(columns)):
            best_of_tile(tokens, first, n - 1, columns, s, scale, best)


@compiled
def best_matches(values, offsets, columns, start, stop, out):
    """Find the largest product of documents' tokens with every column.

    Args:
      values: float32[T, D].
      offsets: int64[N+1], document j has the tokens offsets[j]..offsets[j+1]-1, one at least.
      columns: float32[W / LANES, D, LANES], see `tiles.pack`.
      start, stop: the range of documents.
      out: float32[N, W], filled.
    """
    longest = 0
    for j in range(start, stop):
        longest = max(longest, offsets[j + 1] - offsets[j])
    scale = np.ones(longest, np.float32)
    first = start
    while first < stop:
        # Two strips of columns stay in cache for so many tokens, and these for all strips.
        last = first + 1
        while last < stop and offsets[last + 1] - offsets[first] <= _TOKENS:
            last += 1
        out[first:last] = -np.inf
        for s in range(0, len(columns), 2):
            strips = columns[s : s + 2]
            for j in range(first, last):
                tokens = values[offsets[j] : offsets[j + 1]]
                best = out[j, s * LANES : (s + len(strips)) * LANES]
                update_best(tokens, scale, len(tokens), strips, best)
        first = last
