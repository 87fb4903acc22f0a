"""The fused kernel of `residual.token_maxima` for Hopper GPUs (Pallas, Mosaic GPU).

A block of threads takes 64 token rows at a time, two segments of 32: it selects the bucket weights
by the packed bytes into shared memory, multiplies them with the query on the tensor cores, and
keeps the best of each segment. XLA's form writes the unpacked weights of all tokens to memory in
between.

Tensor cores multiply bfloat16. A float32 is the sum of three of them, exactly, and the six largest
of the nine products make a float32 product but for 2^-20 of it at most.

Simulated by the tests and compiled by `make gpu-aot`; never run on a GPU so far. The simulation
multiplies and adds as numpy does, copies at once, and knows nothing of fences, layouts and bank
conflicts: how a tensor core adds, and that the next tile's copy does not overtake the reads of the
last, it cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_TILE = 64  # token rows of one product: what a warpgroup multiplies
_SEGMENT = 32  # token rows of one maximum, which `search.plaid` scores at a time
_COLUMNS = 16  # dimensions of one product
_LINE = 32  # float32 of 128 bytes: jax 0.12 stores nothing less to global memory
_MOST_ROWS = 64  # query rows of a block of threads: their three parts lie in shared memory
_MOST_TILES = 8  # that a block of threads takes in turn, for one copy of the query
# Parts of queries and weights, the largest first, and which are multiplied.
_PARTS = 3
_PRODUCTS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))


def token_maxima(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Take the best score of each document's tokens for each query row, on a GPU.

    Args:
      queries, similarity, residuals, scale, weights: as for `residual.token_maxima`.
      interpret: `InterpretGPUParams` of Pallas, to run without a GPU, for tests.

    Returns:
      float32[B, n, Lq].
    """
    batch, lq, _ = queries.shape
    _, n, length, packed = residuals.shape
    slots = 8 // (len(weights).bit_length() - 1)
    # Documents of PLAID come in twos, of 32 tokens, and queries often have 32 rows: no copy then.
    rows = min(_up(lq, _LINE), _MOST_ROWS)
    lq_room, width, room = _up(lq, rows), _up(packed, _COLUMNS), _up(length, _SEGMENT)
    documents = _up(n, max(_TILE // room, 1)) if _TILE % room == 0 else _up(n, 2)
    tokens = documents * room
    extra = (0, documents - n), (0, room - length)
    similarity = jnp.pad(similarity, [(0, 0), *extra, (0, lq_room - lq)])
    residuals = jnp.pad(residuals, [(0, 0), *extra, (0, width - packed)])
    scale = jnp.pad(scale, [(0, 0), *extra])
    operands = (
        weights,
        query_parts(jnp.pad(queries, [(0, 0), (0, lq_room - lq), (0, 0)]), slots, rows),
        similarity.reshape(batch, tokens, lq_room),
        residuals.reshape(batch, tokens, width),
        scale.reshape(batch, tokens),
    )
    tiles = tokens // _TILE
    each = next(count for count in range(_MOST_TILES, 0, -1) if tiles % count == 0)
    chunks = slots * width // _COLUMNS
    # Under shard_map the result differs between devices wherever an operand does.
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    result = jax.ShapeDtypeStruct(
        (batch, tokens // _SEGMENT, lq_room),
        jnp.float32,
        manual_axis_type=jax.sharding.ManualAxisType(varying=varying),
    )

    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory in tiles of 8 by 32 bytes, which threads read without waiting."""
        tile = plgpu.TilingTransform((8, 32 // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(32)))

    best = plgpu.kernel(
        partial(_kernel, slots=slots, tiles=each),
        out_type=result,
        grid=(batch, lq_room // rows, tiles // each),
        grid_names=("batch", "rows", "tiles"),
        scratch_types={
            "query": swizzled((_PARTS * chunks * _COLUMNS, rows), jnp.bfloat16),
            "token": swizzled((_PARTS * chunks, _TILE, _COLUMNS), jnp.bfloat16),
            "near": swizzled((2, _TILE, rows), jnp.float32),
            "packed": plgpu.SMEM((2, width // _COLUMNS, _TILE, _COLUMNS), jnp.uint8),
            "scales": plgpu.SMEM((2, _TILE), jnp.float32),
            "query_ready": plgpu.Barrier(),
            "tile_ready": plgpu.Barrier(num_arrivals=2 + width // _COLUMNS, num_barriers=2),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="token_maxima",
        interpret=interpret,
    )(*operands)
    best = best.reshape(batch, documents, room // _SEGMENT, lq_room).max(axis=2)
    return best[:, :n, :lq]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def query_parts(queries: jax.Array, slots: int, rows: int) -> jax.Array:
    """Cut queries float32[B, Lq, D], slot-major, into what blocks of threads multiply.

    Returns:
      bfloat16[B, Lq / rows, 3 * chunks * 16, rows]: the parts, and in each the dimensions, of which
      a slot starts a chunk of 16; zeros fill its last.
    """
    batch, lq, dim = queries.shape
    packed = dim // slots
    values = queries.reshape(batch, lq // rows, rows, slots, packed)
    values = jnp.pad(values, [(0, 0)] * 4 + [(0, -packed % _COLUMNS)])
    values = values.reshape(*values.shape[:3], -1).swapaxes(2, 3)
    return jnp.concatenate(three_parts(values), axis=2)


def three_parts(values: jax.Array) -> list[jax.Array]:
    """Cut float32 values into three bfloat16 of which they are the sum, the largest first.

    Bits are cut off, not rounded: the compiler may leave out conversions there and back.
    """
    parts = []
    for _ in range(_PARTS):
        bits = jax.lax.bitcast_convert_type(values, jnp.int32) & -65536
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts


def select_weights(fields: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Look weights float32[...] up by the lowest bits of int32[...], with selects.

    The tree is walked in depth, so that few values are alive at a time.
    """
    if len(weights) == 1:
        return jnp.broadcast_to(weights[0], fields.shape)
    half = len(weights) // 2
    low, high = (select_weights(fields, part) for part in (weights[:half], weights[half:]))
    return jnp.where((fields & half) != 0, high, low)


def _kernel(
    weights: Any,
    queries: Any,
    similarity: Any,
    residuals: Any,
    scale: Any,
    maxima: Any,
    *,
    query: Any,
    token: Any,
    near: Any,
    packed: Any,
    scales: Any,
    query_ready: Any,
    tile_ready: Any,
    slots: int,
    tiles: int,
) -> None:
    """Some tiles of one query: maxima [B, segments, Lq].

    In shared memory: query and token, the parts in chunks; near, packed and scales, what a tile is
    computed from, twice: the next tile is copied meanwhile.
    """
    b, r, group = (jax.lax.axis_index(name) for name in ("batch", "rows", "tiles"))
    chunks, rows = token.shape[0] // _PARTS, query.shape[1]
    each, nbits = chunks // slots, 8 // slots
    columns = pl.ds(r * rows, rows)

    def fetch(i: Any) -> None:
        place, at = pl.ds((group * tiles + i) * _TILE, _TILE), i % 2
        ready = tile_ready.at[at]
        for c in range(each):
            some = pl.ds(c * _COLUMNS, _COLUMNS)
            plgpu.copy_gmem_to_smem(residuals.at[b, place, some], packed.at[at, c], ready)
        plgpu.copy_gmem_to_smem(similarity.at[b, place, columns], near.at[at], ready)
        plgpu.copy_gmem_to_smem(scale.at[b, place], scales.at[at], ready)

    plgpu.copy_gmem_to_smem(queries.at[b, r], query, query_ready)
    fetch(0)
    plgpu.barrier_wait(query_ready)

    @pl.loop(0, tiles)
    def tile(i):
        at = i % 2
        plgpu.barrier_wait(tile_ready.at[at])

        @pl.loop(0, each)
        def unpack(c):
            bits = packed[at, c].astype(jnp.int32)
            table = [weights[j] for j in range(1 << nbits)]
            for slot in range(slots):
                fields = bits >> (8 - nbits * (slot + 1))
                for part, values in enumerate(three_parts(select_weights(fields, table))):
                    token[part * chunks + slot * each + c] = values

        plgpu.commit_smem()

        # All threads are past the tile before, whose place in shared memory this takes.
        @pl.when(i + 1 < tiles)
        def ahead():
            fetch(i + 1)

        def multiply(products):
            for chunk in range(chunks):
                for left, right in _PRODUCTS:
                    plgpu.wgmma(
                        products,
                        token.at[left * chunks + chunk],
                        query.at[pl.ds((right * chunks + chunk) * _COLUMNS, _COLUMNS)],
                    )
            return products[...]

        products = pl.run_scoped(multiply, plgpu.ACC((_TILE, rows)))
        column = jax.lax.broadcast_in_dim(scales[at], (_TILE, rows), (0,))
        scores = jnp.where(column > 0, (near[at] + products) * column, -jnp.inf)
        line = jax.lax.broadcasted_iota(jnp.int32, (_TILE, rows), 0)
        segment = (group * tiles + i) * (_TILE // _SEGMENT)
        maxima[b, segment, columns] = jnp.where(line < _SEGMENT, scores, -jnp.inf).max(axis=0)
        maxima[b, segment + 1, columns] = jnp.where(line < _SEGMENT, -jnp.inf, scores).max(axis=0)
