"""Scores to which only a query's best matches add (Baleen's flipr), over an index, on the host.

PLAID finds candidates by the sum over all query tokens. As in Stanford's code, its last stage alone
scores as the model asks.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.codec import decompress_on_host
from colbert_jax.embeddings import DocumentEmbeddings, offsets_from_lengths
from colbert_jax.scoring.interactions import interact
from colbert_jax.search.arrays import Hits, IndexArrays, check_codes

_TOKENS = 1 << 16  # document tokens that are decompressed at a time


def rescore(
    arrays: IndexArrays, queries: np.ndarray, positions: np.ndarray, k: int, best_tokens: int
) -> Hits:
    """Order the candidates of each query by the sum of its `best_tokens` best matches.

    Args:
      arrays: on the host.
      queries: float32[B, Lq, D]; rows of zeros are padding.
      positions: int32[B, C], documents that have a token.
      k: at most C.

    Returns:
      positions int32[B, k] and scores float32[B, k], best first, equal scores by the smaller
      position.
    """
    scores = np.empty(positions.shape, np.float32)
    for row, query, found in zip(scores, queries, positions, strict=True):
        row[:] = _score(arrays, query[None], found, best_tokens)[0]
    order = np.lexsort((positions, -scores))[:, :k]
    return Hits(np.take_along_axis(positions, order, 1), np.take_along_axis(scores, order, 1))


def search_all(
    arrays: IndexArrays,
    queries: np.ndarray,
    k: int,
    best_tokens: int,
    allowed: np.ndarray | None = None,
) -> Hits:
    """The k best of all documents; as `rescore` else.

    Args:
      k: at most the number of allowed documents that have a token.
      allowed: bool[N], the documents to score. If None, all.
    """
    lengths = np.diff(arrays.offsets)
    documents = np.flatnonzero(lengths > 0 if allowed is None else allowed & (lengths > 0))
    scores = _score(arrays, queries, documents, best_tokens)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(documents[order].astype(np.int32), np.take_along_axis(scores, order, 1))


def _score(
    arrays: IndexArrays, queries: np.ndarray, documents: np.ndarray, best_tokens: int
) -> np.ndarray:
    """float32[B, n]."""
    starts = np.asarray(arrays.offsets)[documents].astype(np.int64)
    lengths = np.asarray(arrays.offsets)[documents + 1] - starts
    scores = np.empty((len(queries), len(documents)), np.float32)
    cuts = np.flatnonzero(np.diff((np.cumsum(lengths) - lengths) // _TOKENS)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(documents)], strict=True):
        some = slice(first, last)
        offsets = offsets_from_lengths(lengths[some])
        rows = np.repeat(starts[some] - offsets[:-1], lengths[some]) + np.arange(offsets[-1])
        encoded = DocumentEmbeddings(_decompressed(arrays, rows), offsets)
        scores[:, some] = interact(queries, encoded, "flipr", half=best_tokens)
    return scores


def _decompressed(arrays: IndexArrays, rows: np.ndarray) -> np.ndarray:
    """Token embeddings float32[n, D] of these rows of the token arrays."""
    codes, num_centroids = np.asarray(arrays.codes[rows]), len(arrays.centroids)
    check_codes(((codes >= 0) & (codes < num_centroids)).all(), num_centroids)
    return decompress_on_host(arrays, codes, np.asarray(arrays.residuals[rows]))
