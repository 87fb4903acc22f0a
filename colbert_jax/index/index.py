"""`Index`: build one, open one, search it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax.compression.codec import ResidualCodec, decompress
from colbert_jax.compression.sharding import check_mesh
from colbert_jax.config import MODES, IndexConfig, SearchConfig
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.files import resolved
from colbert_jax.index import format as fmt
from colbert_jax.index.build import build_index
from colbert_jax.index.columns import ID, TEXT, Column, Positions, open_column
from colbert_jax.index.folder import METADATA
from colbert_jax.index.sources import DocumentEncoder, EmbeddingSource, TextSource
from colbert_jax.runtime import check_process
from colbert_jax.search.arrays import (
    DamagedArrayError,
    Hits,
    IndexArrays,
    check_codes,
    check_k,
)
from colbert_jax.search.backend import Backend, ShardedBackend, choose_backend

_COMPARED = 1024  # texts in memory at a time


class UnknownIdError(KeyError):
    """An id that no document of the index has."""

    def __str__(self) -> str:  # a KeyError's is its message in quotes
        return str(self.args[0])


class Index:
    """A compressed collection, searched with PLAID or exactly. Safe to share between threads.

    Attributes:
      path: its folder.
      metadata: what `metadata.json` says.
      ids: the documents' own ids, as strings; `ids[i]` for the document at position i.
      texts: the documents' texts by position; None where they are not kept.
      lengths: int64[N], tokens of each document.
      arrays: the arrays that are searched, as they are on disk.
      backend: what searches them.
    """

    def __init__(
        self,
        path: Path,
        metadata: fmt.Metadata,
        files: dict[str, np.ndarray],
        mesh: Mesh | None = None,
    ):
        self.path, self.metadata, self._files = path, metadata, files
        self.lengths = np.diff(files["offsets"])
        self.arrays = IndexArrays(*(files.get(name) for name in IndexArrays._fields))  # type: ignore[arg-type]
        try:
            with self._naming_the_file():
                self.backend: Backend = choose_backend(self.arrays, mesh)
        except NotImplementedError as error:
            raise NotImplementedError(f"{path}: {error}") from None
        self.texts: Column | None = open_column(path, TEXT, files)
        self.ids: Column = open_column(path, ID, files) or Positions(len(self.lengths))
        try:
            self._search_defaults = SearchConfig(**(metadata.model or {}).get("search", {}))
        except (TypeError, ValueError) as error:
            file = path / METADATA
            raise fmt.IndexFormatError(f"{file}: field 'model' is damaged: {error}") from None
        self._num_results = int((self.lengths > 0).sum())
        empty = len(self.lengths) - self._num_results
        if empty != metadata.num_empty_documents:
            raise fmt.IndexFormatError(
                f"{path / 'offsets.npy'}: damaged: {empty} documents have no token, but {METADATA} "
                f"says {metadata.num_empty_documents}"
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
        nbits: int | None = None,
        kmeans_niters: int | None = None,
        num_centroids: int | None = None,
        buckets: str | None = None,
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
          model, documents: a model, and any iterable of texts or of pairs (id, text). It is read
            once.
          embeddings, lengths: or float[T, D] token embeddings of unit length (in memory or mapped),
            and the documents' lengths [N]; or a `DocumentEmbeddings` alone.
          ids: the documents' own ids, one each, where `documents` does not bring them. If None,
            0..N-1.
          nbits: bits per dimension of the residuals, 1, 2, 4 or 8. None: what the checkpoint asks
            for, else 2.
          kmeans_niters: None: what the checkpoint asks for, else 4.
          num_centroids: None: Stanford's rule; at most the number of tokens to train on.
          buckets: "optimal", the default, rounds residuals with the smallest squared error;
            "quantile" is Stanford's rule. Both are read alike, by Stanford's code too.
          seed: of the sample and the centroids.
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
        if isinstance(embeddings, DocumentEmbeddings) and lengths is None:
            embeddings, lengths = embeddings.values, embeddings.lengths
        by_text = model is not None and documents is not None
        by_array = embeddings is not None and lengths is not None
        if by_text == by_array or (model is None) != (documents is None):
            raise TypeError(
                "Index.build takes a model and documents, or embeddings= and lengths=, not both"
            )
        if isinstance(documents, (str, bytes)):
            raise TypeError("documents must be an iterable of strings or of pairs, got one string")
        base = model.config.index if model is not None else IndexConfig()
        given = dict(
            nbits=nbits,
            kmeans_niters=kmeans_niters,
            num_centroids=num_centroids,
            buckets=buckets,
            seed=seed,
        )
        settings = {name: plain(value) for name, value in given.items() if value is not None}
        config = IndexConfig(**(vars(base) | settings))
        path = resolved(path)
        build_index(
            path,
            lambda: (
                EmbeddingSource(embeddings, lengths, ids)
                if by_array
                else TextSource(model, documents, ids)  # type: ignore[arg-type]
            ),
            config,
            model=None if model is None else model.describe(),
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
            check_mesh(mesh)
        return cls(*fmt.open_arrays(resolved(path)), mesh)

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
        return _open_again, (str(self.path), self.metadata.build)

    def __len__(self) -> int:
        return len(self.lengths)

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
    def codec(self) -> ResidualCodec:
        return ResidualCodec(
            *(jnp.asarray(self._files[field.name]) for field in dataclasses.fields(ResidualCodec))
        )

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        mode: str = "accurate",
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
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

        Returns:
          positions int32[B, min(k, N)] and scores float32 of that shape; here N counts documents
          with a token.

        Raises:
          ValueError, TypeError: another shape than [B, Lq, D], NaN, text, k below 1, an unknown
            mode, or settings of PLAID beside mode="exact"; a damaged file of the index, named.
        """
        queries = self._checked(queries)
        k = min(check_k(k), self._num_results)
        given = {
            name: plain(value)
            for name, value in (
                ("ncells", ncells),
                ("centroid_score_threshold", centroid_score_threshold),
                ("ndocs", ndocs),
            )
            if value is not None
        }
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if mode == "exact" and given:
            raise ValueError(
                f'mode="exact" scores every document: {", ".join(given)} means nothing'
            )
        defaults = SearchConfig() if mode == "fast" else self._search_defaults
        settings = dataclasses.replace(defaults, **given)
        if len(queries) == 0:
            return Hits(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        with self._naming_the_file():
            if mode == "exact":
                return self.backend.exact(queries, k)
            return self.backend.plaid(queries, k, settings.resolve(k, mode))

    def position(self, id: str) -> int:
        """Where the document with an id is: `index.ids[index.position(id)] == id`.

        Raises:
          UnknownIdError (a KeyError): no document has it.
          TypeError: not a string.
        """
        if not isinstance(id, str):
            raise TypeError(f"a document's id is a string, got {id!r:.80}")
        position = self.ids.position(id)
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

    def document_embeddings(self, i: int) -> np.ndarray:
        """float32[Ld, D], the decompressed token embeddings of document i."""
        check_process()
        i = range(len(self))[i]
        start, stop = self._files["offsets"][i : i + 2]
        codes, residuals = self._files["codes"][start:stop], self._files["residuals"][start:stop]
        count = len(self._files["centroids"])
        with self._naming_the_file():
            check_codes(((codes >= 0) & (codes < count)).all(), count)
        return np.asarray(decompress(self.codec, jnp.asarray(codes), jnp.asarray(residuals)))

    def verify(self) -> None:
        """Read every file of the index that is at `path`, and compare checksums.

        Raises ValueError naming a file that is damaged or missing.
        """
        fmt.verify(self.path)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Search knows arrays, whoever reads its errors knows files."""
        try:
            yield
        except DamagedArrayError as error:
            file = self.path / f"{error.array}.npy"
            raise fmt.IndexFormatError(
                f"{file}: damaged: holds {error.holds}; copy the index again, or build it again"
            ) from None

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


def _open_again(path: str, build: str) -> Index:
    """Open an index that `Index.__reduce__` has pickled."""
    index = Index.open(path)
    if index.metadata.build != build:
        raise ValueError(f"{path}: another index than the one that was pickled; open it again")
    return index


def plain(value: Any) -> Any:
    """A Python number for a numpy scalar, anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
