"""Whether two systems differ by more than chance: paired tests over the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SAMPLES = 10_000
_BLOCK = 1 << 22  # signs in memory at a time


class Comparison(NamedTuple):
    """One system against another, on one measure.

    difference: of the means, system less baseline. t_test, randomisation: two-sided p-values.
    adjusted: that of the randomisation by Holm's rule over all comparisons of a table.
    """

    system: str
    baseline: str
    difference: float
    t_test: float
    randomisation: float
    adjusted: float


def paired_t_test(differences: np.ndarray) -> float:
    """Student's two-sided p-value of paired differences [Q]; 1 where all are zero."""
    from scipy import stats

    if len(differences) < 2 or not differences.any():
        return 1.0
    spread = float(differences.std(ddof=1))
    if spread == 0:
        return 0.0
    t = float(differences.mean()) / (spread / np.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def randomisation_test(differences: np.ndarray, samples: int = _SAMPLES, seed: int = 0) -> float:
    """Fisher's two-sided p-value of paired differences [Q], of random signs.

    The share of sign changes whose mean is as far from zero as that found, which counts as one.
    """
    observed = abs(float(differences.sum()))
    differences = differences[differences != 0]  # a sign changes nothing there
    if not len(differences):
        return 1.0
    rng = np.random.default_rng(seed)
    extreme, left = 0, samples
    while left:
        n = min(left, max(_BLOCK // len(differences), 1))
        signs = rng.integers(0, 2, (n, len(differences)), np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
        left -= n
    return (extreme + 1) / (samples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's rule for how many there are."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def compare(
    values: dict[str, dict[str, float]], baseline: str, samples: int = _SAMPLES
) -> list[Comparison]:
    """Compare systems with a baseline.

    Args:
      values: system -> qid -> value, of the same queries.
      baseline: one of the systems.

    Raises:
      ValueError: an unknown baseline, or systems with other queries.
    """
    if baseline not in values:
        raise ValueError(f"baseline {baseline!r:.60}: expected one of {', '.join(values)}")
    queries = list(values[baseline])
    rows = []
    for name, own in values.items():
        if name == baseline:
            continue
        if own.keys() != values[baseline].keys():
            raise ValueError(f"{name} and {baseline} were measured on other queries")
        differences = np.array([own[qid] - values[baseline][qid] for qid in queries])
        p = randomisation_test(differences, samples)
        t_test = paired_t_test(differences)
        rows.append(Comparison(name, baseline, float(differences.mean()), t_test, p, p))
    adjusted = holm([row.randomisation for row in rows])
    return [row._replace(adjusted=p) for row, p in zip(rows, adjusted, strict=True)]
