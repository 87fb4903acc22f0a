"""What gathered requests have computed: searches, and texts encoded for all that needs no index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.colbert import ColBERT
from colbert_jax.data.fields import Value
from colbert_jax.retriever import Hit, Retriever
from colbert_jax.serving.indexes import ServedIndex

_TOKENS = 1 << 16  # of documents whose similarities with a query are in memory


class Found(NamedTuple):
    """The hits of one query, their documents' fields, and the state of the index they are of."""

    hits: list[Hit]
    fields: list[dict[str, Value]]
    generation: int


@dataclass(frozen=True)
class Search:
    """One query of an index; `settings` are arguments of `Retriever.search`."""

    served: ServedIndex
    query: str
    settings: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Equal for queries that one call searches."""
        return self.served.name + json.dumps(self.settings, sort_keys=True)


def search_batch(items: Sequence[Search]) -> list[Found | Exception]:
    """Search queries, those of one index and equal settings in one call."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.group, []).append(place)
    results: dict[int, Found | Exception] = {}
    for places in groups.values():
        one = items[places[0]]
        found = _search([items[place].query for place in places], one.served, one.settings)
        results |= dict(zip(places, found, strict=True))
    return [results[place] for place in range(len(items))]


def _search(
    queries: list[str], served: ServedIndex, settings: Mapping[str, Any]
) -> Sequence[Found | Exception]:
    retriever, generation = served.now, served.generation
    try:
        rows = retriever.search(queries, **settings)
    except Exception as error:
        if len(queries) == 1:
            return [error]
        # Of settings that they share, or of one query among them.
        return [_search([query], served, settings)[0] for query in queries]
    return [Found(hits, fields_of(retriever, hits), generation) for hits in rows]


def fields_of(retriever: Retriever, hits: Sequence[Hit]) -> list[dict[str, Value]]:
    """The fields of documents that were found in this state of the index."""
    index = retriever.index
    if index.metadata.fields is None:
        return [{} for _ in hits]
    return [index.fields(hit.id) for hit in hits]


@dataclass(frozen=True)
class Encoding:
    """Texts of one request to encode, and what to make of their token embeddings.

    finish: takes the queries' embeddings, float32[Lq, D] each, and the documents', float32[Ld, D].
    """

    model: ColBERT
    queries: Sequence[str]
    documents: Sequence[str]
    finish: Callable[[list[np.ndarray], list[np.ndarray]], Any]


def encode_batch(items: Sequence[Encoding]) -> list[Any]:
    """Encode the texts of several requests, those of one model together."""
    results: dict[int, Any] = {}
    for model in {id(item.model): item.model for item in items}.values():
        places = [place for place, item in enumerate(items) if item.model is model]
        queries = [text for place in places for text in items[place].queries]
        documents = [text for place in places for text in items[place].documents]
        encoded = list(model.encode_queries(queries)) if queries else []
        embedded = list(model.encode_documents(documents, progress=False)) if documents else []
        for place in places:
            item = items[place]
            own = [row[row.any(axis=1)] for row in encoded[: len(item.queries)]]
            results[place] = item.finish(own, embedded[: len(item.documents)])
            del encoded[: len(item.queries)], embedded[: len(item.documents)]
    return [results[place] for place in range(len(items))]


def max_sim(query: np.ndarray, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of documents: the sum over query tokens of their best similarity.

    Args:
      query: float32[Lq, D].
      documents: N of float32[Ld, D].

    Returns:
      float32[N]; minus infinity for a document without a token.
    """
    scores = np.full(len(documents), -np.inf, np.float32)
    places = [place for place, rows in enumerate(documents) if len(rows)]
    start = 0
    while start < len(places):
        stop, tokens = start, 0
        while stop < len(places) and (stop == start or tokens < _TOKENS):
            tokens += len(documents[places[stop]])
            stop += 1
        part = [documents[place] for place in places[start:stop]]
        offsets = np.cumsum([0, *map(len, part[:-1])])
        similarity = np.concatenate(part) @ query.T
        scores[places[start:stop]] = np.maximum.reduceat(similarity, offsets).sum(axis=1)
        start = stop
    return scores
