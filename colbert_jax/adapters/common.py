"""What adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colbert_jax.colbert import ColBERT
from colbert_jax.data.fields import Value
from colbert_jax.retriever import Hit, Retriever, rank_documents
from colbert_jax.serving.work import fields_of


def find(
    retriever: Retriever, query: str, k: int, settings: dict[str, Any] | None = None
) -> list[tuple[Hit, dict[str, Value]]]:
    """Hits of a query, each with the fields of its document, of one state of the index.

    Args:
      settings: further arguments of `Retriever.search`, such as `where`.
    """
    state = Retriever(retriever.model, retriever.index)
    hits = state.search(query, k, **(settings or {}))
    return list(zip(hits, fields_of(state, hits), strict=True))


def rank(
    model: ColBERT, query: str, texts: Sequence[str], k: int | None = None
) -> list[tuple[int, float]]:
    """Places and scores of texts, best first; those without a token are left out."""
    if not texts:
        return []
    return [(hit.position, hit.score) for hit in rank_documents(model, query, list(texts), k)]
