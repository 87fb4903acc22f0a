"""Haystack: a retriever over an index, and a ranker, as components; extra `haystack`."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from colbert_jax.adapters.common import find, rank
from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Retriever

_ORDER = {"==": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "in": "in"}


@component
class ColBERTRetriever:
    """Documents of an index; their fields are `meta`."""

    def __init__(self, index: str, checkpoint: str | None = None, top_k: int = 10):
        """
        Args:
          index: the index folder, opened by `warm_up` or the first run.
          checkpoint: the place of its model, if it has moved.
          top_k: results of a query.
        """
        self.index, self.checkpoint, self.top_k = index, checkpoint, top_k
        self._retriever: Retriever | None = None

    def warm_up(self) -> None:
        """Open the index and load its model."""
        if self._retriever is None:
            self._retriever = Retriever.open(self.index, self.checkpoint)

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, index=self.index, checkpoint=self.checkpoint, top_k=self.top_k)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ColBERTRetriever:
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, Any]:
        """Find documents.

        Args:
          filters: Haystack's, on `meta`.
          top_k: results; if None, what the component was made with.
        """
        self.warm_up()
        assert self._retriever is not None
        settings = {"where": where_of(filters)} if filters else None
        found = find(self._retriever, query, self.top_k if top_k is None else top_k, settings)
        documents = [
            Document(id=hit.id, content=hit.text, meta=fields, score=hit.score)
            for hit, fields in found
        ]
        return {"documents": documents}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self.run, query, filters, top_k)


@component
class ColBERTRanker:
    """Orders documents by their scores with the query."""

    def __init__(self, checkpoint: str, top_k: int | None = None):
        """
        Args:
          checkpoint: a folder or a hub id, loaded by `warm_up` or the first run.
          top_k: documents to keep. If None, all.
        """
        self.checkpoint, self.top_k = checkpoint, top_k
        self._model: ColBERT | None = None

    def warm_up(self) -> None:
        """Load the model."""
        if self._model is None:
            self._model = ColBERT.from_pretrained(self.checkpoint)

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, checkpoint=self.checkpoint, top_k=self.top_k)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ColBERTRanker:
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        self.warm_up()
        assert self._model is not None
        texts = [document.content or "" for document in documents]
        ranked = rank(self._model, query, texts, self.top_k if top_k is None else top_k)
        kept = [dataclasses.replace(documents[place], score=score) for place, score in ranked]
        return {"documents": kept}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self.run, query, documents, top_k)


def where_of(filters: dict[str, Any]) -> dict[str, Any]:
    """Haystack's filters in the language of this library (docs/filters.md).

    Raises:
      ValueError: an operator that the language does not have, or no filter.
    """
    if "conditions" in filters:
        parts = [where_of(part) for part in filters["conditions"]]
        kind = filters.get("operator")
        if kind in ("AND", "OR"):
            return {kind.lower(): parts}
        if kind == "NOT":
            return {"not": {"and": parts}}
        raise ValueError(f"a filter's operator is AND, OR or NOT, got {kind!r}")
    missing = {"field", "operator", "value"} - filters.keys()
    if missing:
        raise ValueError(f"a filter has field, operator and value; {sorted(missing)} is missing")
    name = str(filters["field"]).removeprefix("meta.")
    operator, value = filters["operator"], filters["value"]
    if value is None and operator in ("==", "!="):
        return {name: {"exists": operator == "!="}}
    if operator == "not in":
        return {"not": {name: {"in": value}}}
    if operator not in _ORDER:
        known = ", ".join([*_ORDER, "not in"])
        raise ValueError(f"no operator {operator!r} on {name!r}; there are {known}")
    return {name: {_ORDER[operator]: value}}
