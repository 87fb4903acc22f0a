"""`Index`: build one, open one, search it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax import runtime
from colbert_jax.compression.codec import ResidualCodec, decompress
from colbert_jax.config import MODES, IndexConfig, SearchConfig
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.files import checksum, resolved
from colbert_jax.index import format as fmt
from colbert_jax.index.build import build_index
from colbert_jax.index.sources import EmbeddingSource, PassageSource
from colbert_jax.search.arrays import Hits, IndexArrays, check_k, with_inverse_norms
from colbert_jax.search.cpu import CpuArrays, cpu_arrays, cpu_exact, cpu_search
from colbert_jax.search.exact import exact_search
from colbert_jax.search.plaid import initial_capacity, plaid_search
from colbert_jax.search.sharded import (
    ShardedArrays,
    check_mesh,
    shard_arrays,
    sharded_exact_search,
    sharded_plaid_search,
)

if TYPE_CHECKING:
    from colbert_jax.colbert import ColBERT

_WIDEN = 4  # times the probes for queries that found too few candidates
_INT32 = np.iinfo(np.int32).max


class Index:
    """A compressed collection, searched with PLAID or exactly.

    Attributes:
      path: its folder.
      metadata: what `metadata.json` holds.
      ids: the documents' own ids, as strings; `ids[i]` for the document at position i.
      texts: the passages, or None where they are not kept.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        arrays: dict[str, np.ndarray],
        mesh: Mesh | None = None,
    ):
        self.path, self.metadata = path, metadata
        sharded = mesh is not None and mesh.devices.size > 1
        self.lengths = np.diff(arrays["offsets"])
        self._list_lengths = np.diff(arrays["list_offsets"])
        self._files = arrays
        self._device = None if mesh is None else mesh.devices.flat[0]
        self._shards: ShardedArrays | None = None
        self._host: CpuArrays | None = None
        if mesh is not None and sharded:
            self._shards = shard_arrays(self._mapped(), mesh)
        elif mesh is None and runtime.use_cpu_kernels():
            self._host = cpu_arrays(self._mapped())
        elif metadata["num_tokens"] > _INT32:
            raise NotImplementedError(
                f"{path}: {metadata['num_tokens']} tokens; one device holds at most {_INT32}: "
                "shard the index over several, Index.open(path, mesh=...)"
            )
        columns = metadata["text_columns"]
        self.texts = (
            fmt.Strings(arrays["texts"], arrays["text_offsets"]) if "text" in columns else None
        )
        self.ids: fmt.Column = fmt.Positions(len(self.lengths))
        if "pid" in columns:
            self.ids = fmt.Strings(arrays["pids"], arrays["pid_offsets"])
        try:
            self._search_defaults = SearchConfig(**(metadata["model"] or {}).get("search", {}))
        except (TypeError, ValueError) as error:
            file = path / fmt.METADATA
            raise fmt.IndexFormatError(f"{file}: field 'model' is damaged: {error}") from None
        self._num_results = int((self.lengths > 0).sum())
        self._num_shards = mesh.devices.size if mesh is not None else 1
        self._capacities: dict[tuple[int, int], int] = {}

    def _mapped(self) -> IndexArrays:
        """The arrays as they are on disk."""
        return IndexArrays(*(self._files.get(name) for name in IndexArrays._fields))  # type: ignore[arg-type]

    @functools.cached_property
    def arrays(self) -> IndexArrays:
        """The arrays on the device; of a sharded index, as they are on disk."""
        if self._shards is not None:
            return self._mapped()
        narrow = {n: self._files[n].astype(np.int32) for n in ("offsets", "list_offsets")}
        # On a CPU mapped arrays enter JAX without a copy; an accelerator gets its own.
        placed = (
            jax.device_put(narrow.get(name, self._files.get(name)), self._device, may_alias=True)
            for name in IndexArrays._fields
        )
        return with_inverse_norms(IndexArrays(*placed))

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        model: ColBERT | None = None,
        documents: Iterable[str] | None = None,
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
        """Build an index from passages, or from ready token embeddings, and open it.

        An interrupted build leaves the former index untouched, and the same call goes on from its
        last finished chunk. Memory is bounded by a chunk and, beside it, about 100 bytes a document
        and 10 bytes a token of the training sample.

        Args:
          path: the index folder.
          model, documents: a model and any iterable of strings.
          embeddings, lengths: or float[T, D] token embeddings of unit length (in memory or mapped),
            and the documents' lengths [N]; or a `DocumentEmbeddings` alone.
          ids: the documents' own ids, one each; None: 0..N-1.
          nbits: bits per dimension of the residuals, 1, 2, 4 or 8. None: what the checkpoint asks
            for, else 2.
          kmeans_niters: None: what the checkpoint asks for, else 4.
          num_centroids: None: Stanford's rule; at most the number of tokens to train on.
          buckets: "optimal", the default, rounds residuals with the smallest squared error;
            "quantile" is Stanford's rule. Both are read alike, by Stanford's code too.
          seed: of the sample and the centroids.
          store_texts: keep the passages in the index.
          overwrite: replace an index that is there.
          progress: None: bars on a terminal.
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
            raise TypeError("documents must be an iterable of strings, got one string")
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
                EmbeddingSource(embeddings, lengths)
                if by_array
                else PassageSource(model, documents)  # type: ignore[arg-type]
            ),
            config,
            ids=ids,
            model=None if model is None else describe(model),
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
          ids int32[B, min(k, N)] and scores float32 of that shape; N counts documents with a token.

        Raises:
          ValueError, TypeError: another shape than [B, Lq, D], NaN, text, k below 1, an unknown
            mode, or settings of PLAID beside mode="exact".
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
        if mode == "exact":
            return self._exact(queries, k)
        return self._plaid(queries, k, settings.resolve(k, mode))

    def document_embeddings(self, i: int) -> np.ndarray:
        """float32[Ld, D], the decompressed token embeddings of document i."""
        i = range(len(self))[i]
        start, stop = self._files["offsets"][i : i + 2]
        codes, residuals = self._files["codes"][start:stop], self._files["residuals"][start:stop]
        return np.asarray(decompress(self.codec, jnp.asarray(codes), jnp.asarray(residuals)))

    def verify(self) -> None:
        """Read every file and compare checksums. Raises ValueError naming the damaged file."""
        for name, expected in self.metadata["checksums"].items():
            if checksum(self.path / name) != expected:
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
        ncells = int(settings.ncells or 1)
        if self._host is not None:
            ids, scores = cpu_search(self._host, queries, k, settings)
        else:
            ids, scores = self._plaid_by_xla(queries, k, settings, ncells)
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

    def _plaid_by_xla(
        self, queries: np.ndarray, k: int, settings: SearchConfig, ncells: int
    ) -> tuple[np.ndarray, np.ndarray]:
        key = queries.shape[1], ncells
        capacity = self._capacities.get(key)
        if capacity is None:
            capacity = initial_capacity(self._list_lengths, *key, shards=self._num_shards)
        if self._shards is None:
            found = plaid_search(self.arrays, queries, k, settings, capacity)
        else:
            found = sharded_plaid_search(self._shards, queries, k, settings, capacity)
        ids, scores, self._capacities[key] = found
        return ids.copy(), scores.copy()

    def _exact(self, queries: np.ndarray, k: int) -> Hits:
        if self._shards is not None:
            return sharded_exact_search(self._shards, self.lengths, queries, k)
        if self._host is not None:
            return Hits(*cpu_exact(self._host, queries, k))
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
