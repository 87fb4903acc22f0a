"""`Index`: build one, open one, search it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax.bm25 import Bm25
from colbert_jax.compression.codec import ResidualCodec, decompress_on_host
from colbert_jax.compression.kmeans import num_centroids_for
from colbert_jax.compression.sharding import auto_mesh
from colbert_jax.config import MODES, IndexConfig, SearchConfig
from colbert_jax.data.fields import Value
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.files import resolved
from colbert_jax.index import changes, lexical
from colbert_jax.index import format as fmt
from colbert_jax.index.build import build_index
from colbert_jax.index.columns import ID, TEXT, Column, Positions, UnknownIdError, open_column
from colbert_jax.index.fields import FieldStore, verify_fields
from colbert_jax.index.filters import FilterError, parse_filter
from colbert_jax.index.folder import METADATA, changing, locate
from colbert_jax.index.inverted import check_inverted_lists, recent_lists
from colbert_jax.index.sources import (
    DocumentEncoder,
    DocumentSource,
    EmbeddingSource,
    TextSource,
)
from colbert_jax.runtime import apart, check_process
from colbert_jax.search.arrays import (
    DamagedArrayError,
    Hits,
    IndexArrays,
    check_codes,
    check_k,
)
from colbert_jax.search.backend import Backend, ShardedBackend, choose_backend
from colbert_jax.search.best_tokens import rescore, search_all
from colbert_jax.search.learned import LearnedArrays

LOGGER = logging.getLogger("colbert_jax")
_MANY_DELETED = 0.2  # of the documents: worth compacting
_MANY_OUTLIERS = 0.25  # of the tokens added: worth new centroids; a build has a tenth
_COMPARED = 1024  # texts in memory at a time


class Selection(NamedTuple):
    """Documents that a search may find.

    allowed: bool[N] by position; None: all of them.
    num_results: how many of them have a token.
    """

    allowed: np.ndarray | None
    num_results: int


class Index:
    """A compressed collection, searched with PLAID or exactly. Safe to share between threads.

    It is one state of the index, the one that was opened: changes by others or by its own methods
    do not touch it, they return the next state, as `refresh` does.

    Attributes:
      path: its folder.
      metadata: what `metadata.json` says.
      ids: the documents' own ids, as strings; `ids[i]` for the document at position i.
      texts: the documents' texts by position; None where they are not kept.
      lengths: int64[N], tokens of each document.
      deleted: bool[N], documents that are deleted and still have their place.
      arrays: the arrays that are searched, as they are on disk.
      backend: what searches them; None where there is nothing to find.
    """

    def __init__(
        self,
        path: Path,
        metadata: fmt.Metadata,
        files: dict[str, np.ndarray],
        mesh: Mesh | None = None,
        former: Index | None = None,
    ):
        """`former`: an earlier state of the index, whose work is not done again."""
        former = former if former is not None and former._is_continued(metadata) else None
        self.path, self.metadata, self._files = path, metadata, files
        self._mesh = mesh
        self._bm25: Bm25 | None = None
        self._making_bm25 = threading.Lock()
        self.lengths = np.diff(files["offsets"])
        self.deleted = self._read_deleted()
        self._num_results = int(((self.lengths > 0) & ~self.deleted).sum())
        # None: so that searches need not look.
        allowed = ~self.deleted if metadata.num_deleted else None
        self._everything = Selection(allowed, self._num_results)
        arrays = IndexArrays(*(files.get(name) for name in IndexArrays._fields))  # type: ignore[arg-type]
        with self._naming_the_file():
            self.arrays = arrays._replace(**self._recent_lists())  # type: ignore[arg-type]
        self._learned: LearnedArrays | None = None
        if metadata.learned is not None:
            self._learned = LearnedArrays(
                *(files[f"learned_{name}"] for name in LearnedArrays._fields)  # type: ignore[arg-type]
            )
        self.backend = self._choose_backend(former)
        self._fields: FieldStore | None = None
        if metadata.fields is not None:
            self._fields = FieldStore(path / metadata.fields, len(self.lengths))
        self.texts: Column | None = open_column(path, TEXT, files, metadata)
        known = None if former is None else former.ids
        ids = open_column(path, ID, files, metadata, known)
        self.ids: Column = ids or Positions(len(self.lengths))
        try:
            self._search_defaults = SearchConfig(**(metadata.model or {}).get("search", {}))
        except (TypeError, ValueError) as error:
            file = path / METADATA
            raise fmt.IndexFormatError(f"{file}: field 'model' is damaged: {error}") from None
        empty = int((self.lengths == 0).sum())
        if empty != metadata.num_empty_documents:
            raise fmt.IndexFormatError(
                f"{self._file('offsets')}: damaged: {empty} documents have no token, but "
                f"{METADATA} says {metadata.num_empty_documents}"
            )

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        model: DocumentEncoder | None = None,
        documents: Iterable[str] | Iterable[tuple[Any, str]] | None = None,
        *,
        embeddings: Any = None,
        lengths: Any = None,
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        nbits: int | None = None,
        kmeans_niters: int | None = None,
        num_centroids: int | None = None,
        buckets: str | None = None,
        learned_dim: int | None = None,
        seed: int | None = None,
        store_texts: bool = True,
        overwrite: bool = False,
        progress: bool | None = None,
        mesh: Mesh | None = None,
    ) -> Index:
        """Build an index from documents, or from ready token embeddings, and open it.

        An interrupted build leaves the former index untouched, and the same call goes on from its
        last finished chunk. Memory is bounded by a chunk and, beside it, about 100 bytes a document
        and 10 bytes a token of the training sample.

        Args:
          path: the index folder.
          model, documents: a model, and any iterable of texts, of pairs (id, text), or of triples
            (id, text, fields). It is read once.
          embeddings, lengths: or float[T, D] token embeddings of unit length (in memory or mapped),
            and the documents' lengths [N]; or a `DocumentEmbeddings` alone.
          ids: the documents' own ids, one each, where `documents` does not bring them. If None,
            0..N-1.
          fields: the documents' fields, a dict or None for each, where `documents` does not bring
            them: for searches of some documents only (docs/filters.md).
          nbits: bits per dimension of the residuals, 1, 2, 4 or 8. None: what the checkpoint asks
            for, else 2.
          kmeans_niters: None: what the checkpoint asks for, else 4.
          num_centroids: None: Stanford's rule; at most the number of tokens to train on.
          buckets: "optimal", the default, rounds residuals to the nearest direction;
            "quantile" is Stanford's rule. Both are read alike, by Stanford's code too.
          learned_dim: keep a vector of so many bytes for each document, which predicts its scores:
            candidates by one product, for searches with `candidates="learned"` (docs/indexes.md).
            None: what the checkpoint asks for, else none is kept.
          seed: of the sample, the centroids and the learned vectors.
          store_texts: keep the texts in the index.
          overwrite: replace an index that is there.
          progress: True for bars. If None, bars on a terminal, else log lines.
          mesh: one axis of devices for k-means and compression. None: all of them, those of every
            process under `jax.distributed` (docs/distributed.md); on one machine's CPU, its cores.

        Raises:
          FileExistsError: `path` is taken.
          RuntimeError: another process builds there.
          ValueError, TypeError: bad input, named.
        """
        make_source = _source("build", model, documents, embeddings, lengths, ids, fields)
        base = model.config.index if model is not None else IndexConfig()
        given = dict(
            nbits=nbits,
            kmeans_niters=kmeans_niters,
            num_centroids=num_centroids,
            buckets=buckets,
            learned_dim=learned_dim,
            seed=seed,
        )
        settings = {name: plain(value) for name, value in given.items() if value is not None}
        config = IndexConfig(**(vars(base) | settings))
        path = resolved(path)
        build_index(
            path,
            lambda: make_source(0),
            config,
            model=None if model is None else _remembered(model, documents),
            store_texts=store_texts,
            overwrite=overwrite,
            progress=progress,
            mesh=mesh,
        )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike, mesh: Mesh | None = None) -> Index:
        """Open an index. Arrays are mapped, not read.

        Args:
          path: the index folder.
          mesh: shard the documents over the devices of this mesh of one axis, and search on all of
            them. Under `jax.distributed` every process opens the same index with the same mesh,
            reads its own devices' part, and calls `search` with the same queries.

        Raises:
          FileNotFoundError: no index there.
          ValueError: damaged or half-copied, naming the file; or a mesh of several axes.
        """
        if mesh is not None:
            mesh = auto_mesh(mesh)
        return cls._open(resolved(path), mesh)

    @classmethod
    def _open(cls, path: Path, mesh: Mesh | None, former: Index | None = None) -> Index:
        while True:
            folder, metadata, arrays = fmt.open_arrays(path)
            try:
                opened = cls(folder, metadata, arrays, mesh, former)
                if metadata.fields is None or _state_of(path) == metadata.state:
                    return opened
            except FileNotFoundError:
                if _state_of(path) == metadata.state:
                    raise
            # It has changed since, so the fields may be another state's than the arrays.

    def __reduce__(self) -> Any:
        """Pickle the path, not the arrays.

        The process that unpickles it opens the folder. It raises ValueError if another index is
        there by then.

        Raises:
          pickle.PicklingError: the index is spread over a mesh of devices.
        """
        if isinstance(self.backend, ShardedBackend):
            raise pickle.PicklingError(
                f"{self.path}: spread over a mesh of devices: open it in each process"
            )
        return _open_again, (str(self.path), self.metadata.state)

    def __len__(self) -> int:
        """The number of documents, without those that are deleted."""
        return len(self.lengths) - self.metadata.num_deleted

    def __repr__(self) -> str:
        return (
            f"Index({str(self.path)!r}, {len(self)} documents, dim {self.dim}, {self.nbits} bits)"
        )

    @property
    def dim(self) -> int:
        return self.metadata.dim

    @property
    def nbits(self) -> int:
        return self.metadata.nbits

    @property
    @apart()
    def codec(self) -> ResidualCodec:
        return ResidualCodec(*map(jnp.asarray, self._codec_arrays()))

    def _codec_arrays(self) -> list[np.ndarray]:
        return [self._files[field.name] for field in dataclasses.fields(ResidualCodec)]

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
        candidates: str | None = None,
        where: Mapping[str, Any] | Selection | None = None,
        ids: Iterable[str] | None = None,
        best_tokens: int | None = None,
    ) -> Hits:
        """The k best documents of each query.

        `mode` is the one knob most need; each of PLAID's settings can be given beside it. A query
        with fewer candidates than results is searched again with more probes and in the end
        exactly: min(k, documents with a token) always come back.

        Only the width of the queries is compared with the index: arrays do not say which model they
        come from, and those of another model of the same width are searched as they are, for
        results that mean nothing. `Retriever` holds a model and an index that belong together.

        Args:
          queries: float[B, Lq, D], rows of zeros are padding.
          k: results per query.
          mode: "accurate" finds nine or ten of the ten best documents by exact scoring; settings
            that the checkpoint itself asks for go before its own. "fast" is PLAID at Stanford's
            settings. "exact" scores all documents on their decompressed embeddings.
          ncells: centroids probed per query token.
          centroid_score_threshold: a document token counts in the first ranking of candidates where
            its centroid scores at least this for some query token.
          ndocs: candidates kept by that ranking; a quarter of them are scored on their residuals.
            With learned candidates, how many there are, all scored.
          candidates: "plaid", by its stages, or "learned", by the learned vectors of an index that
            has them (`learned_dim` of `build`). If None, as the checkpoint asks, else "plaid".
          where, ids: find only these documents, see `select`; or `where` is what it returned.
          best_tokens: sum this many of a query's best matches, for models of Baleen's flipr
            (`ColBERT.best_tokens`): the documents that PLAID scores on their residuals, or with
            mode="exact" all, are scored so on the host. If None, MaxSim sums all.

        Returns:
          positions int32[B, min(k, N)] and scores float32 of that shape; here N counts documents
          with a token that may be found.

        Raises:
          ValueError, TypeError: another shape than [B, Lq, D], NaN, text, k below 1, an unknown
            mode, or settings of PLAID beside mode="exact" or candidates="learned"; learned
            candidates of an index without learned vectors; a damaged file of the index, named.
        """
        queries, k = self._checked(queries), check_k(k)
        given = {
            name: plain(value)
            for name, value in (
                ("ncells", ncells),
                ("centroid_score_threshold", centroid_score_threshold),
                ("ndocs", ndocs),
                ("candidates", candidates),
            )
            if value is not None
        }
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if mode == "exact" and given:
            raise ValueError(
                f'mode="exact" scores every document: {", ".join(given)} means nothing'
            )
        if best_tokens is not None and operator.index(best_tokens) < 1:
            raise ValueError(f"best_tokens must be at least 1, got {best_tokens}")
        settings = self._settings(mode, given)
        selection = where if isinstance(where, Selection) else self.select(where, ids)
        k = min(k, selection.num_results)
        if len(queries) == 0 or self.backend is None or k == 0:
            shape = len(queries), k
            return Hits(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        with self._naming_the_file():
            allowed = selection.allowed
            if mode == "exact":
                if best_tokens is not None:
                    return search_all(self.arrays, queries, k, best_tokens, allowed)
                return self.backend.exact(queries, k, allowed)
            search = self.backend.plaid
            if settings.candidates == "learned":
                search = self.backend.learned
            settings = settings.resolve(k, mode)
            if best_tokens is None:
                return search(queries, k, settings, allowed)
            last = min(max(int(settings.ndocs or 1) // 4, k), selection.num_results)
            found = search(queries, last, settings, allowed)
            return rescore(self.arrays, queries, found.positions, k, best_tokens)

    def _settings(self, mode: str, given: dict[str, Any]) -> SearchConfig:
        """Of a search, not yet resolved."""
        defaults = self._search_defaults
        learned = given.get("candidates", defaults.candidates) == "learned" and mode != "exact"
        if mode == "fast" or (learned and defaults.candidates != "learned"):
            defaults = SearchConfig(candidates=defaults.candidates)
        settings = dataclasses.replace(defaults, **given)
        if learned and self._learned is None:
            raise ValueError(
                f"{self.path}: has no learned vectors for candidates='learned': build it with "
                "learned_dim=512, or search with candidates='plaid'"
            )
        meaningless = [name for name in ("ncells", "centroid_score_threshold") if name in given]
        if learned and meaningless:
            raise ValueError(
                f"candidates='learned' probes no centroids: {', '.join(meaningless)} means nothing"
            )
        return settings

    def select(
        self, where: Mapping[str, Any] | None = None, ids: Iterable[str] | None = None
    ) -> Selection:
        """The documents that a search may find, for several searches of the same ones.

        Args:
          where: a condition on the documents' fields, such as `{"year": {"gte": 2020}}`
            (docs/filters.md). If None, all.
          ids: of documents. If None, all.

        Raises:
          UnknownIdError (a KeyError): no document has one of the ids.
          FilterError (a ValueError), TypeError: a condition that is none, saying where in it; or on
            a field that no document has.
        """
        if where is None and ids is None:
            return self._everything
        allowed = ~self.deleted
        if ids is not None:
            chosen = np.zeros(len(allowed), bool)
            chosen[[self.position(id) for id in ([ids] if isinstance(ids, str) else ids)]] = True
            allowed &= chosen
        if where is not None:
            if self._fields is None:
                parse_filter(where)
                raise FilterError(f"{self.path}: its documents have no fields")
            allowed &= self._fields.allowed(where)
        return Selection(allowed, int((allowed & (self.lengths > 0)).sum()))

    def position(self, id: str) -> int:
        """Where the document with an id is: `index.ids[index.position(id)] == id`.

        Raises:
          UnknownIdError (a KeyError): no document has it.
          TypeError: not a string.
        """
        if not isinstance(id, str):
            raise TypeError(f"a document's id is a string, got {id!r:.80}")
        position = self.ids.position(id, self.deleted)
        if position is None:
            raise UnknownIdError(f"{self.path}: no document has the id {id!r:.80}")
        return position

    def text(self, id: str) -> str:
        """The text of the document with an id.

        Raises:
          UnknownIdError (a KeyError): no document has it.
          ValueError: the index keeps no texts.
        """
        position = self.position(id)
        if self.texts is None:
            raise ValueError(f"{self.path}: keeps no texts (it was built with store_texts=False)")
        return self.texts[position]

    def fields(self, id: str) -> dict[str, Value]:
        """The fields of the document with an id; empty where it has none.

        Raises:
          UnknownIdError (a KeyError): no document has it.
        """
        position = self.position(id)
        return {} if self._fields is None else self._fields.fields(position)

    def field_names(self) -> dict[str, list[str]]:
        """The fields that documents have, and what they hold: number, string, bool, list."""
        return {} if self._fields is None else self._fields.names()

    @apart()
    def document_embeddings(self, i: int) -> np.ndarray:
        """float32[Ld, D], the decompressed token embeddings of document i."""
        check_process()
        i = range(len(self.lengths))[i]
        start, stop = self._files["offsets"][i : i + 2]
        codes, residuals = self._files["codes"][start:stop], self._files["residuals"][start:stop]
        count = len(self._files["centroids"])
        with self._naming_the_file():
            check_codes(((codes >= 0) & (codes < count)).all(), count)
        return decompress_on_host(ResidualCodec(*self._codec_arrays()), codes, residuals)

    # --- Words ---

    @property
    def keeps_bm25(self) -> bool:
        """Whether BM25 of the texts is in the folder, and is made again with every change."""
        return lexical.is_kept(self.path)

    def bm25(self) -> Bm25:
        """BM25 of the documents that are not deleted, by their order; for this state of the index.

        What `keep_bm25` has stored for this state; else it is made from the texts, which takes
        seconds for each hundred thousand documents, and held in memory.

        Raises:
          ValueError: the index keeps no texts; or what is stored is damaged.
          ImportError: bm25s or PyStemmer are not installed.
        """
        with self._making_bm25:
            if self._bm25 is None:
                self._bm25 = lexical.read(self.path, self.metadata.state)
            if self._bm25 is None:
                start = time.monotonic()
                self._bm25 = self._new_bm25()
                LOGGER.info(
                    "%s: BM25 of %d documents made in %.1f s",
                    self.path,
                    len(self),
                    time.monotonic() - start,
                )
            return self._bm25

    def bm25_scores(self, query: str) -> np.ndarray:
        """BM25 of a query with every document, by position.

        Returns:
          float32[N], 0 where a document has no word of the query, or is deleted.

        Raises: as `bm25`.
        """
        found = self.bm25().scores(query)
        if not self.metadata.num_deleted:
            return found
        scores = np.zeros(len(self.lengths), np.float32)
        scores[~self.deleted] = found
        return scores

    def keep_bm25(self) -> Index:
        """Make BM25 of the texts, store it with the index, and return the index as it is now.

        Every later change makes it again, also one of another process that has bm25s. Where that
        was not possible, `bm25` makes it in memory: it is never that of another state.

        Raises:
          ValueError: the index keeps no texts.
          ImportError: bm25s or PyStemmer are not installed.
          RuntimeError: somebody else builds or changes the index.
        """
        with changing(self.path, "bm25") as folder:
            now = self.refresh()
            made = now._new_bm25()
            lexical.publish(folder, now.path, now.metadata.state, made)
        now._bm25 = made
        return now

    def _new_bm25(self) -> Bm25:
        if self.texts is None:
            raise ValueError(
                f"{self.path}: keeps no texts, of which BM25 is made (store_texts=False): build it "
                "again"
            )
        changes.check_whole(self.path, self.metadata, fmt.string_arrays(TEXT))
        texts = self.texts
        return Bm25.of(texts.one(i) for i in np.flatnonzero(~self.deleted).tolist())

    def _changed(self, kept: bool) -> Index:
        """The index after a change, with BM25 if it was kept."""
        now = self.refresh()
        if not kept or lexical.is_there(now.path, now.metadata.state):
            return now
        try:
            return now.keep_bm25()
        except (ImportError, RuntimeError, OSError) as error:
            # The change is made. Who searches makes its own, or the next change does.
            LOGGER.warning("%s: BM25 is not up to date: %s", self.path, error)
            return now

    # --- Changes ---

    def refresh(self) -> Index:
        """The index as it is at `path` now; this one, where nothing has changed.

        Raises:
          FileNotFoundError, ValueError: as `open`.
        """
        if _state_of(self.path) == self.metadata.state:
            return self
        return self._open(self.path, self._mesh, self)

    def add(
        self,
        model: DocumentEncoder | None = None,
        documents: Iterable[str] | Iterable[tuple[Any, str]] | None = None,
        *,
        embeddings: Any = None,
        lengths: Any = None,
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        progress: bool | None = None,
    ) -> Index:
        """Add documents at the end, and return the index with them; this one stays as it is.

        Searches go on meanwhile, here and in other processes. Interrupted, the index stays as it
        was, and the same call goes on from its last finished chunk. New documents are compressed
        with the index's centroids; where these do not fit them, new ones are added.

        Args:
          model, documents, embeddings, lengths, ids, fields: as of `build`. Documents without ids
            get the next numbers, where the others have numbers too.
          progress: None: bars on a terminal.

        Raises:
          DuplicateIdError (a ValueError): ids that are there, before anything is encoded.
          RuntimeError: somebody else builds or changes the index.
          ValueError, TypeError: bad input, named; or another model than the index was built with.
        """
        return self._grown("add", model, documents, embeddings, lengths, ids, fields, progress)

    def update(
        self,
        model: DocumentEncoder | None = None,
        documents: Iterable[tuple[Any, str]] | None = None,
        *,
        embeddings: Any = None,
        lengths: Any = None,
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        progress: bool | None = None,
    ) -> Index:
        """Replace documents by new ones of the same ids; as `add` else.

        Raises:
          UnknownIdError (a KeyError): ids that are not there, before anything is encoded.
        """
        return self._grown("update", model, documents, embeddings, lengths, ids, fields, progress)

    def upsert(
        self,
        model: DocumentEncoder | None = None,
        documents: Iterable[tuple[Any, str]] | None = None,
        *,
        embeddings: Any = None,
        lengths: Any = None,
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        progress: bool | None = None,
    ) -> Index:
        """Add documents, replacing those whose ids are there; as `add` else."""
        return self._grown("upsert", model, documents, embeddings, lengths, ids, fields, progress)

    def delete(self, ids: str | Iterable[str]) -> Index:
        """Delete documents by their ids, and return the index without them.

        Raises:
          UnknownIdError (a KeyError): naming ids that no document has; nothing is deleted.
          RuntimeError: somebody else builds or changes the index.
        """
        kept = self.keeps_bm25
        changes.delete_documents(self.path, self._opened_now, ids)
        return self._changed(kept)

    def compact(self, progress: bool | None = None) -> Index:
        """Free the room of deleted documents; positions change, ids stay.

        Raises:
          RuntimeError: somebody else builds or changes the index.
        """
        kept = self.keeps_bm25
        changes.compact(self.path, self._opened_now, progress)
        return self._changed(kept)

    def retrain(self, model: DocumentEncoder, progress: bool | None = None) -> Index:
        """Build the index again from the texts that it keeps, and return that.

        Raises:
          ValueError: it keeps no texts.
          RuntimeError: somebody else builds or changes the index.
        """
        self._check_model(model)
        if _images_of(self.metadata.model) is not None:
            raise ValueError(
                f"{self.path}: has documents with images, which it does not keep: build it again "
                "from the collection"
            )
        if self.texts is None:
            raise ValueError(
                f"{self.path}: keeps no texts to encode again (store_texts=False): build it again"
            )

        def documents() -> Iterator[tuple[str, str, dict[str, Value]]]:
            now = self.refresh()  # whoever builds holds the index: it stays as it is
            changes.check_whole(now.path, now.metadata, changes.TOLD)
            assert now.texts is not None
            for i in np.flatnonzero(~now.deleted).tolist():
                fields = {} if now._fields is None else now._fields.fields(i)
                yield now.ids.one(i), now.texts.one(i), fields

        keeps_bm25 = self.keeps_bm25
        build_index(
            self.path,
            lambda: TextSource(model, documents()),
            changes.config_of(self.path, self.metadata),
            model=_remembered(model, None),
            overwrite=True,
            progress=progress,
            mesh=self._mesh,
        )
        return self._changed(keeps_bm25)

    def _grown(
        self,
        kind: str,
        model: DocumentEncoder | None,
        documents: Any,
        embeddings: Any,
        lengths: Any,
        ids: Iterable[Any] | None,
        fields: Iterable[Mapping[str, Any] | None] | None,
        progress: bool | None,
    ) -> Index:
        kept = _source(kind, model, documents, embeddings, lengths, ids, fields)
        now = self.refresh()
        keeps_bm25 = now.keeps_bm25
        if model is not None:
            now._check_model(model)
            with_images = getattr(documents, "images", None) is not None
            if with_images and _images_of(now.metadata.model) is None:
                raise ValueError(
                    f"{self.path}: was built for documents of texts: for documents with images "
                    "build it anew, with images="
                )
        if now.metadata.num_centroids == 0 and kind != "update":
            # Nothing was ever in it: its first documents are what a build starts from.
            build_index(
                self.path,
                lambda: kept(0),
                changes.config_of(now.path, now.metadata),
                model=now.metadata.model,
                store_texts=TEXT in now.metadata.columns,
                overwrite=True,
                progress=progress,
                mesh=self._mesh,
            )
        else:
            changes.add_documents(self.path, self._opened_now, kept, kind, progress)
        return self._changed(keeps_bm25)

    def _check_model(self, model: DocumentEncoder) -> None:
        """Raises ValueError for another model than the one whose embeddings are indexed."""
        known = self.metadata.model
        if known is not None and model.describe()["fingerprint"] != known["fingerprint"]:
            raise ValueError(
                f"{self.path}: was built with another checkpoint, or other document settings; its "
                "own is at " + known["load"]["name_or_path"]
            )
        check_same_images(self, model)

    def _opened_now(self) -> changes.Opened:
        now = self.refresh()
        if now is self:  # somebody may have damaged it since
            fmt.open_arrays(self.path)
            if self.metadata.fields is not None:
                FieldStore(self.path / self.metadata.fields, len(self.lengths)).close()
        return changes.Opened(now.path, now.metadata, now._files, now.ids, now.deleted)

    def advice(self) -> list[str]:
        """What would make searches of a changed index faster or better, in words."""
        found: list[str] = []
        change = self.metadata.change
        if change is None or not len(self):
            return found
        if self.metadata.num_deleted > _MANY_DELETED * len(self.lengths):
            share = self.metadata.num_deleted / len(self.lengths)
            found.append(f"{share:.0%} of the documents are deleted: compact frees their room")
        tokens = int(self.lengths[~self.deleted].sum())
        fit = num_centroids_for(tokens)
        own = self.metadata.settings.get("num_centroids") is not None
        if not own and not fit / 2 <= self.metadata.num_centroids <= 2 * fit:
            found.append(
                f"{self.metadata.num_centroids} centroids, a build of as many tokens would have "
                f"{fit}: compact with retrain makes them anew"
            )
        elif change.num_outliers > _MANY_OUTLIERS * change.num_added_tokens:
            found.append(
                f"{change.num_outliers / change.num_added_tokens:.0%} of the tokens added are far "
                "from all centroids: compact with retrain makes them anew"
            )
        return found

    # --- Files ---

    def _file(self, array: str) -> Path:
        return self.path / _file_name(self.metadata, array)

    def _is_continued(self, metadata: fmt.Metadata) -> bool:
        """Whether what is here is still there in a later state, in its place."""
        own = self.metadata
        return metadata.build == own.build and all(
            metadata.file(name) == own.file(name)
            for name in fmt.array_specs(own).keys() & fmt.GROWING - {"deleted"}
        )

    def _choose_backend(self, former: Index | None) -> Backend | None:
        if self._num_results == 0:
            return None
        try:
            with self._naming_the_file():
                if former is not None and former.backend is not None:
                    return former.backend.grown(self.arrays, self._learned)
                return choose_backend(self.arrays, self._mesh, self._learned)
        except NotImplementedError as error:
            raise NotImplementedError(f"{self.path}: {error}") from None

    def _read_deleted(self) -> np.ndarray:
        """bool[N]. Raises IndexFormatError unless as many are deleted as the metadata says."""
        count, marks = len(self.lengths), self._files.get("deleted")
        if marks is None:
            return np.zeros(count, bool)
        bits = np.unpackbits(np.asarray(marks), bitorder="little")
        found, known = int(bits[:count].sum()), self.metadata.num_deleted
        if found != known or bits[count:].any():
            raise fmt.IndexFormatError(
                f"{self._file('deleted')}: damaged: marks {int(bits.sum())} documents, but "
                f"{METADATA} says {known}"
            )
        return bits[:count].astype(bool)

    def _recent_lists(self) -> dict[str, np.ndarray]:
        """Inverted lists of the documents that those on disk do not cover."""
        change = self.metadata.change
        if change is None or change.num_listed_documents == len(self.lengths):
            return {}
        lists = recent_lists(
            self._files["codes"],
            self._files["offsets"],
            change.num_listed_documents,
            self.metadata.num_centroids,
        )
        return dict(zip(("recent_lists", "recent_list_offsets"), lists, strict=True))

    def verify(self) -> None:
        """Read every file of the index that is at `path`, compare checksums, and lists with codes.

        Raises ValueError naming a file that is damaged or missing.
        """
        fmt.verify(self.path, _verify_contents)
        lexical.verify(self.path, _state_of(self.path))

    def _naming_the_file(self) -> contextlib.AbstractContextManager[None]:
        return _naming_the_file(self.path, self.metadata)

    def _checked(self, queries: Any) -> np.ndarray:
        if isinstance(queries, str) or (len(queries) and isinstance(queries[0], str)):
            raise TypeError("search takes embeddings: index.search(model.encode_queries(texts))")
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 3 or queries.shape[1] == 0:
            raise ValueError(
                f"queries must be [B, Lq, D], got {list(queries.shape)}"
                + ("; add a batch axis: queries[None]" if queries.ndim == 2 else "")
            )
        if queries.shape[2] != self.dim:
            raise ValueError(
                f"queries have {queries.shape[2]} dimensions, the index {self.path} has {self.dim}"
            )
        if not np.isfinite(queries).all():
            raise ValueError("queries contain NaN or infinite values")
        return queries


def _source(
    what: str,
    model: DocumentEncoder | None,
    documents: Any,
    embeddings: Any,
    lengths: Any,
    ids: Iterable[Any] | None,
    fields: Iterable[Mapping[str, Any] | None] | None,
) -> Callable[[int | None], DocumentSource]:
    """What makes the source of documents, given the position of the first.

    Raises TypeError for arguments that do not go together.
    """
    if isinstance(embeddings, DocumentEmbeddings) and lengths is None:
        embeddings, lengths = embeddings.values, embeddings.lengths
    by_text = model is not None and documents is not None
    by_array = embeddings is not None and lengths is not None
    if by_text == by_array or (model is None) != (documents is None):
        raise TypeError(
            f"Index.{what} takes a model and documents, or embeddings= and lengths=, not both"
        )
    if isinstance(documents, (str, bytes)):
        raise TypeError("documents must be an iterable of strings or of pairs, got one string")
    if model is not None:
        return lambda first: TextSource(model, documents, ids, fields, first=first)
    return lambda first: EmbeddingSource(embeddings, lengths, ids, fields, first=first)


def _state_of(path: Path) -> str:
    return fmt.read_metadata(locate(path)).state


def _verify_contents(folder: Path, metadata: fmt.Metadata) -> None:
    if metadata.fields is not None:
        known = metadata.checksums.get(metadata.fields)
        verify_fields(folder / metadata.fields, metadata.num_documents, known)
    folder, metadata, arrays = fmt.open_arrays(folder)
    change = metadata.change
    with _naming_the_file(folder, metadata):
        check_inverted_lists(
            arrays["codes"],
            arrays["offsets"],
            arrays["lists"],
            arrays["list_offsets"],
            metadata.num_documents if change is None else change.num_listed_documents,
            metadata.num_centroids,
        )


@contextlib.contextmanager
def _naming_the_file(folder: Path, metadata: fmt.Metadata) -> Iterator[None]:
    """Search knows arrays, whoever reads its errors knows files."""
    try:
        yield
    except DamagedArrayError as error:
        file = folder / _file_name(metadata, error.array)
        raise fmt.IndexFormatError(
            f"{file}: damaged: holds {error.holds}; copy the index again, or build it again"
        ) from None


def _file_name(metadata: fmt.Metadata, array: str) -> str:
    """Of an array that may be in memory only, such as recent lists."""
    known = metadata.change is None or array in metadata.change.files
    return metadata.file(array) if known else f"{array}.npy"


def check_documents(index: Index, documents: Sequence[str | tuple[str, str]], remedy: str) -> None:
    """Hold an index that is there to the documents that one is wanted of.

    Args:
      documents: texts, or pairs (id, text).
      remedy: what to do about another collection, for the error.

    Raises:
      FileExistsError: it holds other documents, or keeps no texts to be compared.
    """
    where = f"{index.path}: an index of another collection:"
    if len(index) != len(documents):
        raise FileExistsError(
            f"{where} {len(index)} documents, not these {len(documents)}; {remedy}"
        )
    if index.texts is None:
        raise FileExistsError(
            f"{index.path}: keeps no texts, so nobody knows whether it is of this collection; "
            f"{remedy}"
        )
    for start in range(0, len(documents), _COMPARED):
        part = documents[start : start + _COMPARED]
        positions = range(start, start + len(part))
        for i, document, text in zip(positions, part, index.texts[positions], strict=True):
            wanted = (index.ids[i], document) if isinstance(document, str) else document
            if wanted != (index.ids[i], text):
                raise FileExistsError(f"{where} document {i} is another one; {remedy}")


def _remembered(model: DocumentEncoder, documents: Any) -> dict[str, Any]:
    """What an index remembers of its model, and of what encodes images where there may be any."""
    known = model.describe()
    if getattr(documents, "images", None) is not None:
        content = getattr(documents, "images_content", None)
        known["images"] = {"fingerprint": model.image_fingerprint(), "content": content}
    return known


def _images_of(known: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    found = None if known is None else known.get("images")
    return found if isinstance(found, Mapping) else None


def check_same_images(index: Index, model: Any) -> None:
    """Raise ValueError if an index has documents with images, and the model would encode them
    otherwise or not at all."""
    known = _images_of(index.metadata.model)
    if known is None:
        return
    try:
        own = model.image_fingerprint()
    except ValueError:
        own = None
    if own != known.get("fingerprint"):
        what = "has no image encoder" if own is None else "encodes images otherwise"
        raise ValueError(
            f"{index.path}: has documents with images, and the model {what}: load the checkpoint "
            "that it was built with, without images=False"
        )


def _open_again(path: str, state: str) -> Index:
    """Open an index that `Index.__reduce__` has pickled."""
    index = Index.open(path)
    if index.metadata.state != state:
        raise ValueError(f"{path}: another index than the one that was pickled; open it again")
    return index


def plain(value: Any) -> Any:
    """A Python number for a numpy scalar, anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
