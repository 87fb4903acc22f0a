"""Matrix products in registers, for loops compiled by numba: what LLVM does not find by itself.

A tile is ROWS rows times LANES columns. Its products stay in vector registers while the dimensions
go by, so a dimension costs one load of columns and, for each row, one multiply-add. A CPU with
narrower vectors takes several for LANES. All arrays are contiguous.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from colbert_jax.compression.compiled import FAST, compiled

LANES = 16
# Whether there are registers for the products with two strips of columns: 32 of 16 lanes. They
# share what is loaded of the rows. Else there are 16 of 8.
PAIRED = bool(binding.get_host_cpu_features().get("avx512f"))
ROWS = 8 if PAIRED else 4

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
        starts = [row_at(builder, x, number) for number in _chosen(builder, places, first)]
        for t, (product,) in enumerate(products(builder, starts, dim_of(builder, x), [y.data])):
            builder.store(product, _at(builder, target, t), align=4)
        return context.get_dummy_value()

    return types.void(rows, order, types.intp, columns, out), generate


def _finding(strips: int) -> Any:
    """Make `find_larger`, whose tile has this many times LANES columns."""

    @intrinsic
    def find_larger(
        typing: Any,
        rows: Any,
        order: Any,
        columns: Any,
        bias: Any,
        strip: Any,
        values: Any,
        numbers: Any,
    ) -> Any:
        """Where products of rows[order[:ROWS]] with columns, plus bias, are larger than the values
        known: take them and note the strip, in each lane by itself.

        Args:
          rows, order: see `multiply`.
          columns: float32[S, D, LANES], see `pack`; the tile's are in `strip` and after it.
          bias: float32[S, LANES].
          values, numbers: float32 and int32[ROWS, LANES], updated.
        """
        check_layout(rows, order, columns, bias, values, numbers)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, order, y, bias, strip, best, found = arrays_of(context, builder, signature, args)
            places = _following(builder, strip, strips)
            shifts = [_load(builder, _at(builder, bias, place)) for place in places]
            names = [in_every_lane(builder, builder.trunc(p, _INT32), _INTS) for p in places]
            numbers = _chosen(builder, order, _INT64(0))
            for t, row in enumerate(products(builder, *_begins(builder, x, numbers, y, places))):
                here, there = _at(builder, best, t), _at(builder, found, t, _INTS)
                known, before = _load(builder, here), _load(builder, there)
                for product, shift, name in zip(row, shifts, names, strict=True):
                    score = builder.fadd(product, shift, flags=_FLAGS)
                    larger = builder.fcmp_ordered(">", score, known, flags=_FLAGS)
                    known = builder.select(larger, score, known)
                    before = builder.select(larger, name, before)
                builder.store(known, here, align=4)
                builder.store(before, there, align=4)
            return context.get_dummy_value()

        return types.void(rows, order, columns, bias, types.intp, values, numbers), generate

    return find_larger


def tile(multiply: Any, strips: int, finish: Any) -> Any:
    """Make what multiplies a tile of ROWS rows and this many times LANES columns, then finishes it.

    Args:
      multiply: `products`, or what does the same for other numbers.
      finish: `raise_best` or `fill_keys`; generates what is done with the products.
    """

    @intrinsic
    def of_rows(
        typing: Any,
        rows: Any,
        first: Any,
        last: Any,
        columns: Any,
        strip: Any,
        other: Any,
        best: Any,
    ) -> Any:
        """Multiply a tile.

        Args:
          rows: [n, D]; the tile's are `first` and those after it, none after `last`.
          columns: [W / LANES, D, LANES], see `pack`; the tile's are in `strip` and after it.
          other, best: see `finish`.
        """
        check_layout(rows, columns, other, best)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, first, last, y, strip, other, best = arrays_of(context, builder, signature, args)
            numbers, places = _tile(builder, first, last), _following(builder, strip, strips)
            found = multiply(builder, *_begins(builder, x, numbers, y, places))
            finish(builder, numbers, places, found, other, best)
            return context.get_dummy_value()

        of = types.void(rows, types.intp, types.intp, columns, types.intp, other, best)
        return of, generate

    return of_rows


def raise_best(
    builder: Any, numbers: list[Any], places: list[Any], found: list[Any], scale: Any, best: Any
) -> None:
    """Raise best[q], float32[W], to the largest column q . rows[t] * scale[t], float32[n]."""
    scores: list[list[Any]] = [[] for _ in places]
    for number, some in zip(numbers, found, strict=True):
        factor = builder.load(builder.gep(scale.data, [number]))
        factor = in_every_lane(builder, factor, _FLOATS)
        for row, product in zip(scores, some, strict=True):
            row.append(builder.fmul(product, factor, flags=_FLAGS))
    for place, row in zip(places, scores, strict=True):
        target = _at(builder, best, place)
        while len(row) > 1:
            row = [_larger(builder, *row[i : i + 2]) for i in range(0, len(row), 2)]
        builder.store(_larger(builder, row[0], _load(builder, target)), target, align=4)


def fill_keys(
    builder: Any, numbers: list[Any], places: list[Any], found: list[Any], keys: Any, best: Any
) -> None:
    """Fill keys[t, q], int32[n, W], with column q . rows[t], see `cpu_kernels.as_key`.

    best: int32[W], raised to the largest.
    """
    sign, others = ir.Constant(_INTS, [31] * LANES), ir.Constant(_INTS, [2**31 - 1] * LANES)
    bests = [_at(builder, best, place, _INTS) for place in places]
    most = [_load(builder, target) for target in bests]
    for number, some in zip(numbers, found, strict=True):
        row = builder.bitcast(row_at(builder, keys, number), _INTS.as_pointer())
        for s, (place, product) in enumerate(zip(places, some, strict=True)):
            bits = builder.bitcast(product, _INTS)
            key = builder.xor(bits, builder.and_(builder.ashr(bits, sign), others))
            builder.store(key, builder.gep(row, [place]), align=4)
            most[s] = _larger_key(builder, key, most[s])
    for target, key in zip(bests, most, strict=True):
        builder.store(key, target, align=4)


def _raising_keys(strips: int) -> Any:
    """Make `raise_keys`, for this many times LANES lanes."""

    @intrinsic
    def raise_keys(typing: Any, keys: Any, rows: Any, count: Any, strip: Any, best: Any) -> Any:
        """Raise best[q] to the largest keys[rows[t], q], t < count.

        Args:
          keys: int32[n, W]; the lanes are those of `strip` and after it.
          rows: int32 or uint32[at least count].
          best: int32[W].
        """
        check_layout(keys, rows, best)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, order, count, strip, known = arrays_of(context, builder, signature, args)
            places = _following(builder, strip, strips)
            targets = [_at(builder, known, place, _INTS) for place in places]

            def row(t: Any, best: list[Any]) -> list[Any]:
                number = builder.zext(builder.load(builder.gep(order.data, [t])), _INT64)
                start = builder.bitcast(row_at(builder, x, number), _INTS.as_pointer())
                found = [_load(builder, builder.gep(start, [place])) for place in places]
                return [_larger_key(builder, *pair) for pair in zip(found, best, strict=True)]

            begins = [_load(builder, target) for target in targets]
            for target, best in zip(targets, loop(builder, count, begins, row), strict=True):
                builder.store(best, target, align=4)
            return context.get_dummy_value()

        return types.void(keys, rows, types.intp, types.intp, best), generate

    return raise_keys


@intrinsic
def prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Begin to load the cache line that array[i] begins in; `array` has any number of axes."""
    check_layout(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, i = arrays_of(context, builder, signature, args)
        pointer = builder.bitcast(row_at(builder, x, i), _INT8.as_pointer())
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


def _chosen(builder: Any, order: Any, first: Any) -> list[Any]:
    """The numbers order[first : first + ROWS]."""
    places = (builder.gep(order.data, [builder.add(first, _INT64(t))]) for t in range(ROWS))
    return [builder.sext(builder.load(place), _INT64) for place in places]


def _following(builder: Any, first: Any, count: int) -> list[Any]:
    return [builder.add(first, _INT64(i)) for i in range(count)]


def _begins(
    builder: Any, rows: Any, numbers: list[Any], columns: Any, strips: list[Any]
) -> tuple[list[Any], Any, list[Any]]:
    """Where these rows begin, their dimensions, and where these strips begin."""
    starts = [row_at(builder, rows, number) for number in numbers]
    return starts, dim_of(builder, rows), [row_at(builder, columns, strip) for strip in strips]


def products(builder: Any, rows: list[Any], dim: Any, strips: list[Any]) -> list[list[Any]]:
    """The loop over dimensions.

    Args:
      rows: where each begins.
      strips: where LANES columns begin, each.

    Returns:
      for each row, a vector of products with each strip.
    """
    columns = [builder.bitcast(strip, _FLOATS.as_pointer()) for strip in strips]

    def dimension(d: Any, sums: list[Any]) -> list[Any]:
        loaded = [_load(builder, builder.gep(column, [d])) for column in columns]
        values = [builder.load(builder.gep(row, [d])) for row in rows]
        values = [in_every_lane(builder, value, _FLOATS) for value in values]
        more = []
        for known, (value, column) in zip(sums, itertools.product(values, loaded), strict=True):
            product = builder.fmul(value, column, flags=_FLAGS)
            more.append(builder.fadd(known, product, flags=_FLAGS))
        return more

    zeros = [ir.Constant(_FLOATS, [0.0] * LANES)] * (len(rows) * len(strips))
    totals = loop(builder, dim, zeros, dimension)
    return [totals[i : i + len(strips)] for i in range(0, len(totals), len(strips))]


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


def dim_of(builder: Any, rows: Any) -> Any:
    """The D of an array [n, D]."""
    return cgutils.unpack_tuple(builder, rows.shape)[1]


def row_at(builder: Any, array: Any, i: Any) -> Any:
    """Where array[i] begins, of any number of axes."""
    for size in cgutils.unpack_tuple(builder, array.shape)[1:]:
        i = builder.mul(i, size)
    return builder.gep(array.data, [i])


def _tile(builder: Any, first: Any, last: Any) -> list[Any]:
    """The numbers of a tile's rows; beyond the last, the last again."""
    return [
        builder.select(builder.icmp_signed("<", number, last), number, last)
        for number in _following(builder, first, ROWS)
    ]


def _larger_key(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.icmp_signed(">", one, other), one, other)


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other, flags=_FLAGS), one, other)


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


best_of_tile, best_of_two = (tile(products, strips, raise_best) for strips in (1, 2))
keys_of_tile, keys_of_two = (tile(products, strips, fill_keys) for strips in (1, 2))
find_larger, find_larger_two = _finding(1), _finding(2)
raise_keys, raise_keys_two = _raising_keys(1), _raising_keys(2)


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
