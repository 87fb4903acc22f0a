"""The fused kernel of `residual.token_maxima` for TPUs (Pallas): decompress, normalise, MaxSim.

One step of the grid holds a tile of tokens of a few documents on the chip: it selects their weights
by the packed bytes, multiplies them with the query on the matrix unit, and keeps a running maximum.
XLA's form writes the unpacked bytes of all tokens to memory in between.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from colbert_jax.scoring.slots import slot_weights

# Tokens of a document in one step: a register has 128 columns.
_MOST_TOKENS = 128
# Tokens of all documents of a step; each document counts for 32 at least.
_STEP = 1024
_LEAST_TOKENS = 32
# Tokens whose instructions are interleaved, which hides latency until registers run out. Compiled
# for a v5e, a step at 4 bits takes 3,000 instructions with 128 of them, 2,340 with 256, 2,060 with
# 512, and 1,960 with all, which takes twice as long to compile. At 8 bits the 255 selects hide the
# latency.
_INTERLEAVED = 512


def token_maxima(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Take the best score of each document's tokens for each query row, on a TPU.

    Args:
      queries, similarity, residuals, scale, weights: as for `residual.token_maxima`.
      interpret: run without a TPU, for tests.

    Returns:
      float32[B, n, Lq].
    """
    batch, lq, dim = queries.shape
    _, n, length, packed = residuals.shape
    tokens = min(_MOST_TOKENS, length)
    docs = min(_STEP // max(tokens, _LEAST_TOKENS) // 8 * 8, n)
    operands = (weights, queries, similarity, residuals, scale)
    # Under shard_map the result differs between devices wherever an operand does.
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    result = jax.ShapeDtypeStruct(
        (batch, n, lq), jnp.float32, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )
    return pl.pallas_call(
        partial(_kernel, length=length),
        grid=(batch, pl.cdiv(n, docs), pl.cdiv(length, tokens)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, lq, dim), lambda b, i, t: (b, 0, 0)),
            pl.BlockSpec((1, docs, tokens, lq), lambda b, i, t: (b, i, t, 0)),
            pl.BlockSpec((1, docs, tokens, packed), lambda b, i, t: (b, i, t, 0)),
            pl.BlockSpec((1, docs, tokens), lambda b, i, t: (b, i, t)),
        ],
        out_specs=pl.BlockSpec((1, docs, lq), lambda b, i, t: (b, i, 0)),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="token_maxima",
    )(*operands)


def _kernel(weights, queries, similarity, residuals, scale, maxima, *, length):
    """One step: maxima [1, docs, Lq] over the tiles of tokens so far."""
    _, docs, tokens = scale.shape
    lq = queries.shape[1]
    # Blocks at the far edges reach past the end of the arrays, where memory holds any values:
    # tokens there are masked, documents there are not written back.
    place = pl.program_id(2) * tokens + jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    inside = place < length

    @pl.when(pl.program_id(2) == 0)
    def begin():
        maxima[...] = jnp.full(maxima.shape, -jnp.inf, jnp.float32)

    unroll = _INTERLEAVED // max(tokens, _LEAST_TOKENS) if weights.shape[0] < 256 else 1
    values = [weights[i] for i in range(weights.shape[0])]

    def score(i, carry):
        products = jax.lax.dot_general(
            slot_weights(residuals[0, i], values),
            queries[0],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        row = jnp.where(inside, scale[0, pl.ds(i, 1)], 0.0)
        column = jnp.broadcast_to(row, (lq, tokens)).T  # [tokens, Lq]
        scores = jnp.where(column > 0, (similarity[0, i] + products) * column, -jnp.inf)
        best = scores.max(axis=0, keepdims=True)
        maxima[0, pl.ds(i, 1)] = jnp.maximum(maxima[0, pl.ds(i, 1)], best)
        return carry

    @pl.when(jnp.any(inside & (scale[0] > 0)))
    def score_all():
        jax.lax.fori_loop(0, docs, score, None, unroll=min(unroll, docs))
