"""`Retriever`: a model and the index that it built, as one object that answers with texts and ids.

Everything that people hold goes through it: the command line, the demo, FLMR's searcher, mining.
Below it are `ColBERT` (texts to token embeddings) and `Index` (token embeddings to positions).
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jax.sharding import Mesh

from colbert_jax.batching import ladder_length
from colbert_jax.bm25 import best, check_bm25
from colbert_jax.colbert import ColBERT
from colbert_jax.data.documents import Documents
from colbert_jax.explanation import Explanation
from colbert_jax.files import resolved
from colbert_jax.fusion import (
    Hybrid,
    as_hybrid,
    reciprocal_rank_fusion,
    relative_score_fusion,
)
from colbert_jax.index import Index
from colbert_jax.index.columns import DuplicateIdError
from colbert_jax.index.folder import METADATA, check_free
from colbert_jax.index.format import IndexFormatError
from colbert_jax.index.index import check_same_images
from colbert_jax.multimodal import Items, Query, blocks, refuse_bare_pair
from colbert_jax.progress import progress_bar
from colbert_jax.search.arrays import Hits, check_k

_READ = 4096  # queries that are sorted by length at a time, and whose hits are in memory
_HITS = 1 << 18  # hits in memory: fewer queries at a time where each has many
_ENCODED = 256  # queries whose token embeddings are in memory at a time
_TOKENS = 1 << 15  # tokens of these, padding included
_SEARCHED = 32  # queries of one call of the index
_PLACE = ("base", "revision")  # of where a checkpoint was, not of where it is now


class Ranks(NamedTuple):
    """Where each part of a hybrid search has a document, from 1; None where it is not among its
    results.

    late: late interaction. bm25: BM25.
    """

    late: int | None
    bm25: int | None


class Hit(NamedTuple):
    """A document that was found.

    id: the document's own id; its position, as a string, where the collection has no ids.
    score: MaxSim, the higher the better.
    text: the document; None where the index keeps no texts.
    position: of the document in the collection, from 0.
    """

    id: str
    score: float
    text: str | None
    position: int

    @property
    def ranks(self) -> Ranks | None:
        """None: those are a hybrid search's."""
        return None


class HybridHit(NamedTuple):
    """A document that a hybrid search found: as `Hit`, but

    score: what late interaction and BM25 make together.
    ranks: which of the two found it.
    """

    id: str
    score: float
    text: str | None
    position: int
    ranks: Ranks


class Retriever:
    """A late-interaction model together with an index of documents that it has embedded.

    Any number of threads may share one. It searches the state of the index that it opened, or made
    last; what other processes change is seen after `refresh`. A search that is under way goes on
    with the state that it began with.

    Attributes:
      model: the `ColBERT` that encodes queries.
      index: the `Index`, another one after every change.
    """

    def __init__(self, model: ColBERT, index: Index):
        """
        Args:
          model: the model whose token embeddings are indexed.
          index: an open index.

        Raises:
          ValueError: the index was built with another model or other document settings. Of an index
            that was built from ready embeddings only the width can be compared.
        """
        _check_together(model, index)
        self.model, self.index = model, index
        self._changing = threading.Lock()

    def __reduce__(self) -> Any:
        """Pickle the names of model and index, see theirs."""
        return Retriever, (self.model, self.index)

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        model: ColBERT | str | os.PathLike,
        documents: Any,
        *,
        images: str | None = None,
        nbits: int | None = None,
        kmeans_niters: int | None = None,
        num_centroids: int | None = None,
        buckets: str | None = None,
        learned_dim: int | None = None,
        seed: int | None = None,
        store_texts: bool = True,
        bm25: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        mesh: Mesh | None = None,
        **pretrained: Any,
    ) -> Retriever:
        """Index documents and open the result. Interrupted, the same call goes on where it was.

        Args:
          path: the index folder to make.
          model: a model, or what `ColBERT.from_pretrained` loads: a folder or a hub id.
          documents: strings, (id, text) pairs, records, a `datasets` dataset, a mapping from id to
            text, or the path of a collection file (`data.documents.Documents`). Read once.
          images: the name under which records, or the fields of (id, text, fields) triples, have an
            image, for a model with an image encoder: a path, bytes, a PIL image, an array or None.
            Images are decoded once before anything is encoded, and not kept.
          nbits, kmeans_niters, num_centroids, buckets, seed: of the compression, see `Index.build`.
          learned_dim: keep learned vectors of so many bytes, see `Index.build`.
          store_texts: keep the texts in the index.
          bm25: keep BM25 of the texts too, for hybrid searches, see `keep_bm25`.
          overwrite: replace an index that is at `path`; it stays until the new one is complete.
          progress: True for bars, False for silence. If None, bars on a terminal, else log lines.
          mesh: devices for k-means and compression, see `Index.build`.
          **pretrained: arguments of `ColBERT.from_pretrained`, if `model` is to be loaded.

        Raises:
          FileExistsError: `path` is taken.
          FileNotFoundError, TypeError, ValueError: bad input, named before the model is loaded
            where that is possible.
        """
        path = resolved(path)
        check_free(path, overwrite)
        if bm25:
            check_bm25()
            if not store_texts:
                raise ValueError("bm25=True needs the texts in the index: store_texts=True")
        listed: Any = Documents(documents, images=images)
        model = _load(model, pretrained)
        try:
            index = Index.build(
                path,
                model,
                listed,
                nbits=nbits,
                kmeans_niters=kmeans_niters,
                num_centroids=num_centroids,
                buckets=buckets,
                learned_dim=learned_dim,
                seed=seed,
                store_texts=store_texts,
                overwrite=overwrite,
                progress=progress,
                mesh=mesh,
            )
        except DuplicateIdError as error:
            if isinstance(documents, str | os.PathLike):
                raise DuplicateIdError(f"{documents}: {error}") from None
            raise
        if bm25 and jax.process_index() == 0:  # of those that build together
            index = index.keep_bm25()
        return cls(model, index)

    @classmethod
    def open(
        cls,
        index: str | os.PathLike | Index,
        model: ColBERT | str | os.PathLike | None = None,
        *,
        mesh: Mesh | None = None,
        **pretrained: Any,
    ) -> Retriever:
        """Open an index together with the model that it was built with.

        Args:
          index: the index folder, or an open index.
          model: where its checkpoint is now, a folder or a hub id; or the loaded model. If None,
            it is loaded from where it was when the index was built.
          mesh: shard the documents over these devices, see `Index.open`.
          **pretrained: arguments of `ColBERT.from_pretrained`, such as `query_maxlen=64`.

        Raises:
          FileNotFoundError: no index, or its checkpoint is not where it was.
          ValueError: a damaged index, another model than the one it was built with, or an index
            that was built from ready embeddings and no `model`.
        """
        if not isinstance(index, Index):
            index = Index.open(index, mesh)
        elif mesh is not None:
            raise TypeError("mesh= belongs to a path: this index is open already")
        if not isinstance(model, ColBERT):
            return cls(_model_of(index, model, pretrained), index)
        return cls(_load(model, pretrained), index)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Retriever({self.model.load['name_or_path']!r}, {self.index!r})"

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is a sequence of strings too
        self,
        queries: str,
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        ids: Iterable[str] | None = None,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
        hybrid: bool | str | Hybrid | None = None,
        candidates: str | None = None,
        texts: bool = True,
        progress: bool | None = False,
    ) -> list[Hit]: ...

    @overload
    def search(
        self,
        queries: Sequence[Query],
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        ids: Iterable[str] | None = None,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
        hybrid: bool | str | Hybrid | None = None,
        candidates: str | None = None,
        texts: bool = True,
        progress: bool | None = False,
    ) -> list[list[Hit]]: ...

    def search(
        self,
        queries: str | Sequence[Query],
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        ids: Iterable[str] | None = None,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
        hybrid: bool | str | Hybrid | None = None,
        candidates: str | None = None,
        texts: bool = True,
        progress: bool | None = False,
    ) -> Any:
        """Find the k best documents of a query, or of each of several.

        Args:
          queries: one query, or a list of them; for very many see `search_many`. In a list, a
            query of a model with an image encoder may be a pair (text, image), see `ColBERT`.
          k: results per query; fewer come only where fewer documents match and have a token.
          where: a condition on the documents' fields, such as `{"year": {"gte": 2020}}`, see
            docs/filters.md.
          ids: find only documents of these ids.
          mode: "accurate", "fast" (PLAID at Stanford's settings) or "exact", see `Index.search`.
          ncells, centroid_score_threshold, ndocs: single settings of PLAID, see `Index.search`.
          hybrid: look for the query's words too, with BM25, and make one ranking of both: True or
            "rrf" by ranks, "relative" by scores, a `Hybrid` for weights and depth
            (docs/hybrid.md).
          candidates: "plaid" or "learned", see `Index.search`.
          texts: False leaves `Hit.text` None and reads no text.
          progress: True for a bar. If None, a bar on a terminal, else log lines.

        Returns:
          hits, `HybridHit`s of a hybrid search, best first, equal scores by the smaller position;
          for a list of queries a list of such lists, in the order of the queries.

        Raises:
          ValueError, TypeError: an empty or blank query, by its place in the list; images that
            cannot be used; a bad setting or condition; a hybrid search of an index without texts.
          ImportError: bm25s or PyStemmer are not installed, which a hybrid search needs.
          UnknownIdError (a KeyError): no document has one of `ids`.
        """
        listed = self.model.as_queries(queries)
        found = list(
            self.search_many(
                listed,
                k,
                where=where,
                ids=ids,
                mode=mode,
                ncells=ncells,
                centroid_score_threshold=centroid_score_threshold,
                ndocs=ndocs,
                hybrid=hybrid,
                candidates=candidates,
                texts=texts,
                progress=progress,
            )
        )
        return found[0] if isinstance(queries, str) else found

    def search_many(
        self,
        queries: Iterable[Query],
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        ids: Iterable[str] | None = None,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
        hybrid: bool | str | Hybrid | None = None,
        candidates: str | None = None,
        texts: bool = True,
        progress: bool | None = False,
    ) -> Iterator[list[Hit]]:
        """Yield the k best documents of each of many queries, in their order.

        Up to 4,096 queries are taken at a time, sorted by length, and searched in blocks of about
        equal lengths, so memory is bounded however many there are and however long one is.

        Args:
          queries: an iterable, read as the results are taken.
          k, ...: as of `search`.

        Raises:
          ValueError, TypeError: a bad setting, at once; an empty or blank query, by its number,
            when it is read.
        """
        if isinstance(queries, str):
            raise TypeError("search_many takes several queries; search takes one")
        if self.model.images is not None:
            refuse_bare_pair(queries)
        settings: dict[str, Any] = dict(
            mode=mode,
            ncells=ncells,
            centroid_score_threshold=centroid_score_threshold,
            ndocs=ndocs,
            candidates=candidates,
        )
        index = self.index  # the same for all of it, whoever changes it meanwhile
        settings["where"] = index.select(where, ids)
        settings["best_tokens"] = self.model.best_tokens
        index.search(np.zeros((0, 1, index.dim), np.float32), k, **settings)
        both = as_hybrid(hybrid)
        if both is not None:
            index.bm25()
        return self._search_many(index, queries, k, settings, both, texts, progress)

    def _search_many(
        self,
        index: Index,
        queries: Iterable[Query],
        k: int,
        settings: dict[str, Any],
        hybrid: Hybrid | None,
        texts: bool,
        progress: bool | None,
    ) -> Iterator[list[Hit]]:
        total = operator.length_hint(queries) or None
        share = min(_READ, _HITS // max(min(k, len(index)), 1))
        size = max(share // _SEARCHED, 1) * _SEARCHED
        with progress_bar(total, "searching", "query", progress) as bar:
            for listed in blocks(queries, size, self.model.as_queries):
                found: list[list[Hit]] = [[]] * len(listed)
                for places, encoded in self._encoded(listed):
                    if hybrid is None:
                        hits = hits_of(index, index.search(encoded, k, **settings), texts)
                    else:
                        part = [listed.texts[place] for place in places.tolist()]
                        hits = _hybrid_hits(index, part, encoded, k, settings, hybrid, texts)
                    for place, row in zip(places.tolist(), hits, strict=True):
                        found[place] = row
                    bar.update(len(hits))
                yield from found

    def _encoded(self, queries: Items) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places of queries and their token embeddings [B, Lq, D], the longest first."""
        fixed = self.model.config.text.fixed_query_length
        if fixed is not None:
            lengths = np.full(len(queries), fixed)
        else:
            token_ids = self.model.tokenizer.queries(queries.texts).ids
            lengths = np.array([len(ids) for ids in token_ids])
        if self.model.images is not None:
            lengths[queries.with_image()] += self.model.images.query_rows
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            room = min(_TOKENS // int(lengths[order[start]]), _ENCODED)
            places = order[start : start + max(room // _SEARCHED, 1) * _SEARCHED]
            encoded = self.model.encode_queries(queries.take(places.tolist()))
            for at in range(0, len(places), _SEARCHED):
                part = places[at : at + _SEARCHED]
                width = int(lengths[part[0]])
                width = min(encoded.shape[1], ladder_length(width) if fixed is None else width)
                yield part, np.ascontiguousarray(encoded[at : at + _SEARCHED, :width])
            start += len(places)

    @overload
    def rank(self, queries: str, documents: Any, k: int | None = None) -> list[Hit]: ...

    @overload
    def rank(
        self, queries: Sequence[Query], documents: Any, k: int | None = None
    ) -> list[list[Hit]]: ...

    def rank(self, queries: str | Sequence[Query], documents: Any, k: int | None = None) -> Any:
        """Order documents that need not be in the index by their exact scores: `rank_documents`."""
        return rank_documents(self.model, queries, documents, k)

    def explain(self, query: Query, document: Query | Hit | HybridHit) -> Explanation:
        """Show which query words, and patches of its image, matched which words of a document.

        Args:
          query: the query, a text or a pair (text, image).
          document: a hit, the id of a document of the index, or any text, or pair (text, image). A
            string that is an id of the index is taken as the id. The index does not keep images:
            a hit or an id is its text alone.

        Returns:
          the similarities, to be printed or plotted. They are those of the text as the model embeds
          it, so their sum may differ from the score of the compressed document.

        Raises:
          ValueError: a blank query, or a document whose text the index does not keep.
        """
        return self.model.explain(query, self._text(document))

    def _text(self, document: Query | Hit | HybridHit) -> Query:
        """The text of a hit or an id; anything else is a text itself, or a pair."""
        index = self.index
        if isinstance(document, Hit | HybridHit):
            return document.text if document.text is not None else index.text(document.id)
        if not isinstance(document, str):
            return document
        try:
            return index.text(document)
        except KeyError:
            return document

    def add(
        self, documents: Any, *, images: str | None = None, progress: bool | None = None
    ) -> None:
        """Add documents to the index, while others search it; the next search finds them.

        Interrupted, the index stays as it was, and the same call goes on where it was.

        Args:
          documents: anything that `build` takes. Their ids must be new; without ids they get the
            next numbers, where the others have numbers too.
          images, progress: see `build`; images only where the index was built with images.

        Raises:
          DuplicateIdError (a ValueError): ids that are there, before anything is encoded.
          RuntimeError: somebody else builds or changes the index.
          ValueError, TypeError: bad input, named.
        """
        listed: Any = Documents(documents, images=images)
        self._change(lambda index: index.add(self.model, listed, progress=progress))

    def update(
        self, documents: Any, *, images: str | None = None, progress: bool | None = None
    ) -> None:
        """Replace documents by new ones of the same ids; as `add` else.

        Raises:
          UnknownIdError (a KeyError): ids that are not there, before anything is encoded.
        """
        listed: Any = Documents(documents, images=images)
        self._change(lambda index: index.update(self.model, listed, progress=progress))

    def upsert(
        self, documents: Any, *, images: str | None = None, progress: bool | None = None
    ) -> None:
        """Add documents, replacing those whose ids are there; as `add` else."""
        listed: Any = Documents(documents, images=images)
        self._change(lambda index: index.upsert(self.model, listed, progress=progress))

    def delete(self, ids: str | Iterable[str]) -> None:
        """Delete documents by their ids; the next search does not find them.

        Raises:
          UnknownIdError (a KeyError): naming ids that no document has; nothing is deleted.
          RuntimeError: somebody else builds or changes the index.
        """
        self._change(lambda index: index.delete(ids))

    def compact(self, *, retrain: bool = False, progress: bool | None = None) -> None:
        """Free the room of deleted documents; positions change, ids stay.

        Args:
          retrain: encode all texts and train the centroids again, as a build does. `colbert-jax
            info` says when that pays.
          progress: see `build`.

        Raises:
          ValueError: `retrain` of an index that keeps no texts.
          RuntimeError: somebody else builds or changes the index.
        """
        if retrain:
            self._change(lambda index: index.retrain(self.model, progress))
        else:
            self._change(lambda index: index.compact(progress))

    def keep_bm25(self) -> None:
        """Store BM25 of the texts with the index; every later change makes it again.

        Without it the first hybrid search of an opened index makes it in memory.

        Raises:
          ValueError: the index keeps no texts.
          ImportError: bm25s or PyStemmer are not installed.
          RuntimeError: somebody else builds or changes the index.
        """
        self._change(lambda index: index.keep_bm25())

    def refresh(self) -> bool:
        """Search the index as it is on disk now.

        Returns:
          whether it had changed.

        Raises:
          FileNotFoundError, ValueError: it is gone, damaged, or built anew with another model.
        """
        before = self.index
        self._change(lambda index: index.refresh())
        return self.index is not before

    def _change(self, change: Callable[[Index], Index]) -> None:
        with self._changing:
            index = change(self.index)
            if index is not self.index:
                _check_together(self.model, index)
                self.index = index


def hits_of(index: Index, hits: Hits, texts: bool) -> list[list[Hit]]:
    """Positions and scores of a batch, [B, k], as plain Python values.

    Args:
      texts: whether to read the documents' texts.
    """
    ids, kept = index.ids, index.texts if texts else None
    found = []
    for positions, scores in zip(hits.positions.tolist(), hits.scores.tolist(), strict=True):
        passages = [None] * len(positions) if kept is None else kept[positions]
        found.append(list(map(Hit, ids[positions], scores, passages, positions)))
    return found


def _hybrid_hits(
    index: Index,
    queries: Sequence[str],
    encoded: np.ndarray,
    k: int,
    settings: dict[str, Any],
    hybrid: Hybrid,
    texts: bool,
) -> Any:
    """`HybridHit`s of each query: the k best documents by late interaction and BM25 together."""
    depth = max(k, hybrid.depth)
    late = index.search(encoded, depth, **settings)
    allowed = settings["where"].allowed
    found = []
    for query, positions, scores in zip(queries, late.positions, late.scores, strict=True):
        by_words = index.bm25_scores(query)
        matched = best(by_words, depth, allowed)
        rankings, weights = (positions, matched), (1 - hybrid.bm25_weight, hybrid.bm25_weight)
        if hybrid.method == "rrf":
            fused = reciprocal_rank_fusion(rankings, weights, hybrid.constant)
        else:
            fused = relative_score_fusion(rankings, (scores, by_words[matched]), weights)
        ranks = [{int(one): n for n, one in enumerate(part, 1)} for part in rankings]
        top = Hits(fused[0][None, :k], fused[1][None, :k])
        found.append(
            [
                HybridHit(*hit, Ranks(*(of.get(hit.position) for of in ranks)))
                for hit in hits_of(index, top, texts)[0]
            ]
        )
    return found


def rank_documents(
    model: ColBERT,
    queries: str | Sequence[Query],
    documents: Any,
    k: int | None = None,
    *,
    weights: Sequence[float] | None = None,
    progress: bool | None = False,
) -> Any:
    """Order documents by their exact score with a query, or with each of several; no index.

    Args:
      model: what encodes queries and documents; every document is encoded once.
      queries: one query, or a list of them.
      documents: anything that `Retriever.build` takes; they are all held in memory.
      k: results per query. If None, all documents that have a token.
      weights: of the three scores of bge-m3, see `ColBERT.rank`. If None, MaxSim alone.
      progress: see `Retriever.build`.

    Returns:
      hits, best first, equal scores by the smaller position; for a list of queries a list of such
      lists.

    Raises:
      ValueError, TypeError: a blank query, a bad document, k below 1.
    """
    k = None if k is None else check_k(k)
    listed, pairs = model.as_queries(queries), list(Documents(documents, fields=False))
    ids = [str(i) if isinstance(p, str) else p[0] for i, p in enumerate(pairs)]
    texts = [p if isinstance(p, str) else p[1] for p in pairs]
    hits = model.rank(listed, texts, k, weights=weights, progress=progress)
    found = [
        [Hit(ids[i], score, texts[i], i) for i, score in zip(positions, scores, strict=True)]
        for positions, scores in zip(hits.positions.tolist(), hits.scores.tolist(), strict=True)
    ]
    return found[0] if isinstance(queries, str) else found


def _load(model: ColBERT | str | os.PathLike, pretrained: dict[str, Any]) -> ColBERT:
    if not isinstance(model, ColBERT):
        return ColBERT.from_pretrained(os.fspath(model), **pretrained)
    if pretrained:
        raise TypeError(
            f"{', '.join(pretrained)}: settings of a checkpoint to load, but the model is loaded "
            "already"
        )
    return model


def _model_of(
    index: Index, name_or_path: str | os.PathLike | None, pretrained: dict[str, Any]
) -> ColBERT:
    """Load the model that an index remembers; `name_or_path` if it has moved."""
    known = remembered_model(index)
    if known is None:
        if name_or_path is None:
            raise ValueError(
                f"{index.path}: built from ready embeddings, without a model; name a checkpoint"
            )
        return _load(name_or_path, pretrained)
    load = dict(known["load"])
    if name_or_path is not None:
        load = {name: value for name, value in load.items() if name not in _PLACE}
        load["name_or_path"] = str(name_or_path)
    try:
        return ColBERT.from_pretrained(**(load | pretrained))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. The index {index.path} was built with it; name its place if it moved"
        ) from None
    except TypeError as error:
        if pretrained:
            raise
        raise IndexFormatError(
            f"{index.path / METADATA}: field 'model' is damaged: {error}"
        ) from None


def remembered_model(index: Index) -> Mapping[str, Any] | None:
    """What an index says of its model: `load`, with a `name_or_path`, and `fingerprint`; None for
    one of ready embeddings.

    Raises:
      ValueError: that field of its metadata is damaged.
    """
    known = index.metadata.model
    if known is None:
        return None
    load = known.get("load")
    named = isinstance(load, dict) and isinstance(load.get("name_or_path"), str)
    if not named or not isinstance(known.get("fingerprint"), str):
        raise IndexFormatError(
            f"{index.path / METADATA}: field 'model' is damaged: it does not say which checkpoint "
            "the index was built with; copy the index anew, or build it again"
        )
    return known


def _check_together(model: ColBERT, index: Index) -> None:
    if model.dim != index.dim:
        raise ValueError(
            f"{index.path}: indexed token embeddings have {index.dim} dimensions, those of "
            f"{model.load['name_or_path']} have {model.dim}: it was built with another model"
        )
    known = remembered_model(index)
    if known is not None and model.fingerprint() != known["fingerprint"]:
        raise ValueError(
            f"{model.load['name_or_path']}: not the checkpoint, or not the document settings, that "
            f"{index.path} was built with (fingerprint {model.fingerprint()}, not "
            f"{known['fingerprint']})"
        )
    check_same_images(index, model)
