"""Measures of a ranking, computed by ir-measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Name in reports -> measure of ir-measures. nDCG has linear gains, as trec_eval's.
MEASURES = {
    "nDCG@10": "nDCG@10",
    "MRR@10": "RR@10",
    "Recall@100": "R@100",
    "Success@5": "Success@5",
}
DEPTH = 100


def require_ir_measures():
    """The module that measures. Raises ImportError naming the extra where it is missing."""
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError(
            'evaluation needs ir-measures: pip install "colbert-jax[eval]"'
        ) from error
    return ir_measures


def evaluate_ranking(
    ranking: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """The measures of `MEASURES`, averaged over all judged queries.

    Args:
      ranking: qid -> pids, best first. A judged query that is not in it counts as 0.
      qrels: qid -> pid -> gain.

    Raises:
      ImportError: ir-measures is not installed.
      ValueError: no judged query is in the ranking.
    """
    ir_measures = require_ir_measures()
    if not ranking.keys() & qrels.keys():
        raise ValueError(
            "none of the queries has a judgement: do the ids of queries and qrels match?"
        )
    measures = {name: ir_measures.parse_measure(text) for name, text in MEASURES.items()}
    # The order is ours already: falling numbers keep the library from breaking ties its own way.
    run = {
        qid: {pid: float(len(pids) - place) for place, pid in enumerate(pids)}
        for qid, pids in ranking.items()
        if qid in qrels
    }
    judged = {qid: dict(gains) for qid, gains in qrels.items()}
    values = ir_measures.calc_aggregate(list(measures.values()), judged, run)
    return {name: float(values[measure]) for name, measure in measures.items()}
