"""Two or more rankings of the same documents as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FUSIONS = ("rrf", "relative")


class Hybrid(NamedTuple):
    """How late interaction and BM25 are made one ranking.

    method: "rrf", reciprocal-rank fusion, looks at ranks alone; "relative" adds scores, those of
      each ranking stretched to 0..1.
    bm25_weight: BM25's part, from 0 to 1; the rest is late interaction's.
    depth: documents of each ranking that are looked at; at least the results asked for.
    constant: of reciprocal-rank fusion.
    """

    method: str = "rrf"
    bm25_weight: float = 0.5
    depth: int = 100
    constant: float = 60.0


def as_hybrid(given: Any) -> Hybrid | None:
    """Settings from what a caller says: None or False for none, True, a method's name, or all.

    Raises ValueError, TypeError.
    """
    if given is None or given is False:
        return None
    if given is True:
        return Hybrid()
    if isinstance(given, str):
        given = Hybrid(given)
    if not isinstance(given, Hybrid):
        raise TypeError(f"hybrid must be True, one of {FUSIONS}, or a Hybrid, got {given!r:.80}")
    method, weight, depth, constant = given
    if method not in FUSIONS:
        raise ValueError(f"hybrid must be one of {FUSIONS}, got {method!r:.80}")
    if not _is_number(weight) or not 0 <= weight <= 1:
        raise ValueError(f"bm25_weight must be from 0 to 1, got {weight!r:.80}")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be a whole number of at least 1, got {depth!r:.80}")
    if not _is_number(constant) or not 0 <= constant < math.inf:
        raise ValueError(f"constant must be at least 0 and finite, got {constant!r:.80}")
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def reciprocal_rank_fusion(
    rankings: Sequence[np.ndarray], weights: Sequence[float], constant: float = 60.0
) -> tuple[np.ndarray, np.ndarray]:
    """The sum over rankings of weight / (constant + rank) (Cormack et al., SIGIR 2009).

    Args:
      rankings: int[n] each: positions of documents, the best first, which has the rank 1.
      weights: one for each ranking.

    Returns:
      positions int64[M] of all documents ranked, and their scores float64[M]: the best first, equal
      scores by the smaller position.
    """
    values = [1 / (constant + np.arange(1, len(ranking) + 1)) for ranking in rankings]
    return _summed(rankings, values, weights)


def relative_score_fusion(
    rankings: Sequence[np.ndarray], scores: Sequence[np.ndarray], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The sum over rankings of weight * (score - lowest) / (highest - lowest).

    A document that a ranking does not have gets 0 for it; where all scores of a ranking are equal,
    each counts as 1.

    Args:
      rankings: int[n] each: positions of documents, the best first.
      scores: float[n] each.
      weights: one for each ranking.

    Returns:
      as `reciprocal_rank_fusion`.
    """
    return _summed(rankings, [_stretched(row) for row in scores], weights)


def _stretched(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones(len(scores))


def _summed(
    rankings: Sequence[np.ndarray], values: Sequence[np.ndarray], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    positions, places = np.unique(np.concatenate(rankings), return_inverse=True)
    parts = zip(values, weights, strict=True)
    weighted = np.concatenate([weight * row for row, weight in parts])
    scores = np.zeros(len(positions))
    np.add.at(scores, places, weighted)
    order = np.argsort(-scores, kind="stable")
    return positions[order].astype(np.int64), scores[order]
