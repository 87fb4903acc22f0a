"""Reranking: the exact scores of queries with candidates of their own, for very many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import ladder_length, next_power_of_two
from colbert_jax.colbert import ColBERT
from colbert_jax.data.documents import Documents
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.multimodal import Query
from colbert_jax.progress import progress_bar
from colbert_jax.retriever import Hit, Retriever
from colbert_jax.runtime import apart
from colbert_jax.scoring.maxsim import maxsim_ragged
from colbert_jax.search.arrays import check_k

_QUERIES = 256  # of one block
_DOCUMENTS = 4096  # distinct candidates of one block, unless one query has more
_PAIRS = 1 << 12  # queries times candidates of one call, padding included


def rerank(
    model: ColBERT,
    batch: Iterable[tuple[Query, Any]],
    k: int | None = None,
    *,
    total: int | None = None,
    progress: bool | None = False,
) -> Iterator[list[Hit]]:
    """Order each query's own candidates by their exact scores.

    The pairs are read in blocks, in which every text is encoded once, however many queries have it;
    memory is bounded.

    Args:
      model: what encodes queries and documents.
      batch: pairs of a query and its candidates, which are anything that `Retriever.build` takes:
        texts, (id, text) pairs, a mapping from id to text.
      k: results per query. If None, all candidates that have a token.
      total: how many pairs there are, for the bar.
      progress: whether to show a bar; if None, on a terminal.

    Yields:
      hits of each query, best first; those of equal scores in the order of the candidates. A
      query without candidates has none. `Hit.position` is the place among the candidates.

    Raises:
      ValueError, TypeError: a blank query, a bad candidate, k below 1.
    """
    k = None if k is None else check_k(k)
    with progress_bar(total, "reranking", "query", progress) as bar:
        for queries, candidates in _blocks(batch):
            yield from _rerank(model, queries, candidates, k)
            bar.update(len(queries))


Pairs = list[tuple[str, str]]


def _blocks(batch: Iterable[tuple[Query, Any]]) -> Iterator[tuple[list[Query], list[Pairs]]]:
    """Queries and their candidates, (id, text) pairs, a block at a time."""
    queries: list[Query] = []
    candidates: list[Pairs] = []
    distinct: set[str] = set()
    for number, (query, documents) in enumerate(batch):
        try:
            listed = list(Documents(documents, fields=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"candidates of query {number}: {error}") from None
        pairs = [
            (str(i), one) if isinstance(one, str) else (str(one[0]), one[1])
            for i, one in enumerate(listed)
        ]
        texts = {text for _, text in pairs}
        if queries and (len(queries) == _QUERIES or len(distinct | texts) > _DOCUMENTS):
            yield queries, candidates
            queries, candidates, distinct = [], [], set()
        queries.append(query)
        candidates.append(pairs)
        distinct |= texts
    if queries:
        yield queries, candidates


def _rerank(
    model: ColBERT, queries: list[Query], candidates: list[Pairs], k: int | None
) -> Iterator[list[Hit]]:
    rows: dict[str, int] = {}
    for pairs in candidates:
        for _, text in pairs:
            rows.setdefault(text, len(rows))
    encoded_queries = model.encode_queries(model.as_queries(queries))
    encoded = model.encode_documents(list(rows), progress=False) if rows else None
    if encoded is None or not len(encoded.values):
        yield from ([] for _ in queries)
        return
    if model.config.interaction != "maxsim":
        yield from _rerank_on_host(model, encoded_queries, candidates, rows, encoded, k)
        return
    # Powers of two of tokens and documents, so that blocks of any size share a few programs.
    tokens, count = len(encoded.values), len(encoded)
    padded = np.pad(encoded.values, [(0, next_power_of_two(tokens) - tokens), (0, 0)])
    padding = (0, next_power_of_two(count) - count)
    with apart():
        values = jnp.asarray(padded)
        offsets = jnp.asarray(np.pad(encoded.offsets, padding, mode="edge"), jnp.int32)
    lengths = encoded.lengths
    most = next_power_of_two(max(map(len, candidates)))
    step = max(_PAIRS // most, 1)
    for start in range(0, len(queries), step):
        part = candidates[start : start + step]
        positions = np.full((step, most), -1, np.int32)
        for i, pairs in enumerate(part):
            positions[i, : len(pairs)] = [rows[text] for _, text in pairs]
        length = ladder_length(int(lengths[positions[positions >= 0]].max(initial=1)))
        vectors = encoded_queries[start : start + step]
        vectors = np.pad(vectors, [(0, step - len(vectors)), (0, 0), (0, 0)])
        with apart():
            scores = np.asarray(maxsim_ragged(vectors, values, offsets, positions, length=length))
        for pairs, row in zip(part, scores, strict=False):
            yield _best(pairs, row[: len(pairs)], k)


def _rerank_on_host(
    model: ColBERT,
    queries: np.ndarray,
    candidates: list[Pairs],
    rows: Mapping[str, int],
    encoded: DocumentEmbeddings,
    k: int | None,
) -> Iterator[list[Hit]]:
    """For models that score by another sum than MaxSim's."""
    for query, pairs in zip(queries, candidates, strict=True):
        own = DocumentEmbeddings.from_list([encoded[rows[text]] for _, text in pairs], model.dim)
        yield _best(pairs, model.scores(query[None], own)[0], k)


def _best(pairs: Pairs, scores: np.ndarray, k: int | None) -> list[Hit]:
    """Hits of the k best candidates that have a token."""
    order = np.argsort(-scores, kind="stable")[:k]
    return [
        Hit(pairs[i][0], float(scores[i]), pairs[i][1], i)
        for i in order.tolist()
        if scores[i] > -np.inf
    ]


def rerank_indexed(
    retriever: Retriever,
    batch: Iterable[tuple[Query, Sequence[str]]],
    k: int | None = None,
    *,
    total: int | None = None,
    progress: bool | None = False,
) -> Iterator[list[Hit]]:
    """`rerank` of documents of an index, by its compressed token embeddings: none is encoded.

    Args:
      batch: pairs of a query and the ids of its candidates.
      k, total, progress: see `rerank`.

    Raises:
      UnknownIdError (a KeyError): no document has one of the ids.
    """
    with progress_bar(total, "reranking", "query", progress) as bar:
        for query, ids in batch:
            wanted = list(ids)
            if not wanted:
                yield []
            else:
                number = len(wanted) if k is None else min(check_k(k), len(wanted))
                (hits,) = retriever.search_many(
                    [query], number, ids=wanted, mode="exact", texts=False
                )
                yield hits
            bar.update(1)


def candidate_texts(
    run: Mapping[str, Iterable[str]], documents: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """The texts of all candidates of a run, by id, out of a collection that is read once.

    Args:
      run: query id -> ids of candidates. documents: ids and texts.
    """
    wanted = {pid for pids in run.values() for pid in pids}
    return {pid: text for pid, text in documents if pid in wanted}
