"""The three scores of bge-m3 (Chen et al., 2024, section 3.2): dense, lexical and multi-vector.

One pass of the encoder gives all three: the first token's hidden state, normalised, is the dense
vector; a dense layer with ReLU gives each token a weight; the head gives token embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import Batch, BatchRunner, pad_rows
from colbert_jax.embeddings import DocumentEmbeddings, offsets_from_lengths
from colbert_jax.models.colbert import TokenEncoder, unit_length
from colbert_jax.runtime import apart
from colbert_jax.text import TokenIds


class ThreeWay(NamedTuple):
    """What N texts are encoded to.

    tokens: the token embeddings.
    dense: float32[N, hidden_size], rows of unit length.
    ids, weights: for each text, the ids of its tokens, each once, and float32 weights above 0.
    """

    tokens: DocumentEmbeddings
    dense: np.ndarray
    ids: list[np.ndarray]
    weights: list[np.ndarray]


def check_weights(weights: Sequence[float], sparse: Mapping[str, np.ndarray], where: Any) -> None:
    """Raise ValueError unless there are three weights that a model with these heads can use."""
    if len(weights) != 3 or not all(np.isfinite(weights)) or min(weights) < 0 or not sum(weights):
        raise ValueError(
            "weights must be three numbers of at least 0, for the dense, the lexical and the "
            f"multi-vector score, and not all 0; got {tuple(weights)!r}"
        )
    if not sparse:
        raise ValueError(
            f"weights are for models with the three heads of bge-m3; {where} has no lexical "
            "weights (sparse_linear.pt)"
        )


@apart()
def three_way_program(
    runner: BatchRunner, make: Callable[[dict], TokenEncoder], sparse: Mapping[str, np.ndarray]
) -> Callable[..., Any]:
    """Compile ids, attended and kept, as for `TokenEncoder`, to token embeddings
    float32[B, L, D], dense vectors float32[B, hidden_size] and weights float32[B, L].
    """
    column, bias = jnp.asarray(sparse["weight"][0]), jnp.asarray(sparse["bias"][0])

    def run(params: dict, ids: jax.Array, attended: jax.Array, kept: jax.Array) -> Any:
        model = make(params)
        states = model.states(ids, attended).astype(jnp.float32)
        weights = jnp.einsum("bld,d->bl", states, column, precision="highest") + bias
        tokens = unit_length(model.project(states) * kept[..., None])
        return tokens, unit_length(states[:, 0]), jax.nn.relu(weights)

    return runner.program(run, 3)


def encode_three_ways(
    runner: BatchRunner,
    program: Callable[..., Any],
    params: dict,
    token_ids: TokenIds,
    kept: Sequence[np.ndarray],
    *,
    widths: tuple[int, int],
    pad: int,
    unweighted: Iterable[int],
    bar: Any = None,
) -> ThreeWay:
    """Encode tokenised texts.

    Args:
      program: of `three_way_program`.
      kept: for each text which tokens are embeddings.
      widths: of token embeddings and of dense vectors.
      pad: id that fills rows up.
      unweighted: ids that have no lexical weight: the special tokens.
    """
    ids, attended = token_ids
    offsets = offsets_from_lengths(np.array([row.sum() for row in kept], np.int64))
    values = np.empty((offsets[-1], widths[0]), np.float32)
    dense = np.empty((len(ids), widths[1]), np.float32)
    lexical: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(ids)
    special = np.array(sorted(unweighted), np.int32)

    def run(batch: Batch) -> None:
        block = pad_rows([ids[i] for i in batch.rows], batch.size, batch.length, pad)
        mask = pad_rows([kept[i] for i in batch.rows], batch.size, batch.length, False)
        count = np.zeros(batch.size, np.int32)
        count[: len(batch.rows)] = attended[batch.rows]
        tokens, first, weights = runner.run(program, params, block, count, mask)
        for n, i in enumerate(batch.rows):
            values[offsets[i] : offsets[i + 1]] = tokens[n][mask[n]]
            dense[i] = first[n]
            lexical[i] = _largest(ids[i], weights[n][: len(ids[i])], special)

    runner.for_each(np.fromiter(map(len, ids), np.int64, len(ids)), run, bar)
    tokens = DocumentEmbeddings(values, offsets)
    return ThreeWay(tokens, dense, [pair[0] for pair in lexical], [pair[1] for pair in lexical])


def _largest(
    ids: np.ndarray, weights: np.ndarray, special: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each id once, with its largest weight, where that is above 0."""
    unique, places = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(unique), np.float32)
    np.maximum.at(largest, places, weights)
    counts = (largest > 0) & ~np.isin(unique, special)
    return unique[counts], largest[counts]


def lexical_scores(queries: ThreeWay, documents: ThreeWay, vocab_size: int) -> np.ndarray:
    """Sum the products of the weights of shared tokens: float32[B, N]."""
    owner = np.repeat(np.arange(len(documents.ids)), [len(ids) for ids in documents.ids])
    ids = np.concatenate([*documents.ids, np.zeros(0, np.int32)]).astype(np.int64)
    weights = np.concatenate([*documents.weights, np.zeros(0, np.float32)])
    scores = np.zeros((len(queries.ids), len(documents.ids)), np.float32)
    for row, mine, weight in zip(scores, queries.ids, queries.weights, strict=True):
        vector = np.zeros(vocab_size, np.float32)
        vector[mine] = weight
        row[:] = np.bincount(owner, vector[ids] * weights, minlength=len(row))
    return scores
