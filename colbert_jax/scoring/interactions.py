"""Sums of a query's best matches, on the host: MaxSim, and what some models have in its place."""

from __future__ import annotations

import numpy as np

from colbert_jax.embeddings import DocumentEmbeddings

_ROWS = 1 << 22  # similarities at a time


def interact(
    queries: np.ndarray, documents: DocumentEmbeddings, interaction: str, *, half: int
) -> np.ndarray:
    """Score all documents for each query.

    Args:
      queries: float32[B, Lq, D]; rows of zeros fill up and do not count.
      interaction: "maxsim", the sum of the best matches over a query's tokens; "meanmaxsim", their
        mean; "flipr", the sum of the `half` best of them (Khattab et al., 2021; colbert-ai's
        `interaction="flipr"`, where `half` is half of query_maxlen).

    Returns:
      float32[B, N]; minus infinity for a document without a token.
    """
    scores = np.full((len(queries), len(documents)), -np.inf, np.float32)
    filled = np.flatnonzero(documents.lengths)
    if not len(filled):
        return scores
    starts = documents.offsets[filled]
    for row, query in zip(scores, queries, strict=True):
        tokens = query[np.abs(query).sum(axis=1) > 0]
        best = np.empty((len(tokens), len(filled)), np.float32)
        step = max(_ROWS // max(len(documents.values), 1), 1)
        for at in range(0, len(tokens), step):
            similarities = tokens[at : at + step] @ documents.values.T
            best[at : at + step] = np.maximum.reduceat(similarities, starts, axis=1)
        if interaction == "flipr" and len(best) > half:
            best = np.partition(best, len(best) - half, axis=0)[len(best) - half :]
        total = best.sum(axis=0, dtype=np.float64)
        row[filled] = total / max(len(best), 1) if interaction == "meanmaxsim" else total
    return scores
