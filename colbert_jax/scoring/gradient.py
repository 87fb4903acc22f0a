"""MaxSim for training: scores whose gradient needs only the arg-max positions.

Differentiating `maxsim.maxsim_nway` keeps the similarity of every query token with every document
token. The maximum passes its gradient to one of them, so it is enough to keep its position: Lq
small integers for each pair instead of Lq x Ld floats. Both directions run in blocks of bounded
size and without a scatter, whose order of additions would vary on a GPU. Of equal similarities the
first gets the gradient.

A document without a token scores minus infinity and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from colbert_jax.models.layers import matmul_precision

# Floats in a block: on a CPU they stay in its cache (2^14 to 2^18 are equally fast), on an
# accelerator they keep it busy and, at 16 MiB, are far fewer than the similarities of a batch.
_CPU_ELEMENTS = 1 << 16
_ACCELERATOR_ELEMENTS = 1 << 22


@partial(jax.jit, static_argnames="mesh")
def nway_scores(
    queries: jax.Array, documents: jax.Array, mask: jax.Array, *, mesh: Mesh | None = None
) -> jax.Array:
    """Score every query with its W documents, to be differentiated.

    Args:
      queries: [B, Lq, D].
      documents: [B, W, Ld, D].
      mask: bool[B, W, Ld], the documents' tokens.
      mesh: B is sharded over its axis "data", whose size must divide B; each device scores its
        queries. If None, one device.

    Returns:
      float32[B, W], sharded as the queries are.
    """

    def score(queries, documents, mask):
        queries, documents = _of_one_type(queries, documents)
        return _grouped_scores(queries[:, None], documents, mask)[..., 0]

    return _over(mesh, score)(queries, documents, mask)


@partial(jax.jit, static_argnames="mesh")
def all_pairs_scores(
    queries: jax.Array, documents: jax.Array, mask: jax.Array, *, mesh: Mesh | None = None
) -> jax.Array:
    """Score every query with every document, to be differentiated.

    Args:
      queries: [B, Lq, D].
      documents: [N, Ld, D].
      mask: bool[N, Ld], the documents' tokens.
      mesh: B and N are sharded over its axis "data", whose size must divide both; each device
        gathers the documents and scores its queries with all of them. If None, one device.

    Returns:
      float32[B, N], sharded as the queries are.
    """

    def score(queries, documents, mask):
        queries, documents = _of_one_type(queries, documents)
        if (
            _shards(mesh) > 1
        ):  # its transpose adds up the gradients of the devices and scatters them
            gather = partial(jax.lax.all_gather, axis_name="data", tiled=True)
            documents, mask = gather(documents), gather(mask)
        return _grouped_scores(queries[None], documents[None], mask[None])[0].T

    return _over(mesh, score)(queries, documents, mask)


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"]


def _of_one_type(*arrays: jax.Array) -> list[jax.Array]:
    return [x.astype(jnp.result_type(*arrays)) for x in arrays]


def _over(mesh: Mesh | None, function: Callable) -> Callable:
    if _shards(mesh) == 1:
        return function
    # The loops over blocks start from zeros, alike on all devices, which the check refuses.
    return jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )


@jax.custom_vjp
def _grouped_scores(queries: jax.Array, documents: jax.Array, mask: jax.Array) -> jax.Array:
    """Score every query with every document within each of G groups.

    Args:
      queries: [G, Q, Lq, D].
      documents: [G, W, Ld, D].
      mask: bool[G, W, Ld].

    Returns:
      float32[G, W, Q].
    """
    return _forward(queries, documents, mask)[0]


def _forward(queries: jax.Array, documents: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    scores, positions = jax.lax.platform_dependent(
        *(queries, documents, mask),
        cpu=partial(_score_blocks, elements=_CPU_ELEMENTS),
        default=partial(_score_blocks, elements=_ACCELERATOR_ELEMENTS),
    )
    return scores, (queries, documents, mask.any(axis=-1), positions)


def _backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    queries, documents, scored, positions = kept
    gradient = jnp.where(scored[..., None], gradient, 0.0)
    gradients = jax.lax.platform_dependent(
        *(queries, documents, positions, gradient), cpu=_add_rows, default=_add_products
    )
    return *gradients, None


_grouped_scores.defvjp(_forward, _backward)


def _score_blocks(
    queries: jax.Array, documents: jax.Array, mask: jax.Array, *, elements: int
) -> tuple[jax.Array, jax.Array]:
    """Scores float32[G, W, Q] and arg-max positions int16 or int32[G, W, Q, Lq]."""
    (g, q, lq, _), (w, length) = queries.shape, mask.shape[1:]
    dtype = jnp.int16 if length < 1 << 15 else jnp.int32

    def score(block: _Block, out: Any) -> Any:
        pairs = jnp.einsum(
            "gqkd,gnld->gnlqk", block.groups(queries), block.of(documents), **_product(queries)
        )
        similarity = jnp.where(block.of(mask)[..., None, None], pairs, -jnp.inf)
        best = similarity.max(axis=2, keepdims=True)
        # A CPU takes a maximum and a minimum many times faster than one arg-max.
        token = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 2)
        position = jnp.where(similarity == best, token, length - 1).min(axis=2)
        scores, positions = out
        return block.put(scores, best[:, :, 0].sum(axis=-1)), block.put(positions, position)

    out = jnp.zeros((g, w, q), jnp.float32), jnp.zeros((g, w, q, lq), dtype)
    return _in_blocks(g, w, length * q * lq, elements, score, out)


def _add_rows(
    queries: jax.Array, documents: jax.Array, positions: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of queries and documents, row by row, which a CPU does in order.

    Args:
      positions: of the arg-max, integers[G, W, Q, Lq].
      gradient: of the scores, float32[G, W, Q].
    """
    (_, q, lq, dim), (g, w) = queries.shape, documents.shape[:2]

    def add(block: _Block, out: Any) -> Any:
        of_queries, of_documents = out
        position, weight = block.of(positions).astype(jnp.int32), block.new(block.of(gradient))
        group, document = (x[..., None, None] for x in block.indices())
        at = (group, document, position)
        rows = documents.at[at].get(mode="promise_in_bounds")
        products = jnp.einsum("gnqkd,gnq->gqkd", rows, weight, **_product(queries))
        updates = block.groups(queries)[:, None] * weight[..., None, None]
        of_documents = of_documents.at[at].add(updates, mode="promise_in_bounds")
        return block.add_to_groups(of_queries, products), of_documents

    out = jnp.zeros(queries.shape, jnp.float32), jnp.zeros(documents.shape, jnp.float32)
    of_queries, of_documents = _in_blocks(g, w, dim * q * lq, _CPU_ELEMENTS, add, out)
    return of_queries.astype(queries.dtype), of_documents.astype(documents.dtype)


def _add_products(
    queries: jax.Array, documents: jax.Array, positions: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_add_rows` as two matrix products, whose sums have one order on an accelerator too."""
    (_, q, lq, _), (g, w, length) = queries.shape, documents.shape[:3]

    def add(block: _Block, out: Any) -> Any:
        of_queries, of_documents = out
        token = jnp.arange(length)[:, None, None]
        chosen = block.of(positions)[:, :, None] == token  # [g, n, Ld, Q, Lq]
        weight = block.new(block.of(gradient))[:, :, None, :, None]
        weights = jnp.where(chosen, weight, 0.0).astype(queries.dtype)
        product = _product(queries)
        rows = jnp.einsum("gnlqk,gnld->gqkd", weights, block.of(documents), **product)
        tokens = jnp.einsum("gnlqk,gqkd->gnld", weights, block.groups(queries), **product)
        # The weights of a document are zero in all blocks but one.
        tokens = block.of(of_documents) + tokens.astype(documents.dtype)
        return block.add_to_groups(of_queries, rows), block.put(of_documents, tokens)

    out = jnp.zeros(queries.shape, jnp.float32), jnp.zeros_like(documents)
    of_queries, of_documents = _in_blocks(g, w, length * q * lq, _ACCELERATOR_ELEMENTS, add, out)
    return of_queries.astype(queries.dtype), of_documents


class _Block(NamedTuple):
    """g groups and n documents of each, out of arrays [G, W, ...].

    start, size: the first group and document, and (g, n).
    first: the first group and document that are in no earlier block.
    """

    start: tuple[jax.Array, jax.Array]
    size: tuple[int, int]
    first: tuple[jax.Array, jax.Array]

    def corner(self, x: jax.Array) -> list[Any]:
        return [*self.start, *[0] * (x.ndim - 2)]

    def of(self, x: jax.Array) -> jax.Array:
        """[G, W, ...] -> [g, n, ...]."""
        return jax.lax.dynamic_slice(x, self.corner(x), (*self.size, *x.shape[2:]))

    def groups(self, x: jax.Array) -> jax.Array:
        """[G, ...] -> [g, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.start[0], self.size[0])

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Of the groups, int32[g, 1], and of the documents, int32[n]."""
        groups, documents = (
            start + jnp.arange(size) for start, size in zip(self.start, self.size, strict=True)
        )
        return groups[:, None], documents

    def new(self, x: jax.Array) -> jax.Array:
        """[g, n, ...] with zeros for pairs that an earlier block had."""
        groups, documents = self.indices()
        new = (groups >= self.first[0]) & (documents >= self.first[1])
        return jnp.where(jnp.expand_dims(new, tuple(range(2, x.ndim))), x, 0)

    def put(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """[G, W, ...] with [g, n, ...] in its place."""
        return jax.lax.dynamic_update_slice(x, values.astype(x.dtype), self.corner(x))

    def add_to_groups(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """[G, ...] with [g, ...] added in its place."""
        values = self.groups(x) + values
        return jax.lax.dynamic_update_slice_in_dim(x, values, self.start[0], axis=0)


def _in_blocks(
    groups: int,
    documents: int,
    elements_each: int,
    elements: int,
    body: Callable[[_Block, Any], Any],
    out: Any,
) -> Any:
    """Go through blocks of G groups of W documents: of several groups, or of a part of one.

    Args:
      elements_each: elements that a document takes.
      elements: elements that a block may take.
      body: (block, out) -> out.
    """
    step = _even_step(documents, elements // elements_each)
    groups_step = _even_step(groups, elements // (elements_each * step))
    across = -(-documents // step)

    def run(i: jax.Array, out: Any) -> Any:
        first = (i // across * groups_step, i % across * step)
        # The last blocks end with the last rows, so their first rows may be in an earlier block.
        start = (
            jnp.minimum(first[0], groups - groups_step),
            jnp.minimum(first[1], documents - step),
        )
        return body(_Block(start, (groups_step, step), first), out)

    return jax.lax.fori_loop(0, -(-groups // groups_step) * across, run, out)


def _even_step(n: int, most: int) -> int:
    """Rows of a block where n rows make the fewest even blocks of at most max(most, 1) rows."""
    count = -(-n // max(most, 1))
    return -(-n // count)


def _product(x: jax.Array) -> dict[str, Any]:
    """Sums are float32; so are products, unless the factors have half precision."""
    return dict(precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
