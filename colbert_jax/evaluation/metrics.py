"""Measures of a ranking, computed by ir-measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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


def no_query_judged(
    queries: Any, given: Mapping[str, Any], qrels: Any, judged: Mapping[str, Any]
) -> ValueError:
    """The error for files of queries and judgements that have no query's id in common."""
    return ValueError(
        f"no query of {queries} has a judgement in {qrels}: a query's id is "
        f"{next(iter(given))!r:.60}, for example, and a judged one is {next(iter(judged))!r:.60}"
    )


def check_judged(
    qrels: Mapping[str, Mapping[str, int]],
    is_known: Callable[[str], bool],
    example: str,
    where: str,
) -> str | None:
    """Whether the judged documents are there to be found.

    Args:
      is_known: whether a document has an id.
      example: the id of a document.
      where: what holds the documents, for messages.

    Returns:
      what to say if some are not, with their number; None if all are.

    Raises:
      ValueError: none is.
    """
    judged = dict.fromkeys(pid for gains in qrels.values() for pid in gains)
    missing = [pid for pid in judged if not is_known(pid)]
    if not missing:
        return None
    message = (
        f"{len(missing)} of {len(judged)} judged documents are not in {where}: judged is "
        f"{missing[0]!r:.60}, for example, and there is {example!r:.60}"
    )
    if len(missing) == len(judged):
        raise ValueError(f"{message}; give the judgements of these documents")
    return f"{message}; they count as not found"


def evaluate_ranking(
    ranking: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    names: Iterable[str] = tuple(MEASURES),
    *,
    ignore_self: bool = False,
) -> dict[str, float]:
    """Measures averaged over all judged queries.

    Args:
      ranking: qid -> pids, best first. A judged query that is not in it counts as 0.
      qrels: qid -> pid -> gain.
      names: see `parse_measures`.
      ignore_self: leave out the document whose id is the query's, from ranking and judgements: of
        collections whose queries are documents themselves (BEIR's ArguAna, Quora, SciDocs).

    Raises:
      ImportError: ir-measures is not installed.
      ValueError: no judged query is in the ranking.
    """
    measures = parse_measures(names)
    run, judged = _as_read_by_tools(ranking, qrels, ignore_self)
    values = require_ir_measures().calc_aggregate(list(measures.values()), judged, run)
    return {name: float(values[measure]) for name, measure in measures.items()}


def parse_measures(names: Iterable[str]) -> dict[str, Any]:
    """Measures of ir-measures by the names that reports have.

    Args:
      names: those of `MEASURES`, MRR@k, Recall@k, and all of ir-measures': nDCG@10, AP(rel=2)@1000.

    Raises:
      ImportError: ir-measures is not installed.
      ValueError: an unknown measure.
    """
    ir_measures = require_ir_measures()
    found = {}
    for name in names:
        text = MEASURES.get(name) or re.sub(r"^Recall(?=[(@])", "R", re.sub("^MRR", "RR", name))
        try:
            found[name] = ir_measures.parse_measure(text)
        except (NameError, ValueError, TypeError, SyntaxError) as error:
            raise ValueError(
                f"{name!r:.60}: no measure of ir-measures, such as nDCG@10, MRR@10, Recall@100, "
                f"Success@5, AP(rel=2)@1000: {error}"
            ) from None
    return found


def measure_queries(
    ranking: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Iterable[str] = tuple(MEASURES),
    *,
    ignore_self: bool = False,
) -> dict[str, dict[str, float]]:
    """The values of each judged query, measure -> qid -> value; else as `evaluate_ranking`.

    Raises:
      ImportError, ValueError: see `parse_measures` and `evaluate_ranking`.
    """
    parsed = parse_measures(measures)
    run, judged = _as_read_by_tools(ranking, qrels, ignore_self)
    names = {measure: name for name, measure in parsed.items()}
    values = {name: dict.fromkeys(judged, 0.0) for name in parsed}
    for found in require_ir_measures().iter_calc(list(names), judged, run):
        values[names[found.measure]][found.query_id] = float(found.value)
    return values


def _as_read_by_tools(
    ranking: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    ignore_self: bool,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Run and judgements for ir-measures. Raises ValueError where they share no query."""
    if ignore_self:
        ranking = {qid: [pid for pid in pids if pid != qid] for qid, pids in ranking.items()}
        others = {q: {p: g for p, g in gains.items() if p != q} for q, gains in qrels.items()}
        qrels = {qid: gains for qid, gains in others.items() if gains}
    if not ranking.keys() & qrels.keys():
        raise ValueError(
            "none of the queries has a judgement: do the ids of queries and qrels match?"
        )
    # The order is ours already: falling numbers keep the library from breaking ties its own way.
    run = {
        qid: {pid: float(len(pids) - place) for place, pid in enumerate(pids)}
        for qid, pids in ranking.items()
        if qid in qrels
    }
    return run, {qid: dict(gains) for qid, gains in qrels.items()}
