"""One vector a document whose dot product with a vector of the query predicts MaxSim.

The idea is LEMUR's (arXiv 2601.21853): MaxSim is a sum over query tokens q of f_d(q), the best
score of a token of document d, and f_d is nearly a linear function of features of q alone. Here the
features are a Gaussian kernel's, exp(b (q . c - 1)) for landmarks c, the centroids of a small
k-means; random features need twice as many documents scored exactly for the same overlap. `fit`
samples tokens x at which f_d is computed for every document, and finds by ridge least squares what
turns f_d(x) into weights of the features. The weights of all documents lie near few directions:
those that explain most of some documents' scores are kept, turned by a random rotation so that all
dimensions of the result are about equally large, and rounded to 8 bits with a scale for each
document.

So a document's vector is a fixed linear function of f_d at the sampled tokens, minus their means
over documents, which rank nothing: whoever has the `Predictor` makes the vector of a new document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax import runtime
from colbert_jax.batching import next_power_of_two
from colbert_jax.compression.kmeans import train_kmeans
from colbert_jax.embeddings import offsets_from_lengths

SHARPNESS = 2.0  # b
_LANDMARKS = 1024  # at least, or twice the width
_TOKENS = 4  # for each landmark, at which documents are fitted
_POINTS = 60_000  # that the landmarks are trained on
_DOCUMENTS = 2048  # that the directions are made of
_RIDGE = 1e-6  # of the features' mean square
LEVELS = 127  # of a value, on each side of 0
_BLOCK = 1 << 13  # tokens of documents in one product


class Predictor(NamedTuple):
    """What makes the vectors of queries and of documents.

    landmarks: float32[M, D], of unit length.
    projection: float32[M, F], from the sum of a query's features to its vector.
    tokens: float32[S, D], of unit length.
    means: float32[S], the mean of f_d at these tokens.
    solver: float32[F, S], from f_d at these tokens, less the means, to a document's vector.
    """

    landmarks: Any
    projection: Any
    tokens: Any
    means: Any
    solver: Any

    @property
    def width(self) -> int:
        """Dimensions of a learned vector, F."""
        return len(self.solver)

    @property
    def sizes(self) -> dict[str, int]:
        """M, S and F by their names."""
        return {
            "landmarks": len(self.landmarks),
            "tokens": len(self.tokens),
            "width": self.width,
        }


def fit(points: Any, lengths: np.ndarray, width: int, seed: int) -> Predictor:
    """Find what predicts MaxSim in a collection.

    Args:
      points: float[n, D], the token embeddings of sampled documents one after the other, read by
        ascending rows; n >= 1. May be mapped.
      lengths: int[m], tokens of each of these documents.
      width: F; where there are fewer landmarks, their number.
      seed: of all samples and of the rotation.
    """
    rng = np.random.default_rng(seed)
    count = max(_LANDMARKS, 2 * width)
    rows = np.sort(rng.choice(len(points), min(_POINTS, len(points)), replace=False))
    landmarks = train_kmeans(points, min(count, len(rows)), rows=rows, seed=seed, progress=False)
    landmarks /= np.maximum(np.linalg.norm(landmarks, axis=1, keepdims=True), 1e-12)
    tokens = _some(points, _TOKENS * count, rng)
    width = min(width, len(landmarks))
    documents = np.flatnonzero(lengths)
    chosen = np.sort(rng.choice(documents, min(len(documents), _DOCUMENTS), replace=False))
    starts = offsets_from_lengths(lengths)
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
    best = targets(tokens, _rows(points, rows), np.asarray(lengths)[chosen])

    phi = features(landmarks, tokens).astype(np.float64)
    square = phi.T @ phi / len(phi)
    square[np.diag_indices_from(square)] += _RIDGE * np.trace(square) / len(square)
    factor = np.linalg.cholesky(square)
    # In these coordinates the squared error of a prediction is that of its weights.
    to_weights = np.linalg.solve(factor, phi.T / len(phi))
    means = best.mean(axis=0)
    weights = to_weights @ (best - means).T
    directions = np.linalg.eigh(weights @ weights.T)[1][:, ::-1][:, :width]
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    directions = directions @ rotation
    projection = np.linalg.solve(factor.T, directions)
    solver = directions.T @ to_weights
    return Predictor(
        landmarks,
        projection.astype(np.float32),
        tokens,
        means.astype(np.float32),
        solver.astype(np.float32),
    )


def _some(points: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.sort(rng.choice(len(points), min(count, len(points)), replace=False))
    return _rows(points, rows)


def _rows(points: Any, rows: np.ndarray) -> np.ndarray:
    values = np.asarray(points[rows], np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def features(landmarks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float32[n, M], the features of token embeddings float32[n, D] of unit length."""
    return np.exp(np.float32(SHARPNESS) * (values @ landmarks.T - np.float32(1)))


def targets(tokens: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float32[N, S], the best score of a token of each document for each of some tokens.

    Args:
      tokens: float32[S, D].
      values: float32[T, D], the documents' token embeddings; lengths: int[N], each at least 1.
    """
    if runtime.use_cpu_kernels():
        from colbert_jax.compression import tiles

        return _targets_by_kernels(tiles.packed(tokens), values, lengths)[:, : len(tokens)]
    placed = jnp.asarray(tokens)
    blocks = [
        np.asarray(_targets(placed, *_padded(values[rows], some)))[: len(some)]
        for rows, some in _cut(lengths)
    ]
    return np.concatenate([np.zeros((0, len(tokens)), np.float32), *blocks])


def document_vectors(
    predictor: Predictor, values: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Make the vectors of documents; that of a document without a token is zero.

    Args:
      values: float32[T, D], their token embeddings one after the other.
      lengths: int[N].

    Returns:
      int8[N, F] and their scales float32[N]: the vectors are the products.
    """
    lengths = np.asarray(lengths)
    vectors = np.zeros((len(lengths), predictor.width), np.int8)
    scales = np.zeros(len(lengths), np.float32)
    full = np.flatnonzero(lengths)
    make = _vectors_by_kernels if runtime.use_cpu_kernels() else _vectors_by_xla
    done = 0
    for part in make(predictor, values, lengths[full]):
        rows = full[done : done + len(part[0])]
        vectors[rows], scales[rows] = part
        done += len(rows)
    return vectors, scales


def _vectors_by_kernels(
    predictor: Predictor, values: np.ndarray, lengths: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from colbert_jax.compression import cpu_kernels, tiles

    tokens, solver = tiles.packed(predictor.tokens), tiles.packed(predictor.solver)
    for rows, some in _cut(lengths):
        best = _targets_by_kernels(tokens, values[rows], some)[:, : len(predictor.tokens)]
        vectors = cpu_kernels.products(best - predictor.means, solver)
        yield rounded(vectors[:, : predictor.width])


def rounded(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round vectors float32[N, F] to int8[N, F] in units of their scales float32[N]."""
    scales = np.abs(vectors).max(axis=1) / np.float32(LEVELS)
    units = vectors / np.where(scales > 0, scales, 1)[:, None]
    return np.rint(units).astype(np.int8), scales


def _targets_by_kernels(columns: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """As `targets` of tokens in tiles, the columns that fill the last one too: float32[N, W]."""
    from colbert_jax.compression.cpu_kernels import best_matches

    values, offsets = np.ascontiguousarray(values, np.float32), offsets_from_lengths(lengths)
    out = np.empty((len(lengths), columns.shape[0] * columns.shape[2]), np.float32)
    runtime.spread_evenly(
        lambda start, stop: best_matches(values, offsets, columns, start, stop, out), offsets[1:]
    )
    return out


def _vectors_by_xla(
    predictor: Predictor, values: np.ndarray, lengths: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    placed = Predictor(*map(jnp.asarray, predictor))
    pending: Any = None  # what the device works on, while the host cuts the next block
    for rows, some in _cut(lengths):
        following = _vectors(placed, *_padded(values[rows], some)), len(some)
        if pending is not None:
            yield tuple(np.asarray(part)[: pending[1]] for part in pending[0])  # type: ignore[misc]
        pending = following
    if pending is not None:
        yield tuple(np.asarray(part)[: pending[1]] for part in pending[0])  # type: ignore[misc]


def _cut(lengths: np.ndarray, block: int = _BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Whole documents of about `block` tokens: their rows, and their lengths."""
    starts = offsets_from_lengths(lengths)
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(starts, starts[first] + block, side="right")) - 1
        last = max(last, first + 1)
        yield slice(int(starts[first]), int(starts[last])), lengths[first:last]
        first = last


def _padded(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A block in one of a few shapes: tokens, the document of each, and the documents' numbers."""
    tokens = next_power_of_two(len(values))
    documents = max(next_power_of_two(len(lengths)), 64)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    pad = tokens - len(values)
    return (
        np.pad(values, [(0, pad), (0, 0)]),
        np.pad(owners, (0, pad), constant_values=documents).astype(np.int32),
        np.zeros(documents, np.int8),
    )


@jax.jit
def _targets(
    tokens: jax.Array, values: jax.Array, owners: jax.Array, documents: jax.Array
) -> jax.Array:
    """As `_targets_by_kernels`, 0 for a document without a token.

    Args:
      owners: int32[T], ascending, the document of each token; from N on it is padding.
      documents: [N], for their number alone.
    """
    scores = jnp.matmul(values, tokens.T, precision=jax.lax.Precision.HIGHEST)
    best = jax.ops.segment_max(scores, owners, len(documents), indices_are_sorted=True)
    return jnp.where(jnp.isfinite(best), best, 0)


@jax.jit
def _vectors(
    predictor: Predictor, values: jax.Array, owners: jax.Array, documents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    best = _targets(predictor.tokens, values, owners, documents) - predictor.means
    vectors = jnp.matmul(best, predictor.solver.T, precision=jax.lax.Precision.HIGHEST)
    scales = jnp.abs(vectors).max(axis=1) / LEVELS
    units = vectors / jnp.where(scales > 0, scales, 1)[:, None]
    return jnp.rint(units).astype(jnp.int8), scales
