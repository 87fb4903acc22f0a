"""A collection in several indexes, its shards, searched as one."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Hit, Retriever, hits_of
from colbert_jax.search.arrays import check_k

_ENCODED = 256  # queries whose token embeddings are in memory at a time

_T = TypeVar("_T")


def _score(hit: Any) -> float:
    return hit.score


def merge(
    rankings: Iterable[Iterable[_T]], k: int, score: Callable[[_T], float] = _score
) -> list[_T]:
    """The k best of several rankings of different documents, each the best first.

    Those of equal scores are in the order of the rankings, and within one as they are: what one
    search of all the documents, those of the first shard before those of the second, would give.

    Args:
      score: of an item; the higher the better.
    """
    return list(itertools.islice(heapq.merge(*rankings, key=lambda item: -score(item)), k))


class Shards:
    """Indexes of the parts of one collection, in one process, with one model.

    A document's score is its own shard's, whose centroids and buckets were trained on that shard.

    Attributes:
      model: the model that all were built with.
      retrievers: one a shard.
    """

    def __init__(self, retrievers: Sequence[Retriever]):
        """
        Raises ValueError for none, or retrievers of different models.
        """
        if not retrievers:
            raise ValueError("no shards: give at least one index")
        self.retrievers, self.model = list(retrievers), retrievers[0].model
        for one in self.retrievers:
            if one.model.fingerprint() != self.model.fingerprint():
                raise ValueError(
                    f"{one.index.path}: built with another model than {retrievers[0].index.path}: "
                    "their scores cannot be compared"
                )

    @classmethod
    def open(
        cls,
        folders: Iterable[str | os.PathLike],
        model: ColBERT | str | os.PathLike | None = None,
        **pretrained: Any,
    ) -> Shards:
        """Open indexes, with one model for all: arguments as of `Retriever.open`."""
        opened: list[Retriever] = []
        for folder in folders:
            if opened:
                opened.append(Retriever.open(folder, opened[0].model))
            else:
                opened.append(Retriever.open(folder, model, **pretrained))
        return cls(opened)

    def __len__(self) -> int:
        """The number of documents."""
        return sum(map(len, self.retrievers))

    def search(
        self,
        queries: str | Sequence[str],
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        texts: bool = True,
        **settings: Any,
    ) -> Any:
        """Find the k best documents of all shards: as `Retriever.search`.

        With `mode="exact"` it is the exact ranking of all documents; in other modes each shard's
        candidates are its own, as in searches of single shards.

        Args:
          queries, k, where, texts: as of `Retriever.search`.
          **settings: `mode` and PLAID's settings, see `Index.search`.

        Returns:
          as `Retriever.search`; `Hit.position` is the position in the document's own shard. Equal
          scores are ordered by the shard, then by the position.
        """
        k, listed = check_k(k), self.model.as_queries(queries)
        indexes = [one.index for one in self.retrievers]
        selected = [index.select(where) for index in indexes]
        settings["best_tokens"] = self.model.best_tokens
        found: list[list[Hit]] = []
        for start in range(0, len(listed), _ENCODED):
            encoded = self.model.encode_queries(listed[start : start + _ENCODED])
            parts = [
                hits_of(index, index.search(encoded, k, where=selection, **settings), texts)
                for index, selection in zip(indexes, selected, strict=True)
            ]
            found += [merge(rows, k) for rows in zip(*parts, strict=True)]
        return found[0] if isinstance(queries, str) else found

    def refresh(self) -> bool:
        """Search the shards as they are on disk now; whether any had changed."""
        return any([one.refresh() for one in self.retrievers])
