"""Matrix products in registers, for loops compiled by numba: what LLVM does not find by itself.

A tile is ROWS rows times LANES columns. Its products stay in vector registers while the dimensions
go by, so a dimension costs one load of columns and, for each row, one multiply-add. A CPU with
narrower vectors takes several for LANES. All arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from colbert_jax.compression.compiled import FAST, compiled

LANES = 16
# As many as there are registers for: 32 of 16 lanes, or 16 of 8.
ROWS = 8 if binding.get_host_cpu_features().get("avx512f") else 4

_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT32, LANES)
_FLAGS = tuple(sorted(FAST))


@intrinsic
def multiply(typing: Any, rows: Any, order: Any, first: Any, columns: Any, out: Any) -> Any:
    """Multiply rows[order[first : first + ROWS]] with LANES columns.

    Args:
      rows: float32[n, D].
      order: int32[at least first + ROWS].
      columns: float32[D, LANES]; see `pack`.
      out: float32[ROWS, LANES], filled.
    """
    check_layout(rows, order, columns, out)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, places, first, y, target = arrays_of(context, builder, signature, args)
        for t, product in enumerate(_products(builder, x, places, first, y)):
            builder.store(product, _at(builder, target, t), align=4)
        return context.get_dummy_value()

    return types.void(rows, order, types.intp, columns, out), generate


@intrinsic
def find_larger(
    typing: Any,
    rows: Any,
    order: Any,
    columns: Any,
    bias: Any,
    number: Any,
    values: Any,
    numbers: Any,
) -> Any:
    """Where products of rows[order[:ROWS]] with columns, plus bias, are larger than the values
    known: take them and note a number, in each lane by itself.

    Args:
      rows, order, columns: see `multiply`.
      bias: float32[LANES].
      number: int32.
      values, numbers: float32 and int32[ROWS, LANES], updated.
    """
    check_layout(rows, order, columns, bias, values, numbers)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, places, y, shift, number, best, found = arrays_of(context, builder, signature, args)
        shift, number = (
            _load(builder, _at(builder, shift, 0)),
            in_every_lane(builder, number, _INTS),
        )
        for t, product in enumerate(_products(builder, x, places, _INT64(0), y)):
            score = builder.fadd(product, shift, flags=_FLAGS)
            here, there = _at(builder, best, t), _at(builder, found, t, _INTS)
            known, before = _load(builder, here), _load(builder, there)
            larger = builder.fcmp_ordered(">", score, known, flags=_FLAGS)
            builder.store(builder.select(larger, score, known), here, align=4)
            builder.store(builder.select(larger, number, before), there, align=4)
        return context.get_dummy_value()

    signature = types.void(rows, order, columns, bias, types.int32, values, numbers)
    return signature, generate


@intrinsic
def prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Begin to load the cache line that array[i] begins in; `array` has any number of axes."""
    check_layout(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, i = arrays_of(context, builder, signature, args)
        for size in cgutils.unpack_tuple(builder, x.shape)[1:]:
            i = builder.mul(i, size)
        pointer = builder.bitcast(builder.gep(x.data, [i]), _INT8.as_pointer())
        kinds = [_INT8.as_pointer(), _INT32, _INT32, _INT32]
        begin = builder.module.declare_intrinsic(
            "llvm.prefetch", [kinds[0]], ir.FunctionType(ir.VoidType(), kinds)
        )
        builder.call(begin, [pointer, _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def check_layout(*arrays: Any) -> None:
    """Refuse to compile for arrays that are not contiguous."""
    if {array.layout for array in arrays} != {"C"}:
        raise TypingError("tiles are made of contiguous arrays")


def arrays_of(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Return the arguments of a call, arrays as structures with their data and shape."""
    return [
        context.make_array(kind)(context, builder, value)
        if isinstance(kind, types.Array)
        else value
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _products(builder: Any, rows: Any, order: Any, first: Any, columns: Any) -> list[Any]:
    """ROWS vectors of products; the loop over dimensions."""
    dim = cgutils.unpack_tuple(builder, rows.shape)[1]
    starts = []
    for t in range(ROWS):
        place = builder.gep(order.data, [builder.add(first, _INT64(t))])
        row = builder.sext(builder.load(place), _INT64)
        starts.append(builder.gep(rows.data, [builder.mul(row, dim)]))

    def dimension(d: Any, sums: list[Any]) -> list[Any]:
        column = _load(builder, _at(builder, columns, d))
        more = []
        for start, known in zip(starts, sums, strict=True):
            value = in_every_lane(builder, builder.load(builder.gep(start, [d])), _FLOATS)
            product = builder.fmul(value, column, flags=_FLAGS)
            more.append(builder.fadd(known, product, flags=_FLAGS))
        return more

    return loop(builder, dim, [ir.Constant(_FLOATS, [0.0] * LANES)] * ROWS, dimension)


def loop(builder: Any, count: Any, begins: list[Any], body: Any) -> list[Any]:
    """Generate a loop, body(i, sums) -> sums for i in 0..count-1, from `begins` on.

    Returns:
      the last sums.
    """
    before = builder.block
    again, after = builder.append_basic_block("loop"), builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", count, _INT64(0)), again, after)

    builder.position_at_end(again)
    i, sums = builder.phi(_INT64), [builder.phi(begin.type) for begin in begins]
    more = body(i, sums)
    following = builder.add(i, _INT64(1))
    for phi, begin, end in zip([i, *sums], [_INT64(0), *begins], [following, *more], strict=True):
        phi.add_incoming(begin, before)
        phi.add_incoming(end, again)
    builder.cbranch(builder.icmp_signed("<", following, count), again, after)

    builder.position_at_end(after)
    totals = [builder.phi(begin.type) for begin in begins]
    for total, begin, end in zip(totals, begins, more, strict=True):
        total.add_incoming(begin, before)
        total.add_incoming(end, again)
    return totals


def _at(builder: Any, array: Any, row: Any, kind: Any = None) -> Any:
    """Where a row of LANES numbers is."""
    row = row if isinstance(row, ir.Value) else _INT64(row)
    place = builder.gep(array.data, [builder.mul(row, _INT64(LANES))])
    return builder.bitcast(place, (kind or _FLOATS).as_pointer())


def _load(builder: Any, place: Any) -> Any:
    return builder.load(place, align=4)


def in_every_lane(builder: Any, value: Any, kind: Any) -> Any:
    """Return a vector with a number in every lane."""
    empty = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(empty, value, _INT32(0))
    return builder.shuffle_vector(single, empty, ir.Constant(_INTS, [0] * LANES))


@compiled
def pack(rows, order, columns):
    """Lay out rows as the columns of tiles.

    Args:
      rows: float32[n, D].
      order: int32[m], which rows.
      columns: float32[at least m / LANES, D, LANES], filled; zeros behind the last row.
    """
    for s in range((len(order) + LANES - 1) // LANES):
        strip = columns[s]
        for lane in range(LANES):
            if s * LANES + lane < len(order):
                row = rows[order[s * LANES + lane]]
                for d in range(len(row)):
                    strip[d, lane] = row[d]
            else:
                for d in range(len(strip)):
                    strip[d, lane] = 0


def packed(rows: np.ndarray) -> np.ndarray:
    """float32[ceil(n / LANES), D, LANES], all rows float32[n, D] as the columns of tiles."""
    columns = np.empty((-(-len(rows) // LANES), rows.shape[1], LANES), np.float32)
    pack(rows, np.arange(len(rows)).astype(np.int32), columns)
    return columns
