"""Tiles in fixed point, for loops compiled by numba: products and decompression with AVX-512.

As `tiles`, with whole numbers of 16 bits; see `fixed_point`. All arrays are contiguous.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from colbert_jax.compression.compiled import FAST, compiled
from colbert_jax.compression.fixed_point import CHUNK
from colbert_jax.compression.tiles import (
    LANES,
    arrays_of,
    check_layout,
    in_every_lane,
    loop,
    raise_best,
    row_at,
    tile,
)

_BYTES = ir.VectorType(ir.IntType(8), CHUNK)
_SHORTS = ir.VectorType(ir.IntType(16), CHUNK)
_SQUARES = ir.VectorType(ir.IntType(32), CHUNK // 2)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * LANES)
_SUMS = ir.VectorType(ir.IntType(32), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_FLAGS = tuple(sorted(FAST))


@compiled
def pack_fixed(rows, first, unit, fields, columns):
    """Lay out the rows of a query as columns for `best_of_tile_fixed`, as `tiles.pack` does.

    Args:
      rows: float32[n, D].
      first: the column of the first row.
      unit: float32, what 1 is.
      fields: of a residual byte, 8 / b.
      columns: int16[at least (first + n) / LANES, D / 2, LANES, 2], filled where these rows are.
    """
    for q in range(len(rows)):
        row, strip = rows[q], columns[(first + q) // LANES]
        lane = (first + q) % LANES
        place = 0  # as in `order_of`
        for chunk in range(0, len(row), CHUNK * fields):
            for field in range(fields):
                for i in range(CHUNK):
                    value = row[chunk + i * fields + field] * unit
                    strip[place // 2, lane, place % 2] = np.int16(np.rint(value))
                    place += 1


def _unpacking(kind: Any, returned: Any, body: Any) -> Any:
    """Make what decompresses a token embedding; see `_in_shorts` and `_in_floats`, bodies."""

    @intrinsic
    def unpack(
        typing: Any, packed: Any, weights: Any, centroids: Any, code: Any, tokens: Any, t: Any
    ) -> Any:
        """Decompress a token embedding, not normalised: tokens[t] = centroids[code] + weights.

        Args:
          packed: uint8[D * b / 8].
          weights: [16], the bucket weight of each value of a residual's field.
          centroids: [K, D].
          code, t: int64.
          tokens: [n, D], one row is filled.

        Returns:
          the sum of squares.
        """
        check_layout(packed, weights, centroids, tokens)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, table, rows, code, target, t = arrays_of(context, builder, signature, args)
            (size,) = cgutils.unpack_tuple(builder, source.shape)
            known = builder.load(_vectors(builder, table.data, kind), align=2)
            centroid = _vectors(builder, row_at(builder, rows, code), kind)
            out = _vectors(builder, row_at(builder, target, t), kind)
            return body(builder, source.data, size, known, centroid, out)

        of = returned(packed, weights, centroids, types.intp, tokens, types.intp)
        return of, generate

    return unpack


def _in_shorts(
    nbits: int, builder: Any, packed: Any, size: Any, known: Any, centroid: Any, out: Any
) -> Any:
    """In fixed point, see `FixedPoint`; `size` is a multiple of CHUNK."""
    fields = 8 // nbits
    look_up = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.hi.256", (), ir.FunctionType(_SHORTS, [_SHORTS] * 2)
    )
    square = builder.module.declare_intrinsic(
        "llvm.x86.avx2.pmadd.wd", (), ir.FunctionType(_SQUARES, [_SHORTS] * 2)
    )
    chunks = _vectors(builder, packed, _BYTES)
    mask = ir.Constant(_SHORTS, [(1 << nbits) - 1] * CHUNK)

    def chunk(c: Any, sums: list[Any]) -> list[Any]:
        wide = builder.zext(builder.load(builder.gep(chunks, [c]), align=1), _SHORTS)
        for field in range(fields):
            shift = ir.Constant(_SHORTS, [8 - nbits * (field + 1)] * CHUNK)
            number = builder.and_(builder.lshr(wide, shift), mask)
            place = builder.add(builder.mul(c, _INT64(fields)), _INT64(field))
            value = builder.load(builder.gep(centroid, [place]), align=2)
            value = builder.add(value, builder.call(look_up, [known, number]))
            builder.store(value, builder.gep(out, [place]), align=2)
            sums = [builder.add(sums[0], builder.call(square, [value, value]))]
        return sums

    count = builder.udiv(size, _INT64(CHUNK))
    (sums,) = loop(builder, count, [ir.Constant(_SQUARES, None)], chunk)
    parts = [builder.extract_element(sums, _INT32(i)) for i in range(_SQUARES.count)]
    return functools.reduce(builder.add, parts)


def _in_floats(
    nbits: int, builder: Any, packed: Any, size: Any, known: Any, centroid: Any, out: Any
) -> Any:
    """With dimensions in their own order; D is a multiple of LANES."""
    fields, per_word = 8 // nbits, 32 // nbits
    look_up = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.sf.512", (), ir.FunctionType(_FLOATS, [_FLOATS, _SUMS])
    )
    # The bytes of LANES dimensions: two words of 32 bits, one, or half of one.
    words = max(LANES // per_word, 1)
    chunks = _vectors(builder, packed, ir.VectorType(ir.IntType(min(LANES * nbits, 32)), words))
    spread = ir.Constant(_SUMS, [lane // per_word for lane in range(LANES)])
    places = [lane % per_word for lane in range(LANES)]
    down = [i // fields * 8 + 8 - nbits * (i % fields + 1) for i in places]
    mask = ir.Constant(_SUMS, [(1 << nbits) - 1] * LANES)

    def chunk(c: Any, sums: list[Any]) -> list[Any]:
        loaded = builder.load(builder.gep(chunks, [c]), align=1)
        wide = loaded if nbits > 1 else builder.zext(loaded, ir.VectorType(_INT32, words))
        wide = builder.shuffle_vector(wide, ir.Constant(wide.type, ir.Undefined), spread)
        number = builder.and_(builder.lshr(wide, ir.Constant(_SUMS, down)), mask)
        value = builder.load(builder.gep(centroid, [c]), align=4)
        value = builder.fadd(value, builder.call(look_up, [known, number]))
        builder.store(value, builder.gep(out, [c]), align=4)
        square = builder.fmul(value, value, flags=_FLAGS)
        return [builder.fadd(sums[0], square, flags=_FLAGS)]

    count = builder.udiv(size, _INT64(LANES * nbits // 8))
    (sums,) = loop(builder, count, [ir.Constant(_FLOATS, None)], chunk)
    add = builder.module.declare_intrinsic(
        "llvm.vector.reduce.fadd.v16f32",
        (),
        ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS]),
    )
    return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), sums], fastmath=_FLAGS)


unpack1, unpack2, unpack4 = (
    _unpacking(_SHORTS, types.int32, functools.partial(_in_shorts, nbits)) for nbits in (1, 2, 4)
)
unpack_floats1, unpack_floats2, unpack_floats4 = (
    _unpacking(_FLOATS, types.float32, functools.partial(_in_floats, nbits)) for nbits in (1, 2, 4)
)


def _products(builder: Any, rows: list[Any], dim: Any, strips: list[Any]) -> list[list[Any]]:
    """As `tiles.products`, of rows int16[D] and strips int16[D / 2, LANES, 2]."""
    multiply = builder.module.declare_intrinsic(
        "llvm.x86.avx512.pmaddw.d.512", (), ir.FunctionType(_SUMS, [_PAIRS] * 2)
    )
    starts = [_vectors(builder, row, _INT32) for row in rows]
    columns = [_vectors(builder, strip, _PAIRS) for strip in strips]

    def pair(d: Any, sums: list[Any]) -> list[Any]:
        loaded = [builder.load(builder.gep(column, [d]), align=2) for column in columns]
        values = [builder.load(builder.gep(start, [d]), align=2) for start in starts]
        values = [in_every_lane(builder, value, _SUMS) for value in values]
        more = []
        for known, (value, column) in zip(sums, itertools.product(values, loaded), strict=True):
            product = builder.call(multiply, [builder.bitcast(value, _PAIRS), column])
            more.append(builder.add(known, product))
        return more

    zeros = [ir.Constant(_SUMS, None)] * (len(rows) * len(strips))
    totals = loop(builder, builder.lshr(dim, _INT64(1)), zeros, pair)
    floats = [builder.sitofp(total, _FLOATS) for total in totals]
    return [floats[i : i + len(strips)] for i in range(0, len(floats), len(strips))]


best_of_tile_fixed, best_of_two_fixed = (tile(_products, n, raise_best) for n in (1, 2))


def _vectors(builder: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(place, kind.as_pointer())
