"""Retrieval quality on a small collection while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from colbert_jax.colbert import ColBERT
from colbert_jax.data.collections import read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import DEPTH, evaluate_ranking, require_ir_measures
from colbert_jax.retriever import rank_documents


@dataclass(frozen=True)
class DevCollection:
    """Passages, queries and judgements to evaluate on, by exact scoring without an index.

    passages, queries: texts by id. qrels: query id -> passage id -> gain.
    """

    passages: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    def __post_init__(self) -> None:
        require_ir_measures()
        if not self.queries:
            raise ValueError("the dev collection has no query with a judgement")

    @classmethod
    def read(cls, collection: str | Path, queries: str | Path, qrels: str | Path) -> DevCollection:
        """Read from files; queries without a judgement are left out."""
        judged = read_qrels(qrels)
        asked = {qid: text for qid, text in read_queries(queries).items() if qid in judged}
        if not asked:
            raise ValueError(f"no query of {queries} has a judgement in {qrels}")
        return cls(dict(read_collection(collection)), asked, {q: judged[q] for q in asked})

    def evaluate(self, model: ColBERT) -> dict[str, float]:
        """Measure nDCG@10, MRR@10, Recall@100 and Success@5 of exact scoring, as fractions."""
        found = rank_documents(model, list(self.queries.values()), self.passages, DEPTH)
        ranking = {
            qid: [hit.id for hit in hits] for qid, hits in zip(self.queries, found, strict=True)
        }
        return evaluate_ranking(ranking, self.qrels)
