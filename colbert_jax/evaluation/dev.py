"""Retrieval quality on small collections while a model is trained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.colbert import ColBERT
from colbert_jax.data.collections import read_collection, read_qrels, read_queries
from colbert_jax.data.examples import ExampleSource, subset
from colbert_jax.data.published import read_test_collection
from colbert_jax.evaluation.metrics import (
    DEPTH,
    MEASURES,
    check_judged,
    evaluate_ranking,
    no_query_judged,
    parse_measures,
    require_ir_measures,
)
from colbert_jax.evaluation.presets import queries_are_documents
from colbert_jax.progress import LOGGER, progress_bar
from colbert_jax.retriever import rank_documents

_HELD_OUT = 200  # queries of training examples, at most


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

    @classmethod
    def published(cls, place: Any, *, split: str | None = None) -> DevCollection:
        """Read a published collection: see `read_test_collection`, which has the arguments.

        What `ignore_self` says is decided by the collection's name, as in `colbert-jax evaluate`.
        """
        found = read_test_collection(place, split=split)
        for line in (found.describe(), *found.notes):
            LOGGER.info("%s: %s", found.name, line)
        passages = {pid: text for pid, text, _ in found.documents()}
        return cls(passages, found.queries, found.qrels, queries_are_documents(found))

    def evaluate(
        self, model: ColBERT, measures: Sequence[str] = tuple(MEASURES)
    ) -> dict[str, float]:
        """Measure exact scoring, as fractions.

        Args:
          measures: see `parse_measures`. Rankings go as deep as the deepest cut-off, at least 100
            documents.

        Raises:
          ValueError: an unknown measure.
        """
        cutoffs = [int(m.params.get("cutoff", 0)) for m in parse_measures(measures).values()]
        depth = max(DEPTH, *cutoffs) + self.ignore_self
        found = rank_documents(model, list(self.queries.values()), self.passages, depth)
        ranking = {
            qid: [hit.id for hit in hits] for qid, hits in zip(self.queries, found, strict=True)
        }
        return evaluate_ranking(ranking, self.qrels, measures, ignore_self=self.ignore_self)


def hold_out(
    source: ExampleSource, queries: int | None = None, passages: int = 1_000
) -> tuple[ExampleSource, DevCollection | None]:
    """Keep some queries of the training examples for evaluation.

    Which ones depends on their texts alone, not on the order of the examples; the documents of the
    evaluation are their positives, and those of other examples. Every example is read.

    Args:
      queries: how many distinct queries to keep; all examples of a query go with it. If None, a
        tenth of them and at most 200.
      passages: documents of the evaluation, where there are so many.

    Returns:
      the examples that are left, and the collection, None where there are too few queries for one.

    Raises:
      ValueError: no example would be left.
    """
    keys = np.empty(len(source), np.uint64)
    with progress_bar(len(source), "choosing queries to evaluate with", "example") as bar:
        for i in range(len(source)):
            keys[i] = int.from_bytes(_digest(source[i].query)[:8], "big")
            bar.update(1)
    by_key = np.argsort(keys, kind="stable")
    distinct = np.unique(keys)
    if queries is None:
        queries = min(_HELD_OUT, len(distinct) // 10)
        if not queries:
            return source, None
    if not 0 < queries < len(distinct):
        raise ValueError(
            f"{queries} queries cannot be kept for evaluation: the examples have {len(distinct)}"
        )
    kept = keys <= distinct[queries - 1]
    numbers: dict[str, str] = {}  # text of a document -> its id
    asked: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for i in by_key.tolist():
        if not kept[i] and len(numbers) >= passages:
            break
        example = source[i]
        pid = numbers.setdefault(example.documents[0], f"d{len(numbers)}")
        if kept[i]:
            qid = asked.setdefault(example.query, f"q{len(asked)}")
            qrels.setdefault(qid, {})[pid] = 1
    dev = DevCollection(
        {pid: text for text, pid in numbers.items()},
        {qid: text for text, qid in asked.items()},
        qrels,
    )
    return subset(source, np.flatnonzero(~kept)), dev


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
