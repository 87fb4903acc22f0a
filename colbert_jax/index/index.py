"""`Index`: build one, open one, search it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import ladder_length, next_power_of_two
from colbert_jax.compression.codec import ResidualCodec, decompress
from colbert_jax.config import IndexConfig, SearchConfig
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.index import format as fmt
from colbert_jax.index.build import build_index
from colbert_jax.index.sources import EmbeddingSource, PassageSource
from colbert_jax.search.arrays import Hits, IndexArrays, check_k
from colbert_jax.search.exact import exact_search
from colbert_jax.search.plaid import Capacity, initial_capacity, plaid_search

if TYPE_CHECKING:
    from colbert_jax.colbert import ColBERT

_WIDEN = 4  # times the probes for queries that found too few candidates
_INT32 = np.iinfo(np.int32).max


class Index:
    """A compressed collection, searched with PLAID or exactly.

    Attributes:
      path: its folder.
      metadata: what `metadata.json` holds.
      pids: the documents' own ids, as strings; `pids[i]` for document i.
      texts: the passages, or None where they are not kept.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.path, self.metadata = path, metadata
        if metadata["num_tokens"] > _INT32:
            raise NotImplementedError(
                f"{path}: {metadata['num_tokens']} tokens; one index holds at most {_INT32}"
            )
        self.lengths = np.diff(arrays["offsets"])
        self._list_lengths = np.diff(arrays["list_offsets"])
        names = IndexArrays._fields
        narrow = {n: arrays[n].astype(np.int32) for n in ("offsets", "list_offsets")}
        # On a CPU mapped arrays enter JAX without a copy; an accelerator gets its own.
        self.arrays = IndexArrays(
            *(jax.device_put(narrow.get(n, arrays[n]), may_alias=True) for n in names)
        )
        self._bucket_cutoffs = arrays["bucket_cutoffs"]
        columns = metadata["text_columns"]
        self.texts = (
            fmt.Strings(arrays["texts"], arrays["text_offsets"]) if "text" in columns else None
        )
        self.pids: fmt.Column = fmt.Positions(len(self.lengths))
        if "pid" in columns:
            self.pids = fmt.Strings(arrays["pids"], arrays["pid_offsets"])
        try:
            self._search_defaults = SearchConfig(**(metadata["model"] or {}).get("search", {}))
        except (TypeError, ValueError) as error:
            file = path / fmt.METADATA
            raise fmt.IndexFormatError(f"{file}: field 'model' is damaged: {error}") from None
        self._num_results = int((self.lengths > 0).sum())
        self._length = ladder_length(int(self.lengths.max(initial=1)))
        self._capacities: dict[tuple[int, int], Capacity] = {}

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        model: ColBERT | None = None,
        passages: Iterable[str] | None = None,
        *,
        embeddings: Any = None,
        lengths: Any = None,
        ids: Iterable[Any] | None = None,
        nbits: int | None = None,
        kmeans_niters: int | None = None,
        num_centroids: int | None = None,
        seed: int | None = None,
        store_texts: bool = True,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> Index:
        """Build an index from passages, or from ready token embeddings, and open it.

        An interrupted build leaves the former index untouched, and the same call goes on from its
        last finished chunk. Memory is bounded by a chunk and, beside it, about 100 bytes a document
        and 10 bytes a token of the training sample.

        Args:
          path: the index folder.
          model, passages: a model and any iterable of strings.
          embeddings, lengths: or float[T, D] token embeddings of unit length (in memory or mapped),
            and the documents' lengths [N]; or a `DocumentEmbeddings` alone.
          ids: the documents' own ids, one each; None: 0..N-1.
          nbits: bits per dimension of the residuals, 1, 2, 4 or 8. None: what the checkpoint asks
            for, else 2.
          kmeans_niters: None: what the checkpoint asks for, else 4.
          num_centroids: None: Stanford's rule; at most the number of tokens to train on.
          seed: of the sample and the centroids.
          store_texts: keep the passages in the index.
          overwrite: replace an index that is there.
          progress: None: bars on a terminal.

        Raises:
          FileExistsError: `path` is taken.
          RuntimeError: another process builds there.
          ValueError, TypeError: bad input, named.
        """
        if isinstance(embeddings, DocumentEmbeddings) and lengths is None:
            embeddings, lengths = embeddings.values, embeddings.lengths
        by_text = model is not None and passages is not None
        by_array = embeddings is not None and lengths is not None
        if by_text == by_array or (model is None) != (passages is None):
            raise TypeError(
                "Index.build takes a model and passages, or embeddings= and lengths=, not a mixture"
            )
        if isinstance(passages, (str, bytes)):
            raise TypeError("passages must be an iterable of strings, got one string")
        base = model.config.index if model is not None else IndexConfig()
        given = dict(
            nbits=nbits, kmeans_niters=kmeans_niters, num_centroids=num_centroids, seed=seed
        )
        settings = {name: plain(value) for name, value in given.items() if value is not None}
        config = IndexConfig(**(vars(base) | settings))
        path = resolved(path)
        build_index(
            path,
            lambda folder: (
                EmbeddingSource(embeddings, lengths)
                if by_array
                else PassageSource(model, passages, folder, progress)  # type: ignore[arg-type]
            ),
            config,
            ids=ids,
            model=None if model is None else describe(model),
            store_texts=store_texts,
            overwrite=overwrite,
            progress=progress,
        )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Index:
        """Open an index. Arrays are mapped, not read.

        Raises:
          FileNotFoundError: no index there.
          ValueError: damaged or half-copied, naming the file.
        """
        return cls(*fmt.open_arrays(resolved(path)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return (
            f"Index({str(self.path)!r}, {len(self)} documents, dim {self.dim}, {self.nbits} bits)"
        )

    @property
    def dim(self) -> int:
        return self.metadata["dim"]

    @property
    def nbits(self) -> int:
        return self.metadata["nbits"]

    @property
    def codec(self) -> ResidualCodec:
        return ResidualCodec(
            self.arrays.centroids, jnp.asarray(self._bucket_cutoffs), self.arrays.bucket_weights
        )

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        exact: bool = False,
        ncells: int | None = None,
        centroid_score_threshold: float | None = None,
        ndocs: int | None = None,
    ) -> Hits:
        """The k best documents of each query.

        Settings that are None take what the checkpoint asks for, else Stanford's default for this k
        (`SearchConfig.resolve`). A query with fewer candidates than results is searched again with
        more probes and in the end exactly: min(k, documents with a token) always come back.

        Args:
          queries: float[B, Lq, D], rows of zeros are padding.
          k: results per query.
          exact: score all documents on their decompressed embeddings, without PLAID's stages.
          ncells: centroids probed per query token.
          centroid_score_threshold: a document token counts in the first ranking of candidates where
            its centroid scores at least this for some query token.
          ndocs: candidates kept by that ranking; a quarter of them are scored on their residuals.

        Returns:
          ids int32[B, min(k, N)] and scores float32 of that shape; N counts documents with a token.

        Raises:
          ValueError, TypeError: another shape than [B, Lq, D], NaN, text, or k below 1.
        """
        queries = self._checked(queries)
        k = min(check_k(k), self._num_results)
        given = dict(ncells=ncells, centroid_score_threshold=centroid_score_threshold, ndocs=ndocs)
        settings = dataclasses.replace(
            self._search_defaults,
            **{name: plain(value) for name, value in given.items() if value is not None},
        )
        if len(queries) == 0:
            return Hits(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        if exact:
            return self._exact(queries, k)
        return self._plaid(queries, k, settings.resolve(k))

    def document_embeddings(self, i: int) -> np.ndarray:
        """float32[Ld, D], the decompressed token embeddings of document i."""
        i = range(len(self))[i]
        start, stop = int(self.arrays.offsets[i]), int(self.arrays.offsets[i + 1])
        codes, residuals = self.arrays.codes[start:stop], self.arrays.residuals[start:stop]
        return np.asarray(decompress(self.codec, codes, residuals))

    def verify(self) -> None:
        """Read every file and compare checksums. Raises ValueError naming the damaged file."""
        for name, expected in self.metadata["checksums"].items():
            if fmt.checksum(self.path / name) != expected:
                raise fmt.IndexFormatError(f"{self.path / name}: damaged: its checksum differs")

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

    def _plaid(self, queries: np.ndarray, k: int, settings: SearchConfig) -> Hits:
        batch, length = queries.shape[:2]
        # A power of two of queries, so that batches of any size share a few programs.
        padded = np.pad(queries, [(0, next_power_of_two(batch) - batch), (0, 0), (0, 0)])
        ncells = int(settings.ncells or 1)
        capacity = self._capacities.get((length, ncells))
        if capacity is None:
            capacity = initial_capacity(self._list_lengths, self._length, length, ncells)
        ids, scores, capacity = plaid_search(
            self.arrays, jnp.asarray(padded), k, settings, capacity
        )
        self._capacities[length, ncells] = capacity
        ids, scores = ids[:batch].copy(), scores[:batch].copy()
        short = np.flatnonzero((ids == len(self)).any(axis=1))
        if len(short):
            # Probing wider costs less than scoring everything, until it probes everything; a query
            # of zeros finds no candidates however wide.
            wider = ncells * _WIDEN
            again = queries[short]
            if wider < self.metadata["num_centroids"] and again.any(axis=(1, 2)).all():
                hits = self._plaid(again, k, dataclasses.replace(settings, ncells=wider))
            else:
                hits = self._exact(again, k)
            ids[short], scores[short] = hits
        return Hits(ids, scores)

    def _exact(self, queries: np.ndarray, k: int) -> Hits:
        return exact_search(self.arrays, self.lengths, jnp.asarray(queries), k)


def describe(model: ColBERT) -> dict[str, Any]:
    """What an index remembers of its model: how to load it, how to know it, its search settings."""
    return {
        "load": model.load,
        "fingerprint": model.fingerprint(),
        "search": vars(model.config.search),
    }


def plain(value: Any) -> Any:
    """A Python number for a numpy scalar, anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def resolved(path: str | os.PathLike) -> Path:
    """The real place of an index folder: `~`, `.` and links followed."""
    return Path(path).expanduser().resolve()
