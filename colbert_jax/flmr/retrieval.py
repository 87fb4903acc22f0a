"""FLMR's three helpers over `Retriever` and `Index`: build, open, search."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.colbert import ColBERT
from colbert_jax.files import present_folder
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.index.index import Index, check_documents
from colbert_jax.multimodal import (
    NO_IMAGES,
    ClassTokens,
    ImagePart,
    Items,
    Query,
    images_fingerprint,
)
from colbert_jax.retriever import Retriever
from colbert_jax.search.arrays import concatenate_hits

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
    """Build an index of documents.

    Args:
      custom_collection: strings; pairs (text, image), where an image is what `colbert_jax.images`
        says, or None; or upstream's tuples (text, image_feature, image_path), where a feature, a
        class token float[hidden_size] or several, goes before the path. An image gives the token
        embeddings of its class token, before those of the text.
      model: a model, or the name of a checkpoint.
      nbits: bits per dimension of the residuals.
      doc_maxlen: longest document in tokens; a `ColBERT` goes by its own.
      overwrite: replace an existing index. If False, an existing one of the same collection and
        model is left as it is.
      use_gpu, indexing_batch_size, model_temp_folder, nranks: ignored: all local devices are used.

    Returns:
      the path of the index.

    Raises:
      FileExistsError: the index that is there is of another collection, model or `doc_maxlen`.
      ImageError (a ValueError): images that cannot be used, all named, before anything is encoded.
      NotImplementedError: images, and the model has no vision encoder.
    """
    del use_gpu, indexing_batch_size, model_temp_folder, nranks
    path = _path(index_root_path, index_experiment_name, index_name, nbits)
    documents = _Collection(custom_collection)
    if isinstance(model, FLMRModelForRetrieval | ColBERT):
        documents.check_model(model)
    documents.check_images()
    known = None
    if not overwrite and present_folder(path) and any(path.iterdir()):
        known = Index.open(path)
        check_documents(known, documents, _ANOTHER)  # before the model is loaded
        if documents.images_content != _images_content(known):
            raise FileExistsError(f"{path}: an index of another collection: its images; {_ANOTHER}")
    if isinstance(model, FLMRModelForRetrieval):
        colbert = model.colbert(doc_maxlen=doc_maxlen)
    elif isinstance(model, ColBERT):
        colbert = model
    else:
        colbert = ColBERT.from_pretrained(model, doc_maxlen=doc_maxlen)
    if known is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        documents.check_model(colbert)
        Index.build(path, colbert, documents, nbits=nbits, overwrite=overwrite)
    elif not _is_of(known, colbert):
        raise FileExistsError(f"{path}: built with another model or another doc_maxlen; {_ANOTHER}")
    return str(path)


_ANOTHER = "pass overwrite=True to replace it, or another index_name"


class Searcher:
    """An open index and the model that it was built with, which is loaded for the first text."""

    def __init__(self, index: Index):
        self.index = index
        self._lock = threading.Lock()
        self._retriever: Retriever | None = None

    def __reduce__(self) -> Any:
        """Pickle the index's path, see `Index.__reduce__`."""
        return Searcher, (self.index,)

    @property
    def retriever(self) -> Retriever:
        """Model and index as one object."""
        with self._lock:
            if self._retriever is None:
                self._retriever = Retriever.open(self.index)
            return self._retriever

    def encode(self, texts: str | Sequence[Query]) -> np.ndarray:
        """float32[B, Lq, D], token embeddings of queries."""
        return self.retriever.model.encode_queries(texts)

    def search(self, text: Query, k: int = 10) -> tuple[list[int], list[int], list[float]]:
        """Document positions, ranks from 1 and scores of one query, a text or (text, image)."""
        (hits,) = self.retriever.search([text], k, texts=False, **_upstream(k))
        return (
            [hit.position for hit in hits],
            list(range(1, len(hits) + 1)),
            [hit.score for hit in hits],
        )


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
    *,
    exact: bool = False,
    mode: str | None = None,
    **settings: Any,
) -> Ranking:
    """Search with token embeddings of queries.

    Args:
      queries: id -> text, in the order of the embeddings.
      query_embeddings: [B, Lq, D], as `FLMRModelForRetrieval.query` gives.
      num_document_to_retrieve: results per query.
      remove_zero_tensors: rows of zeros never count here, so there is nothing to remove.
      centroid_search_batch_size: not needed here.
      exact: score every document; the same as `mode="exact"`.
      mode: of `Index.search`. If None, upstream's settings for that number of results.
      **settings: ncells, centroid_score_threshold, ndocs, for `Index.search`.

    Raises:
      ValueError: another number of embeddings than queries, or settings of PLAID with exact search.
    """
    del remove_zero_tensors, centroid_search_batch_size
    embeddings = np.asarray(query_embeddings, np.float32)
    if len(embeddings) != len(queries):
        raise ValueError(f"{len(queries)} queries, but embeddings of {len(embeddings)}")
    if exact and mode not in (None, "exact"):
        raise ValueError(f"exact=True and mode={mode!r} contradict each other: give one of them")
    mode = "exact" if exact else mode
    k = num_document_to_retrieve
    settings = _upstream(k) | settings if mode is None else {"mode": mode} | settings
    parts = [
        searcher.index.search(embeddings[i : i + _BATCH], k, **settings)
        for i in range(0, len(embeddings) or 1, _BATCH)
    ]
    hits = concatenate_hits(parts)
    return Ranking(
        {
            qid: list(zip(positions, range(1, len(positions) + 1), scores, strict=True))
            for qid, positions, scores in zip(
                queries, hits.positions.tolist(), hits.scores.tolist(), strict=True
            )
        }
    )


def _upstream(k: int) -> dict[str, Any]:
    """Upstream's settings of PLAID: up to k = 100 those that Stanford takes for 100."""
    if k > 100:
        return {}
    return {"ncells": 2, "centroid_score_threshold": 0.45, "ndocs": 1024}


def _path(root: str | Path, experiment: str, name: str, nbits: int) -> Path:
    return Path(root) / experiment / "indexes" / f"{name}.nbits={nbits}"


class _Collection(list[str]):
    """The texts of a collection.

    Attributes:
      images: by position; None where there are none.
      images_content: a hash of them.
    """

    def __init__(self, items: Sequence[Any]):
        images: dict[int, Any] = {}
        super().__init__()
        for i, item in enumerate(items):
            text, image = _parts(i, item)
            self.append(text)
            if image is not None:
                images[i] = image
        self.images = images or None
        self.images_content: str | None = None

    def check_images(self) -> None:
        """Open all images. Raises ImageError, naming those that cannot be used."""
        if self.images is not None:
            Items(self, self.images, range(len(self)), "document").check_images()
            self.images_content = images_fingerprint(self.images)

    def check_model(self, model: FLMRModelForRetrieval | ColBERT) -> None:
        """Raise NotImplementedError for images and a model of texts, ValueError for class tokens
        of another width than the model's."""
        config: Any = (
            model.images.side.config if isinstance(model.images, ImagePart) else model.images
        )
        for i, image in (self.images or {}).items():
            if config is None:
                raise NotImplementedError(f"document {i} has an image, but {NO_IMAGES}")
            width = config.vision.hidden_size
            if isinstance(image, ClassTokens) and image.values.shape[1] != width:
                raise ValueError(
                    f"document {i}: image_feature must be [{width}] or [regions, {width}], got "
                    f"{list(image.values.shape)}"
                )


def _parts(i: int, item: Any) -> tuple[str, Any]:
    """Text and image, or class tokens, of an item."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, tuple) and len(item) in (2, 3) and isinstance(item[0], str):
        if len(item) == 2 or item[1] is None:
            return item[0], item[-1]
        feature = np.asarray(item[1])
        feature = feature[None] if feature.ndim == 1 else feature
        if feature.ndim != 2 or not len(feature) or feature.dtype.kind != "f":
            raise ValueError(
                f"document {i}: image_feature must be float[hidden_size] or "
                f"float[regions, hidden_size], got {feature.dtype} {list(np.shape(item[1]))}"
            )
        if not np.isfinite(feature).all():
            raise ValueError(f"document {i}: image_feature holds NaN or infinite values")
        return item[0], ClassTokens(feature.astype(np.float32))
    raise TypeError(
        f"document {i} must be a string, (text, image) or (text, image_feature, image_path), got "
        f"{item!r:.80}"
    )


def _is_of(index: Index, model: ColBERT) -> bool:
    """Whether an index was built with this model."""
    known = index.metadata.model or {}
    images = known.get("images")
    if known.get("fingerprint") != model.fingerprint():
        return False
    return images is None or images.get("fingerprint") == model.image_fingerprint()


def _images_content(index: Index) -> str | None:
    """The hash of an index's images that `_Collection` had."""
    known = (index.metadata.model or {}).get("images")
    return known.get("content") if isinstance(known, dict) else None
