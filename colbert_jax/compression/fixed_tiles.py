"""Tiles in fixed point, for loops compiled by numba: products and decompression with AVX-512.

As `tiles`, with whole numbers of 16 bits; see `fixed_point`. All arrays are contiguous.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from colbert_jax.compression.compiled import compiled
from colbert_jax.compression.fixed_point import CHUNK
from colbert_jax.compression.tiles import LANES, ROWS, arrays_of, check_layout, in_every_lane, loop

_BYTES = ir.VectorType(ir.IntType(8), CHUNK)
_SHORTS = ir.VectorType(ir.IntType(16), CHUNK)
_SQUARES = ir.VectorType(ir.IntType(32), CHUNK // 2)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * LANES)
_SUMS = ir.VectorType(ir.IntType(32), LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


@compiled
def pack_fixed(rows, first, unit, fields, columns):
    """Lay out the rows of a query as columns for `multiply_fixed`, as `tiles.pack` does in floats.

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


def _unpack(nbits: int) -> Any:
    fields = 8 // nbits

    @intrinsic
    def unpack(
        typing: Any, packed: Any, weights: Any, centroids: Any, code: Any, tokens: Any, t: Any
    ) -> Any:
        """Decompress a token embedding, not normalised: tokens[t] = centroids[code] + weights.

        Args:
          packed: uint8[P], P a multiple of CHUNK.
          weights, centroids: see `FixedPoint`.
          code, t: int64.
          tokens: int16[n, D], one row is filled.

        Returns:
          int32, the sum of squares.
        """
        check_layout(packed, weights, centroids, tokens)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, table, rows, code, target, t = arrays_of(context, builder, signature, args)
            dim = cgutils.unpack_tuple(builder, target.shape)[1]
            size = cgutils.unpack_tuple(builder, source.shape)[0]
            look_up = builder.module.declare_intrinsic(
                "llvm.x86.avx512.permvar.hi.256", (), ir.FunctionType(_SHORTS, [_SHORTS] * 2)
            )
            square = builder.module.declare_intrinsic(
                "llvm.x86.avx2.pmadd.wd", (), ir.FunctionType(_SQUARES, [_SHORTS] * 2)
            )
            known = builder.load(_vectors(builder, table.data, _SHORTS), align=2)
            centroid = _vectors(builder, builder.gep(rows.data, [builder.mul(code, dim)]), _SHORTS)
            out = _vectors(builder, builder.gep(target.data, [builder.mul(t, dim)]), _SHORTS)
            chunks = _vectors(builder, source.data, _BYTES)
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

            (sums,) = loop(
                builder, builder.udiv(size, _INT64(CHUNK)), [ir.Constant(_SQUARES, None)], chunk
            )
            parts = [builder.extract_element(sums, _INT32(i)) for i in range(_SQUARES.count)]
            return functools.reduce(builder.add, parts)

        of = types.int32(packed, weights, centroids, types.intp, tokens, types.intp)
        return of, generate

    return unpack


unpack1, unpack2, unpack4 = _unpack(1), _unpack(2), _unpack(4)


@intrinsic
def multiply_fixed(typing: Any, rows: Any, first: Any, columns: Any, out: Any) -> Any:
    """Multiply rows[first : first + ROWS] with LANES columns; as `tiles.multiply`.

    Args:
      rows: int16[n, D].
      columns: int16[D / 2, LANES, 2], see `fixed_columns`.
      out: int32[ROWS, LANES], filled.
    """
    check_layout(rows, columns, out)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, first, y, target = arrays_of(context, builder, signature, args)
        dim = cgutils.unpack_tuple(builder, x.shape)[1]
        multiply = builder.module.declare_intrinsic(
            "llvm.x86.avx512.pmaddw.d.512", (), ir.FunctionType(_SUMS, [_PAIRS] * 2)
        )
        starts = []
        for t in range(ROWS):
            row = builder.mul(builder.add(first, _INT64(t)), dim)
            starts.append(_vectors(builder, builder.gep(x.data, [row]), _INT32))
        strip = _vectors(builder, y.data, _PAIRS)

        def pair(d: Any, sums: list[Any]) -> list[Any]:
            column = builder.load(builder.gep(strip, [d]), align=2)
            more = []
            for start, known in zip(starts, sums, strict=True):
                value = builder.load(builder.gep(start, [d]), align=2)
                value = in_every_lane(builder, value, _SUMS)
                product = builder.call(multiply, [builder.bitcast(value, _PAIRS), column])
                more.append(builder.add(known, product))
            return more

        totals = loop(
            builder, builder.lshr(dim, _INT64(1)), [ir.Constant(_SUMS, None)] * ROWS, pair
        )
        out = _vectors(builder, target.data, _SUMS)
        for t, total in enumerate(totals):
            builder.store(total, builder.gep(out, [_INT64(t)]), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.intp, columns, out), generate


def _vectors(builder: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(place, kind.as_pointer())
