"""LangChain: a retriever over an index, and a compressor that reranks; extra `langchain`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
    Callbacks,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from colbert_jax.adapters.common import find, rank
from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Retriever


class ColBERTRetriever(BaseRetriever):
    """Documents of an index. Their fields are metadata, beside `score`.

    Attributes:
      retriever: an open index and its model.
      k: results of a query.
      search_kwargs: further arguments of `Retriever.search`, such as `{"where": {"year": 1965}}`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    retriever: Retriever = Field(exclude=True)
    k: int = 10
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        settings = self.search_kwargs | kwargs
        found = find(self.retriever, query, settings.pop("k", self.k), settings)
        return [
            Document(page_content=hit.text or "", id=hit.id, metadata=fields | {"score": hit.score})
            for hit, fields in found
        ]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return await asyncio.to_thread(
            self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **kwargs
        )


class ColBERTCompressor(BaseDocumentCompressor):
    """Orders documents of any retriever; the score is metadata `relevance_score`.

    Attributes:
      model: what scores them.
      k: documents to keep. If None, all.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: ColBERT = Field(exclude=True)
    k: int | None = None

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        texts = [document.page_content for document in documents]
        return [
            documents[place].model_copy(
                update={"metadata": documents[place].metadata | {"relevance_score": score}}
            )
            for place, score in rank(self.model, query, texts, self.k)
        ]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        return await asyncio.to_thread(self.compress_documents, documents, query, callbacks)
