"""LlamaIndex: a retriever over an index, and a postprocessor that reranks; extra `llama-index`."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from colbert_jax.adapters.common import find, rank
from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Retriever


class ColBERTRetriever(BaseRetriever):
    """Documents of an index as nodes; their fields are metadata."""

    def __init__(
        self,
        retriever: Retriever,
        k: int = 10,
        search_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ):
        """
        Args:
          retriever: an open index and its model.
          k: results of a query.
          search_kwargs: further arguments of `Retriever.search`, such as `where`.
          **settings: of LlamaIndex's retrievers, such as `callback_manager`.
        """
        super().__init__(**settings)
        self._retriever, self._k, self._search_kwargs = retriever, k, search_kwargs

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = find(self._retriever, query_bundle.query_str, self._k, self._search_kwargs)
        return [
            NodeWithScore(
                node=TextNode(text=hit.text or "", id_=hit.id, metadata=fields), score=hit.score
            )
            for hit, fields in found
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class ColBERTRerank(BaseNodePostprocessor):
    """Orders nodes of any retriever by their scores with the query.

    Attributes:
      model: what scores them.
      top_n: nodes to keep. If None, all.
    """

    model: ColBERT = Field(exclude=True)
    top_n: int | None = None

    @classmethod
    def class_name(cls) -> str:
        return "ColBERTRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("ColBERTRerank needs the query: pass query_bundle or query_str")
        texts = [node.node.get_content() for node in nodes]
        return [
            NodeWithScore(node=nodes[place].node, score=score)
            for place, score in rank(self.model, query_bundle.query_str, texts, self.top_n)
        ]
