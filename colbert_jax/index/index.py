"""`Index`: build one, open one, search it."""

from __future__ import annotations

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
from colbert_jax.index import format as fmt
from colbert_jax.index.build import build_index
from colbert_jax.index.sources import EmbeddingSource, PassageSource
from colbert_jax.search.arrays import Hits, IndexArrays
from colbert_jax.search.exact import exact_search
from colbert_jax.search.plaid import Capacity, initial_capacity, plaid_search

if TYPE_CHECKING:
    from colbert_jax.colbert import ColBERT

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
        self.pids: fmt.Strings | list[str] | _Positions = _Positions(len(self.lengths))
        if "pid" in columns:
            self.pids = fmt.Strings(arrays["pids"], arrays["pid_offsets"])
        self._search_defaults = SearchConfig(**(metadata["model"] or {}).get("search", {}))
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
        embeddings: np.ndarray | None = None,
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
        last finished chunk. Memory is bounded by a chunk, whatever the collection's size.

        Args:
          path: the index folder.
          model, passages: a model and any iterable of strings.
          embeddings, lengths: or float[T, D] token embeddings of unit length (in memory or mapped),
            and the documents' lengths [N].
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
        settings = {name: value for name, value in given.items() if value is not None}
        config = IndexConfig(**(vars(base) | settings))
        path = Path(path)
        build_index(
            path,
            lambda folder: (
                EmbeddingSource(embeddings, lengths)  # type: ignore[arg-type]
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
        path = Path(path)
        metadata, arrays = fmt.open_arrays(path)
        return cls(path, metadata, arrays)

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
        (`SearchConfig.resolve`). A query whose candidates are fewer than the results asked for is
        scored exactly with every document, so that min(k, documents with a token) always come back.

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
          ValueError: another shape than [B, Lq, D], NaN, or k below 1.
        """
        queries = self._checked(queries)
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k must be a whole number >= 1, got {k!r}")
        k = min(int(k), self._num_results)
        settings = SearchConfig(
            ncells=ncells or self._search_defaults.ncells,
            centroid_score_threshold=(
                self._search_defaults.centroid_score_threshold
                if centroid_score_threshold is None
                else centroid_score_threshold
            ),
            ndocs=ndocs or self._search_defaults.ndocs,
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
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 3:
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
        shape = (length, int(settings.ncells or 1))
        capacity = self._capacities.get(shape)
        if capacity is None:
            capacity = initial_capacity(self._list_lengths, self._length, *shape)
        ids, scores, capacity = plaid_search(
            self.arrays, jnp.asarray(padded), k, settings, capacity
        )
        self._capacities[shape] = capacity
        ids, scores = ids[:batch].copy(), scores[:batch].copy()
        short = np.flatnonzero((ids == len(self)).any(axis=1))
        if len(short):
            ids[short], scores[short] = self._exact(queries[short], k)
        return Hits(ids, scores)

    def _exact(self, queries: np.ndarray, k: int) -> Hits:
        return exact_search(self.arrays, self.lengths, jnp.asarray(queries), k)


class _Positions:
    """Document ids of a collection without ids of its own: "0", "1", ..."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> str:
        return str(range(self._n)[i])


def describe(model: ColBERT) -> dict[str, Any]:
    """What an index remembers of its model: how to load it, how to know it, its search settings."""
    return {
        "load": model.load,
        "fingerprint": model.fingerprint(),
        "search": vars(model.config.search),
    }
