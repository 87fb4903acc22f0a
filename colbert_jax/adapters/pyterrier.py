"""PyTerrier: a retriever, a reranker and an indexer; extra `pyterrier`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pandas as pd
import pyterrier as pt

from colbert_jax.adapters.common import rank
from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Retriever


class ColBERTRetriever(pt.Transformer):
    """Queries (qid, query) to results (docno, score, rank), with the columns of the queries."""

    def __init__(self, retriever: Retriever, k: int = 1000, text: bool = False, **settings: Any):
        """
        Args:
          retriever: an open index and its model.
          k: results of a query; `% 10` behind it asks for as few.
          text: a column of the documents' texts too, for what follows.
          **settings: further arguments of `Retriever.search`, such as `mode`.
        """
        self._retriever, self._k, self._text, self._settings = retriever, k, text, settings

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        pt.validate.query_frame(inp, extra_columns=["query"])
        kept = [c for c in inp.columns if c not in ("docno", "score", "rank", "docid", "text")]
        found = self._retriever.search(
            inp["query"].tolist(), self._k, texts=self._text, **self._settings
        )
        columns = ["docno", "score", "rank"] + ["text"] * self._text
        rows = [
            (*query, hit.id, hit.score, place, *[hit.text] * self._text)
            for query, hits in zip(inp[kept].itertuples(index=False, name=None), found, strict=True)
            for place, hit in enumerate(hits)
        ]
        return pd.DataFrame(rows, columns=kept + columns)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """With a cut-off behind it, fewer results are searched."""
        if k >= self._k:
            return self
        return ColBERTRetriever(self._retriever, k, self._text, **self._settings)


class ColBERTReranker(pt.Transformer):
    """Results with a text (qid, query, docno, text) in a new order."""

    def __init__(self, model: ColBERT):
        self._model = model

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        pt.validate.result_frame(inp, extra_columns=["query", "text"])
        if not len(inp):
            return inp.assign(score=pd.Series(dtype=float), rank=pd.Series(dtype=int))
        parts = []
        for _, group in inp.groupby("qid", sort=False):
            ranked = rank(self._model, group["query"].iloc[0], group["text"].tolist())
            part = group.iloc[[place for place, _ in ranked]]
            parts.append(part.assign(score=[score for _, score in ranked], rank=range(len(ranked))))
        return pd.concat(parts, ignore_index=True)


class ColBERTIndexer(pt.Indexer):
    """Builds an index of dicts with docno and text; their other entries are fields."""

    def __init__(self, path: str | os.PathLike, model: ColBERT | str, **settings: Any):
        """
        Args:
          path, model, **settings: as of `Retriever.build`.
        """
        self._path, self._model, self._settings = path, model, settings

    def index(self, iter: Iterable[dict[str, Any]], **kwargs: Any) -> ColBERTRetriever:
        """Build the index; what searches it."""
        documents = (
            (one["docno"], one["text"], {n: v for n, v in one.items() if n not in _OWN})
            for one in iter
        )
        return ColBERTRetriever(
            Retriever.build(self._path, self._model, documents, **self._settings | kwargs)
        )


_OWN = ("docno", "text")
