"""FLMR's three helpers over this library's index: build, open, search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.colbert import ColBERT
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.index import Index
from colbert_jax.search.arrays import Hits, concatenate_hits

_BATCH = 32  # queries searched in one call


def index_custom_collection(
    custom_collection: Sequence[Any],
    model: FLMRModelForRetrieval | ColBERT | str | Path,
    index_root_path: str | Path = ".",
    index_experiment_name: str = "default_experiment",
    index_name: str = "index",
    nbits: int = 8,
    doc_maxlen: int = 512,
    overwrite: bool = False,
    use_gpu: bool = True,
    indexing_batch_size: int = 64,
    model_temp_folder: str = "tmp",
    nranks: int = 1,
) -> str:
    """Build an index of passages.

    Args:
      custom_collection: strings, or tuples (text, None, None) as upstream's.
      model: a model, or the name of a checkpoint.
      nbits: bits per dimension of the residuals.
      doc_maxlen: longest document in tokens.
      overwrite: replace an index that is there; else it is left and its path returned.
      use_gpu, indexing_batch_size, model_temp_folder, nranks: not needed here; all local devices
        are used, and batches are chosen.

    Returns:
      the path of the index.
    """
    del use_gpu, indexing_batch_size, model_temp_folder, nranks
    path = _path(index_root_path, index_experiment_name, index_name, nbits)
    if path.exists() and not overwrite:
        return str(path)
    texts = [_text(i, item) for i, item in enumerate(custom_collection)]
    if isinstance(model, FLMRModelForRetrieval):
        colbert = model.colbert(doc_maxlen=doc_maxlen)
    elif isinstance(model, ColBERT):
        colbert = model
    else:
        colbert = ColBERT.from_pretrained(model, doc_maxlen=doc_maxlen)
    path.parent.mkdir(parents=True, exist_ok=True)
    Index.build(path, colbert, texts, nbits=nbits, overwrite=overwrite)
    return str(path)


class Searcher:
    """An open index, and the model that it was built with once a text is to be encoded."""

    def __init__(self, index: Index):
        self.index = index
        self._model: ColBERT | None = None

    def encode(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32[B, Lq, D], token embeddings of queries."""
        if self._model is None:
            self._model = ColBERT.for_index(self.index)
        return self._model.encode_queries(texts)

    def search(self, text: str, k: int = 10) -> tuple[list[int], list[int], list[float]]:
        """Document numbers, ranks from 1 and scores of one query."""
        hits = search_embeddings(self, self.encode([text]), k)
        ids = hits.positions[0].tolist()
        return ids, list(range(1, len(ids) + 1)), hits.scores[0].tolist()


class Ranking:
    """Results of several queries."""

    def __init__(self, data: dict[Any, list[tuple[int, int, float]]]):
        self.data = data

    def todict(self) -> dict[Any, list[tuple[int, int, float]]]:
        """Query id -> [(document number, rank from 1, score), ...], best first."""
        return dict(self.data)


def create_searcher(
    index_root_path: str | Path = ".",
    index_experiment_name: str = "default_experiment",
    index_name: str = "index",
    use_gpu: bool = True,
    nbits: int = 8,
) -> Searcher:
    """Open an index that `index_custom_collection` built under the same names."""
    del use_gpu
    return Searcher(Index.open(_path(index_root_path, index_experiment_name, index_name, nbits)))


def search_custom_collection(
    searcher: Searcher,
    queries: Mapping[Any, str],
    query_embeddings: Any,
    num_document_to_retrieve: int = 100,
    remove_zero_tensors: bool = True,
    centroid_search_batch_size: int | None = None,
    **settings: Any,
) -> Ranking:
    """Search with token embeddings of queries.

    Args:
      queries: id -> text, in the order of the embeddings.
      query_embeddings: [B, Lq, D], as `FLMRModelForRetrieval.query` gives.
      num_document_to_retrieve: results per query.
      remove_zero_tensors: rows of zeros never count here, so there is nothing to remove.
      centroid_search_batch_size: not needed here.
      **settings: ncells, centroid_score_threshold, ndocs, exact, for `Index.search`.
    """
    del remove_zero_tensors, centroid_search_batch_size
    embeddings = np.asarray(query_embeddings, np.float32)
    if len(embeddings) != len(queries):
        raise ValueError(f"{len(queries)} queries, but embeddings of {len(embeddings)}")
    hits = search_embeddings(searcher, embeddings, num_document_to_retrieve, **settings)
    return Ranking(
        {
            qid: [
                (int(i), rank, float(score))
                for rank, (i, score) in enumerate(zip(ids, scores, strict=True), 1)
            ]
            for qid, ids, scores in zip(queries, hits.positions, hits.scores, strict=True)
        }
    )


def search_embeddings(searcher: Searcher, queries: np.ndarray, k: int, **settings: Any) -> Hits:
    """Search with upstream's defaults: up to k = 100 those that Stanford takes for 100."""
    if k <= 100:
        settings = {"ncells": 2, "centroid_score_threshold": 0.45, "ndocs": 1024} | settings
    parts = [
        searcher.index.search(queries[i : i + _BATCH], k, **settings)
        for i in range(0, len(queries), _BATCH)
    ]
    return concatenate_hits(parts)


def _path(root: str | Path, experiment: str, name: str, nbits: int) -> Path:
    return Path(root) / experiment / "indexes" / f"{name}.nbits={nbits}"


def _text(i: int, item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, tuple) and len(item) == 3 and isinstance(item[0], str):
        if item[1] is not None or item[2] is not None:
            raise NotImplementedError(
                f"document {i} has an image: this is FLMR's text part; pass its text alone"
            )
        return item[0]
    raise TypeError(f"document {i} must be a string or (text, None, None), got {item!r:.80}")
