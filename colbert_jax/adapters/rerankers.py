"""The package `rerankers`: a ranker with its interface; extra `rerankers`."""

from __future__ import annotations

from typing import Any

from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result
from rerankers.utils import prep_docs

from colbert_jax.adapters.common import rank
from colbert_jax.colbert import ColBERT


class ColBERTRanker(BaseRanker):
    """Orders documents by their scores; in place of `Reranker("colbert")`."""

    def __init__(self, model_name_or_path: str | ColBERT, verbose: int = 1, **pretrained: Any):
        """
        Args:
          model_name_or_path: a folder, a hub id, or a loaded model.
          verbose: as of other rankers; nothing is printed here.
          **pretrained: arguments of `ColBERT.from_pretrained`.
        """
        self.verbose = verbose
        if not isinstance(model_name_or_path, ColBERT):
            model_name_or_path = ColBERT.from_pretrained(model_name_or_path, **pretrained)
        self.model = model_name_or_path

    def score(self, query: str, doc: str) -> float:
        """MaxSim of one document; minus infinity for one without a token."""
        return next((score for _, score in rank(self.model, query, [doc])), float("-inf"))

    def rank(self, query: str, docs: Any, doc_ids: Any = None) -> RankedResults:
        documents = prep_docs(docs, doc_ids)
        ranked = rank(self.model, query, [document.text for document in documents])
        results = [
            Result(document=documents[place], score=score, rank=n)
            for n, (place, score) in enumerate(ranked, 1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)
