"""PLAID and its arrays in plain numpy, to hold every implementation to.

A decision that hangs on rounding (two scores that differ, but by less than `MARGIN`) has no right
answer in float32: the reference then raises `NearTie`, and a property test takes another example.
Scores that are equal, such as those of copies of a document, go by the smaller id.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.codec import unpack
from colbert_jax.compression.learned import features, rounded
from colbert_jax.search.arrays import IndexArrays
from colbert_jax.search.learned import LearnedArrays

MARGIN = 1e-5
_EQUAL = 1e-9  # rounding of float64


class NearTie(Exception):
    """The answer depends on rounding."""


def random_index(
    rng: np.random.Generator,
    *,
    nbits: int = 2,
    num_documents: int = 40,
    num_centroids: int = 12,
    dim: int = 16,
    longest: int = 12,
    long_document: int = 0,
    empty: float = 0.1,
    copies: float = 0.2,
    lengths: np.ndarray | None = None,
) -> tuple[IndexArrays, np.ndarray]:
    """A compressed index of random documents, and their lengths.

    Args:
      longest: documents have 1..longest tokens, around a few centroids each.
      long_document: tokens of one more document, 0 for none.
      empty, copies: share of the documents that have no token, and that repeat an earlier one of
        the same length.
      lengths: int[N], instead of `num_documents`, `longest`, `long_document` and `empty`.
    """
    centroids = _unit(rng.normal(size=(num_centroids, dim))).astype(np.float32)
    weights = np.sort(rng.normal(0, 0.15, 1 << nbits)).astype(np.float32)
    if lengths is None:
        lengths = rng.integers(1, longest + 1, num_documents)
        lengths[rng.random(num_documents) < empty] = 0
        if long_document:
            lengths[num_documents // 2] = long_document
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    for place, length in enumerate(lengths):
        alike = np.flatnonzero(lengths[:place] == length)
        if len(alike) and rng.random() < copies:
            documents.append(documents[rng.choice(alike)])
            continue
        own = rng.integers(0, num_centroids, 4)
        packed = rng.integers(0, 256, (length, dim * nbits // 8), dtype=np.uint8)
        documents.append((rng.choice(own, length).astype(np.int32), packed))
    codes, residuals = (np.concatenate(column) for column in zip(*documents, strict=True))
    owners = np.repeat(np.arange(len(lengths)), lengths)
    pairs = np.unique(np.stack([codes, owners], axis=1), axis=0)
    sizes = np.bincount(pairs[:, 0], minlength=num_centroids)
    arrays = IndexArrays(
        centroids,
        weights,
        codes,
        residuals,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        pairs[:, 1].astype(np.int32),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
    )
    return arrays, lengths


def random_queries(
    rng: np.random.Generator, arrays: IndexArrays, batch: int, length: int
) -> np.ndarray:
    """float32[B, Lq, D] unit rows near centroids; the last rows of every other one are zeros."""
    near = arrays.centroids[rng.integers(0, len(arrays.centroids), (batch, length))]
    queries = _unit(near + rng.normal(0, 0.2, near.shape)).astype(np.float32)
    queries[1::2, length - length // 3 :] = 0
    return queries


def embeddings(arrays: IndexArrays) -> np.ndarray:
    """float64[T, D], all decompressed token embeddings."""
    nbits = len(arrays.bucket_weights).bit_length() - 1
    weights = arrays.bucket_weights[unpack(np.asarray(arrays.residuals), nbits)]
    return _unit(arrays.centroids[arrays.codes].astype(np.float64) + weights)


def plaid_reference(
    arrays: IndexArrays,
    query: np.ndarray,
    k: int,
    ncells: int,
    threshold: float,
    ndocs: int,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """PLAID by its definition, for one query [Lq, D]; rows of zeros are padding.

    Args:
      allowed: bool[N], the documents that become candidates. If None, all.

    Returns:
      ids int32[n] and scores float32[n], best first, equal scores by the smaller id; n <= k, fewer
      where the probes find fewer candidates.

    Raises:
      NearTie: the answer depends on rounding.
    """
    offsets, list_offsets = arrays.offsets, arrays.list_offsets
    query = query[query.any(axis=1)].astype(np.float64)
    table = arrays.centroids.astype(np.float64) @ query.T
    cells = {c for column in table.T for c in _best(np.arange(len(table)), column, ncells)}
    lists = [arrays.lists[list_offsets[c] : list_offsets[c + 1]] for c in sorted(cells)]
    ids = np.unique(np.concatenate([np.zeros(0, np.int32), *lists]))
    ids = ids if allowed is None else ids[allowed[ids]]
    tokens = [slice(offsets[i], offsets[i + 1]) for i in range(len(offsets) - 1)]

    strongest = table.max(axis=1, initial=-np.inf)
    if len(query) and (abs(strongest - threshold) < MARGIN).any():
        raise NearTie
    masked = np.where(strongest[:, None] >= threshold, table, -9999.0)
    for rows, n in ((masked, ndocs), (table, ndocs // 4)):
        scores = [rows[arrays.codes[tokens[i]]].max(axis=0).sum() for i in ids]
        ids = np.sort(_best(ids, np.array(scores), max(n, k)))
    vectors = embeddings(arrays)
    exact = np.array([(vectors[tokens[i]] @ query.T).max(axis=0).sum() for i in ids])
    order = _best(np.arange(len(ids)), exact, k, ordered=True)
    return ids[order].astype(np.int32), exact[order].astype(np.float32)


def learned_units(learned: LearnedArrays, queries: np.ndarray) -> np.ndarray:
    """int8[B, F], the vectors of queries [B, Lq, D], each in units of its own."""
    sums = np.zeros((len(queries), len(learned.landmarks)), np.float32)
    for total, query in zip(sums, queries, strict=True):
        total += features(learned.landmarks, query[query.any(axis=1)]).sum(axis=0)
    vectors = sums @ learned.projection
    return rounded(vectors)[0]


def exact_reference(
    arrays: IndexArrays, query: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all documents with a token, by MaxSim on the decompressed embeddings."""
    lengths = np.diff(arrays.offsets)
    ids = np.flatnonzero(lengths)
    similarity = embeddings(arrays) @ query.T.astype(np.float64)
    scores = np.maximum.reduceat(similarity, arrays.offsets[ids], axis=0).sum(axis=1)
    if allowed is not None:
        ids, scores = ids[allowed[ids]], scores[allowed[ids]]
    order = _best(np.arange(len(ids)), scores, k, ordered=True)
    return ids[order].astype(np.int32), scores[order].astype(np.float32)


def _best(ids: np.ndarray, scores: np.ndarray, n: int, *, ordered: bool = False) -> np.ndarray:
    """The n best ids, best first; NearTie where the cut is in doubt, or the order if `ordered`."""
    scores = np.round(scores, 8)
    order = np.lexsort((ids, -scores))
    gaps = -np.diff(scores[order])[None if ordered else max(n - 1, 0) : n]
    if ((gaps > _EQUAL) & (gaps < MARGIN)).any():
        raise NearTie
    return ids[order[:n]]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
