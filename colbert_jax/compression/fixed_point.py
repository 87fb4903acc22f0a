"""Compressed tokens in fixed point, numbers of 16 bits: a CPU with AVX-512 decompresses and
multiplies them at more than one and a half times the rate of floats.

A score in fixed point is off by no more than `fixed_query` says. So it tells which documents can be
among the best, and only these need a score in floats: no result changes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

CHUNK = 16  # bytes of a residual that are unpacked at a time
SHORTEST = 0.5  # of a token embedding before normalisation; a shorter one is left to floats
_LARGEST = 32766.0  # an int16, with room for rounding
_LARGEST_NORM = 46340.0  # the root of 2^31: no sum of squares or products leaves int32


class FixedPoint(NamedTuple):
    """What fixed point needs of a compressed index.

    centroids: int16[K, D], times `scale`; dimensions in the order of `order_of`.
    weights: int16[16], the bucket weight of each value of a residual's field, times `scale`.
    scale: what 1 is.
    nbits: bits of a field: 1, 2 or 4.
    """

    centroids: np.ndarray
    weights: np.ndarray
    scale: float
    nbits: int


@functools.cache
def is_fast() -> bool:
    """Whether numba compiles for a CPU with the instructions of `fixed_tiles`."""
    from numba.core.registry import cpu_target

    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {"+avx512f", "+avx512bw", "+avx512vl"} <= set(features)


def fixed_point(centroids: np.ndarray, table: np.ndarray) -> FixedPoint | None:
    """Prepare an index.

    Args:
      centroids: float32[K, D].
      table: float32[256, 8 / b], the bucket weights for each value of a residual byte.

    Returns:
      None for what `fixed_tiles` can't do: 8 bits, residuals not made of chunks of 16 bytes,
      numbers that are not finite.
    """
    (_, dim), nbits = centroids.shape, 8 // table.shape[1]
    if nbits == 8 or dim * nbits % (8 * CHUNK) or not len(centroids):
        return None
    weights = weights_of_fields(table)
    heaviest = float(np.abs(weights).max())
    norm = math.sqrt(float(np.einsum("kd,kd->k", centroids, centroids).max()))
    norm += math.sqrt(dim) * heaviest
    if not 0 < norm < math.inf:
        return None
    largest = heaviest + float(max(centroids.max(), -centroids.min()))
    scale = _unit(norm, largest)
    rounded = np.rint(centroids * np.float32(scale)).astype(np.int16)
    return FixedPoint(
        np.ascontiguousarray(rounded[:, order_of(dim, nbits)]),
        np.rint(weights * scale).astype(np.int16),
        scale,
        nbits,
    )


def weights_of_fields(table: np.ndarray) -> np.ndarray:
    """float32[16]: of each value of a field at up to 4 bits; `table` as for `fixed_point`."""
    nbits = 8 // table.shape[1]
    return np.resize(table[np.arange(1 << nbits) << (8 - nbits), 0], 16)


def order_of(dim: int, nbits: int) -> np.ndarray:
    """Return the order in which bytes are unpacked: of each chunk the first fields first.

    int64[D].
    """
    return np.arange(dim).reshape(-1, CHUNK, 8 // nbits).swapaxes(1, 2).ravel()


class FixedQuery(NamedTuple):
    """Of a query: `unit`, what 1 is, and `error`, how far MaxSim in fixed point can be off."""

    unit: float
    error: float


def fixed_query(fixed: FixedPoint, rows: np.ndarray) -> FixedQuery:
    """Choose a unit for the rows float32[n, D] of a query, and bound the errors of scores.

    A value v of a token embedding becomes v + e, |e| at most 1 / scale (a centroid's rounding and a
    weight's), a query's value q + f, |f| at most 0.5 / unit. With |v + e| >= SHORTEST the unit
    vectors of v and v + e differ by at most 2 |e| / SHORTEST. Scores in floats are off by rounding.
    """
    norms = np.sqrt(np.einsum("qd,qd->q", rows, rows))
    longest = float(norms.max(initial=0.0))
    if longest == 0:
        return FixedQuery(1.0, 0.0)
    largest = max(float(rows.max()), -float(rows.min()))
    unit = _unit(longest, largest)
    root = math.sqrt(rows.shape[1])
    document = 2 * root / (SHORTEST * fixed.scale) + 1e-5
    return FixedQuery(unit, float(norms.sum()) * document + len(rows) * 0.5 * root / unit)


def _unit(norm: float, largest: float) -> float:
    """What 1 can be where no vector is longer than `norm` and no value larger than `largest`."""
    return min(_LARGEST_NORM / norm, _LARGEST / largest) * 0.999
