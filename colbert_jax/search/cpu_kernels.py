"""PLAID's ragged loops for a CPU, compiled by numba: no padding, no copy of the index.

XLA's CPU backend is several times slower on these loops (see `benchmarks/results`). Every function
releases the GIL and works on a range of centroids, candidates or documents, so that `search.cpu`
can spread one query, or a batch of them, over threads.

Approximate scores are compared as integers: `as_key` maps float32 to int32 in the same order, and
integer maxima vectorise, while float maxima do not because of NaN. Nothing is rounded.

Codes and entries of inverted lists come from mapped files that nobody has read before: each is held
to its range before memory is addressed with it. Negative ones are larger than all as uint32. A
block of codes costs a maximum, which vectorises over a slice from 0 on (with an index that might be
negative, numba wraps each access around); an entry a minimum beside its scattered write.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.compiled import compiled
from colbert_jax.compression.cpu_kernels import insert, update_best
from colbert_jax.compression.fixed_point import is_fast
from colbert_jax.compression.fixed_tiles import (
    best_of_tile_fixed,
    best_of_two_fixed,
    unpack1,
    unpack2,
    unpack4,
    unpack_floats1,
    unpack_floats2,
    unpack_floats4,
)
from colbert_jax.compression.tiles import (
    LANES,
    PAIRED,
    ROWS,
    keys_of_tile,
    keys_of_two,
    prefetch,
    raise_keys,
    raise_keys_two,
)

BLOCK = 64  # centroids that share a maximum, so that probing skips most of them
LOWEST = np.int32(-(2**31))
PRUNED = np.float32(-9999)  # `plaid.PRUNED`; here, because `compiled` looks at no other file
_RAW = 64  # tokens of a document that are scored at a time
_ZERO = np.float32(0)
IN_REGISTERS = is_fast()
_TINY = np.float32(1e-12)


@compiled
def as_key(bits):
    """Map the bits of a float32 to an int32 of the same order; the function is its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@compiled
def score_centroids(centroids, columns, start, stop, keys, block_best):
    """Score centroids, as keys, with the maximum of every block.

    Args:
      centroids: float32[K, D].
      columns: float32[W / LANES, D, LANES], the query, see `tiles.pack`.
      start, stop: the range of centroids, `start` a multiple of BLOCK.
      keys: int32[K, W], filled.
      block_best: int32[K / BLOCK, W], filled.
    """
    paired = len(columns) - len(columns) % 2 if PAIRED else 0
    for begin in range(start, stop, BLOCK):
        best, end = block_best[begin // BLOCK], min(begin + BLOCK, stop)
        best[:] = LOWEST
        for first in range(begin, end, ROWS):
            for s in range(0, paired, 2):
                keys_of_two(centroids, first, end - 1, columns, s, keys, best)
            for s in range(paired, len(columns)):
                keys_of_tile(centroids, first, end - 1, columns, s, keys, best)


@compiled
def best_of_centroids(keys, num_rows, out):
    """Fill out int32[K] with the largest key of each centroid for the first num_rows rows."""
    for c in range(len(keys)):
        most = LOWEST
        for q in range(num_rows):
            most = max(most, keys[c, q])
        out[c] = most


@compiled
def probe(keys, block_best, num_rows, ncells, cells):
    """Find the best `ncells` centroids of each query row; of equal scores the smaller centroid.

    Args:
      keys, block_best: from `score_centroids`.
      num_rows: query rows that are not padding.
      cells: int32[num_rows, ncells], filled.
    """
    num_centroids = keys.shape[0]
    best = np.empty(ncells, np.int32)
    for q in range(num_rows):
        filled = 0
        for block in range(block_best.shape[0]):
            if filled == ncells and block_best[block, q] <= best[ncells - 1]:
                continue
            for c in range(block * BLOCK, min((block + 1) * BLOCK, num_centroids)):
                filled = insert(keys[c, q], c, ncells, filled, best, cells[q])


@compiled
def mark(cells, lists, list_offsets, num_documents, marks):
    """Mark the documents of the probed inverted lists; mark number N for one that is not there."""
    num_lists = len(list_offsets) - 1
    for row in cells:
        for c in row:
            if c < num_lists:
                for entry in range(list_offsets[c], list_offsets[c + 1]):
                    marks[min(np.uint32(lists[entry]), num_documents)] = 1


@compiled
def candidates(
    cells,
    lists,
    list_offsets,
    recent_lists,
    recent_list_offsets,
    allowed,
    marks,
    words,
    positions,
):
    """Collect the distinct documents of the probed inverted lists.

    Args:
      cells: int32[rows, ncells], from `probe`.
      lists, list_offsets, recent_lists, recent_list_offsets: see `cpu.CpuArrays`.
      allowed: bool[N], no others are collected; of length 0 if all are allowed.
      marks: uint8[at least N + 1], zeros; zeros again when this returns.
      words: uint64, the same memory.
      positions: int32[N], filled from the front, ascending.

    Returns:
      the number of documents; -1 if a list names one that is not there.
    """
    num_documents = np.uint32(len(positions))
    mark(cells, lists, list_offsets, num_documents, marks)
    mark(cells, recent_lists, recent_list_offsets, num_documents, marks)
    if marks[num_documents] != 0:
        words[:] = 0
        return -1
    count = 0
    everyone = len(allowed) == 0
    for w in range(len(words)):
        if words[w] != 0:
            for i in range(8 * w, 8 * w + 8):
                if marks[i] != 0 and (everyone or allowed[i]):
                    positions[count] = i
                    count += 1
            words[w] = 0
    return count


@compiled
def largest(codes):
    """The largest of some codes, as uint32; 0 of none."""
    most = np.uint32(0)
    for t in range(len(codes)):
        most = max(most, np.uint32(codes[t]))
    return most


@compiled
def fetch(array, start, stop, step):
    """Begin to load array[start:stop:step]."""
    for i in range(start, stop, step):
        prefetch(array, i)


@compiled
def raise_all(keys, rows, n, best):
    """Raise best[q], int32[W], to the largest of keys[rows[t], q], t < n."""
    strips = len(best) // LANES
    for s in range(0, strips - 1, 2):
        raise_keys_two(keys, rows, n, s, best)
    if strips % 2:
        raise_keys(keys, rows, n, strips - 1, best)


@compiled
def interact(keys, centroid_best, threshold, codes, offsets, positions, start, stop, scores):
    """Score candidates start..stop-1 approximately: MaxSim over their tokens' centroids.

    Args:
      keys: from `score_centroids`.
      centroid_best: from `best_of_centroids`; not looked at where the threshold is LOWEST.
      threshold: a key; tokens whose centroid's best key is below it do not count.
      positions: int32[n], the candidates.
      scores: float32[n], filled.

    Returns:
      whether all codes are centroids; if not, scores are missing.
    """
    num_centroids, width = keys.shape
    best = np.empty(width, np.int32)
    values = best.view(np.float32)
    kept = np.empty(256, np.int32)
    for j in range(start, stop):
        token, end = offsets[positions[j]], offsets[positions[j] + 1]
        if j + 4 < stop:
            fetch(codes, offsets[positions[j + 4]], offsets[positions[j + 4] + 1], 16)
        for q in range(width):
            best[q] = LOWEST
        any_kept = False
        while token < end:
            n = 0
            block = codes[token : min(token + 256, end)]
            if largest(block) >= num_centroids:
                return False
            if threshold == LOWEST:
                n = len(block)
                raise_all(keys, block, n, best)
            else:
                for t in range(len(block)):
                    code = np.uint32(block[t])
                    kept[n] = block[t]
                    n += centroid_best[code] >= threshold
                raise_all(keys, kept, n, best)
            token += 256
            any_kept = any_kept or n > 0
        if not any_kept:
            scores[j] = PRUNED * np.float32(width)
            continue
        for q in range(width):
            best[q] = as_key(best[q])
        total = _ZERO
        for q in range(width):
            total += values[q]
        scores[j] = total
    return True


@compiled
def weighted_sum(weights, rows, out):
    """The sum of rows float32[n, F], each times its weight float32[n], to out float32[F]."""
    for f in range(len(out)):
        out[f] = _ZERO
    for i in range(len(rows)):
        weight, row = weights[i], rows[i]
        for f in range(len(out)):
            out[f] += weight * row[f]


@compiled
def predict(vectors, scales, units, positions, start, stop, scores):
    """Predict the scores of documents positions[start..stop-1] by their learned vectors.

    Args:
      vectors: int8[N, F]; scales: float32[N].
      units: float32[F], the query's vector, whole numbers: sums are exact in any order.
      positions: int32[n].
      scores: float32[n], filled.
    """
    for j in range(start, stop):
        row = vectors[positions[j]]
        total = _ZERO
        for f in range(len(units)):
            total += units[f] * np.float32(row[f])
        scores[j] = total * scales[positions[j]]


@compiled
def keep_best(positions, scores, count, n):
    """Move the n best of `count` candidates to the front, in their order.

    Of equal scores the smaller position is better.

    Returns:
      the number of candidates that are left.
    """
    if count <= n:
        return count
    least = np.partition(scores[:count], count - n)[count - n]
    room = n
    for j in range(count):
        room -= scores[j] > least
    kept = 0
    for j in range(count):
        if scores[j] > least or (scores[j] == least and room > 0):
            room -= scores[j] == least
            positions[kept] = positions[j]
            scores[kept] = scores[j]
            kept += 1
    return kept


@compiled
def decompress(centroids, table, weights, codes, residuals, tokens, words, scale):
    """Decompress n tokens, without normalising them.

    Args:
      weights: float32[16], see `fixed_tiles.unpack_floats4`; of length 0 to use the table.
      codes, residuals: of these tokens; all codes are centroids.
      table: [256, m], m words of memory that hold the 8 / b bucket weights of a residual byte.
      tokens: float32[rows, D], the first n rows are filled.
      words: [rows, P * m], the memory of `tokens` as such words.
      scale: float32[rows], the first n are filled: 1 / the length of each token embedding.
    """
    n, dim = len(codes), tokens.shape[1]
    per_byte = table.shape[1]
    # The constant first: without the instructions this branch must not be compiled.
    if IN_REGISTERS and len(weights) > 0:
        for t in range(n):
            code = np.int64(codes[t])
            if per_byte == 1:
                square = unpack_floats4(residuals[t], weights, centroids, code, tokens, t)
            elif per_byte == 2:
                square = unpack_floats2(residuals[t], weights, centroids, code, tokens, t)
            else:
                square = unpack_floats1(residuals[t], weights, centroids, code, tokens, t)
            scale[t] = np.float32(1) / max(np.sqrt(square), _TINY)
        return
    for t in range(n):
        packed = residuals[t]
        target = words[t]
        if per_byte == 1:
            for p in range(len(packed)):
                target[p] = table[packed[p], 0]
        else:
            for p in range(len(packed)):
                row = table[packed[p]]
                for m in range(per_byte):
                    target[p * per_byte + m] = row[m]
    # Not in the loop above: loads would wait for the smaller stores to the same memory.
    for t in range(n):
        centroid = centroids[np.uint32(codes[t])]
        values = tokens[t]
        square = _ZERO
        for d in range(dim):
            value = values[d] + centroid[d]
            values[d] = value
            square += value * value
        scale[t] = np.float32(1) / max(np.sqrt(square), _TINY)


@compiled
def score_exactly(
    centroids,
    table,
    weights,
    columns,
    bounds,
    codes,
    residuals,
    offsets,
    positions,
    start,
    stop,
    tokens,
    words,
    scores,
):
    """Score documents positions[start..stop-1] exactly: MaxSim on decompressed embeddings.

    Args:
      table, weights, words: see `decompress`.
      columns: float32[W / LANES, D, LANES], the rows of all queries, see `tiles.pack`.
      bounds: int64[B+1], query b has the columns bounds[b]..bounds[b+1]-1.
      tokens: float32[a multiple of ROWS, D], scratch memory.
      scores: float32[B, n], filled; -inf for a document without a token.

    Returns:
      whether all codes are centroids; if not, scores are missing.
    """
    best = np.empty(len(columns) * LANES, np.float32)
    scale = np.empty(len(tokens), np.float32)
    for j in range(start, stop):
        first, end = offsets[positions[j]], offsets[positions[j] + 1]
        if j + 2 < stop:
            fetch(codes, offsets[positions[j + 2]], offsets[positions[j + 2] + 1], 16)
        best[:] = -np.inf
        for base in range(first, end, len(tokens)):
            n = min(len(tokens), end - base)
            block = codes[base : base + n]
            if largest(block) >= len(centroids):
                return False
            if j + 1 < stop:
                begin = offsets[positions[j + 1]] + base - first
                fetch(residuals, begin, min(begin + n, offsets[positions[j + 1] + 1]), 1)
            decompress(
                centroids, table, weights, block, residuals[base : base + n], tokens, words, scale
            )
            update_best(tokens, scale, n, columns, best)
        for b in range(len(bounds) - 1):
            total = _ZERO
            for q in range(bounds[b], bounds[b + 1]):
                total += best[q]
            scores[b, j] = total
    return True


@compiled
def unpack_fixed(centroids, weights, nbits, codes, residuals, tokens, scale):
    """Decompress n tokens in fixed point, as `decompress` in floats; return the least square."""
    least = np.int32(2**31 - 1)
    for t in range(len(codes)):
        code = np.int64(codes[t])
        if nbits == 4:
            square = unpack4(residuals[t], weights, centroids, code, tokens, t)
        elif nbits == 2:
            square = unpack2(residuals[t], weights, centroids, code, tokens, t)
        else:
            square = unpack1(residuals[t], weights, centroids, code, tokens, t)
        least = min(least, square)
        scale[t] = np.float32(1) / np.sqrt(np.float32(max(square, np.int32(1))))
    return least


@compiled
def update_best_fixed(tokens, scale, n, columns, best):
    """Raise best[q] as `update_best` does, in fixed point."""
    paired = len(columns) - len(columns) % 2
    for first in range(0, n, ROWS):
        for s in range(0, paired, 2):
            best_of_two_fixed(tokens, first, n - 1, columns, s, scale, best)
        if paired < len(columns):
            best_of_tile_fixed(tokens, first, n - 1, columns, paired, scale, best)


@compiled
def score_fixed(
    centroids,
    weights,
    nbits,
    least,
    columns,
    bounds,
    units,
    codes,
    residuals,
    offsets,
    positions,
    start,
    stop,
    tokens,
    scores,
):
    """Score documents positions[start..stop-1] in fixed point, as `score_exactly` does in floats.

    Args:
      centroids, weights, nbits: see `fixed_point.FixedPoint`.
      least: int32, squares of a token embedding that may be scored so, in fixed point.
      columns: int16[W / LANES, D / 2, LANES, 2], see `fixed_tiles.pack_fixed`.
      bounds: int64[B+1], query b has the columns bounds[b]..bounds[b+1]-1.
      units: float32[B], see `fixed_point.fixed_query`.
      tokens: int16[a multiple of ROWS, D], scratch memory.
      scores: float32[B, n], filled; -inf for a document without a token, inf for one with a token
        that has to be scored in floats.

    Returns:
      whether all codes are centroids; if not, scores are missing.
    """
    best = np.empty(len(columns) * LANES, np.float32)
    scale = np.empty(len(tokens), np.float32)
    for j in range(start, stop):
        first, end = offsets[positions[j]], offsets[positions[j] + 1]
        if j + 2 < stop:
            fetch(codes, offsets[positions[j + 2]], offsets[positions[j + 2] + 1], 16)
        best[:] = -np.inf
        shortest = np.int32(2**31 - 1)
        for base in range(first, end, len(tokens)):
            n = min(len(tokens), end - base)
            block = codes[base : base + n]
            if largest(block) >= len(centroids):
                return False
            if j + 1 < stop:
                begin = offsets[positions[j + 1]] + base - first
                fetch(residuals, begin, min(begin + n, offsets[positions[j + 1] + 1]), 1)
            square = unpack_fixed(
                centroids, weights, nbits, block, residuals[base : base + n], tokens, scale
            )
            shortest = min(shortest, square)
            update_best_fixed(tokens, scale, n, columns, best)
        for b in range(len(bounds) - 1):
            total = _ZERO
            for q in range(bounds[b], bounds[b + 1]):
                total += best[q]
            scores[b, j] = total / units[b] if shortest >= least else np.float32(np.inf)
    return True


@compiled
def score_raw(values, columns, bounds, offsets, positions, start, stop, scores):
    """As `score_exactly`, for token embeddings float32[T, D] that are not compressed."""
    best = np.empty(len(columns) * LANES, np.float32)
    scale = np.ones(_RAW, np.float32)
    for j in range(start, stop):
        first, end = offsets[positions[j]], offsets[positions[j] + 1]
        best[:] = -np.inf
        for base in range(first, end, _RAW):
            block = values[base : min(base + _RAW, end)]
            update_best(block, scale, len(block), columns, best)
        for b in range(len(bounds) - 1):
            total = _ZERO
            for q in range(bounds[b], bounds[b + 1]):
                total += best[q]
            scores[b, j] = total
