"""Retrieval quality on a small collection while a model is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from colbert_jax.colbert import ColBERT
from colbert_jax.data.collections import read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import (
    DEPTH,
    check_judged,
    evaluate_ranking,
    no_query_judged,
    require_ir_measures,
)
from colbert_jax.retriever import rank_documents


@dataclass(frozen=True)
class DevCollection:
    """Passages, queries and judgements to evaluate on, by exact scoring without an index.

    passages, queries: texts by id. qrels: query id -> passage id -> gain.
    ignore_self: see `evaluate_ranking`.

    Raises ValueError where no query is judged, or no judged passage is there; warns where some
    judged passages are not.
    """

    passages: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    ignore_self: bool = False

    def __post_init__(self) -> None:
        require_ir_measures()
        qrels = {qid: self.qrels[qid] for qid in self.queries if qid in self.qrels}
        if not qrels:
            raise ValueError("the dev collection has no query with a judgement")
        first = next(iter(self.passages), "")
        message = check_judged(qrels, self.passages.__contains__, first, "the dev collection")
        if message is not None:
            warnings.warn(message, stacklevel=3)

    @classmethod
    def read(
        cls,
        collection: str | Path,
        queries: str | Path,
        qrels: str | Path,
        *,
        ignore_self: bool = False,
    ) -> DevCollection:
        """Read from files; queries without a judgement are left out."""
        judged = read_qrels(qrels)
        given = read_queries(queries)
        asked = {qid: text for qid, text in given.items() if qid in judged}
        if not asked:
            raise no_query_judged(queries, given, qrels, judged)
        passages: dict[str, str] = {}
        for pid, text in read_collection(collection):
            if pid in passages:
                raise ValueError(f"{collection}: passage id {pid!r:.80} appears twice")
            passages[pid] = text
        return cls(passages, asked, {q: judged[q] for q in asked}, ignore_self)

    def evaluate(self, model: ColBERT) -> dict[str, float]:
        """Measure nDCG@10, MRR@10, Recall@100 and Success@5 of exact scoring, as fractions."""
        depth = DEPTH + self.ignore_self
        found = rank_documents(model, list(self.queries.values()), self.passages, depth)
        ranking = {
            qid: [hit.id for hit in hits] for qid, hits in zip(self.queries, found, strict=True)
        }
        return evaluate_ranking(ranking, self.qrels, ignore_self=self.ignore_self)
