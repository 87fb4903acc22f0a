"""What is compared on a collection: BM25, one vector a text, exact MaxSim, PLAID at each nbits.

All but BM25 share the token embeddings of one encoder, which are held in memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.bm25 import Bm25, best, check_bm25
from colbert_jax.colbert import ColBERT
from colbert_jax.index.index import Index
from colbert_jax.runtime import apart
from colbert_jax.search.arrays import Hits
from colbert_jax.search.raw import RawSearch

SYSTEMS = ("bm25", "single", "exact", "plaid-1", "plaid-2", "plaid-4")
_PLAID = re.compile("plaid-([1248])")
_BATCH = 32  # queries of one search
_TIMED = 512  # queries that are timed, the first of them

Ranking = dict[str, dict[str, float]]


class Outcome(NamedTuple):
    """What a system found.

    ranking: qid -> pid -> score, best first.
    bytes_per_document: of what a search reads. None where it is not known.
    queries_per_second: of searching alone, after a first search; None where it is not known.
    """

    ranking: Ranking
    bytes_per_document: float | None
    queries_per_second: float | None


def check_systems(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown system, ImportError where one needs what is not there."""
    for name in names:
        if name not in ("bm25", "single", "exact") and not _PLAID.fullmatch(name):
            raise ValueError(
                f"system {name!r:.40}: expected bm25, single, exact, or plaid-N of 1, 2, 4, 8 bits"
            )
    if "bm25" in names:
        try:
            check_bm25()
        except ImportError as error:
            raise ImportError(f"the system bm25: {error}; or choose other systems") from None


class Workbench:
    """One collection and one encoder, for several systems."""

    def __init__(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        queries: Mapping[str, str],
        model: ColBERT | None,
        folder: Path,
        *,
        mode: str = "accurate",
    ):
        """
        Args:
          ids, texts: of the documents.
          queries: by id.
          model: the encoder; None where only BM25 runs.
          folder: for indexes, which are made there.
          mode: of PLAID, see `Index.search`.
        """
        self.ids, self.texts, self.queries, self.model = ids, texts, queries, model
        self.folder, self.mode = folder, mode

    @cached_property
    def documents(self):
        assert self.model is not None
        return self.model.encode_documents(list(self.texts))

    @cached_property
    def encoded(self) -> np.ndarray:
        """float32[Q, Lq, D]."""
        assert self.model is not None
        return self.model.encode_queries(list(self.queries.values()))

    def run(self, system: str, depth: int) -> Outcome:
        """Search all queries for the `depth` best documents."""
        depth = min(depth, len(self.ids))
        if system == "bm25":
            return self._bm25(depth)
        if system == "single":
            return self._single(depth)
        if system == "exact":
            return self._exact(depth)
        match = _PLAID.fullmatch(system)
        assert match is not None
        return self._plaid(int(match[1]), depth)

    def _bm25(self, depth: int) -> Outcome:
        made = Bm25.of(self.texts)
        asked = list(self.queries.values())

        def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
            count = len(asked[part])
            positions, scores = np.zeros((count, depth), int), np.zeros((count, depth), np.float32)
            for row, query in enumerate(asked[part]):
                all_scores = made.scores(query)
                found = best(all_scores, depth)
                positions[row, : len(found)] = found
                scores[row, : len(found)] = all_scores[found]
            return positions, scores

        ranking, speed = self._searched(search, positive=True)
        return Outcome(ranking, made.num_bytes / len(self.ids), speed)

    def _single(self, depth: int) -> Outcome:
        documents = self.documents
        vectors = _unit(np.stack([tokens.sum(0) for tokens in documents]))
        queries = _unit(self.encoded.sum(1))

        def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
            return _best(queries[part] @ vectors.T, depth)

        ranking, speed = self._searched(search)
        return Outcome(ranking, vectors.nbytes / len(self.ids), speed)

    @apart()
    def _exact(self, depth: int) -> Outcome:
        documents, model = self.documents, self.model
        assert model is not None
        raw = RawSearch(documents.values, documents.offsets)
        depth = min(depth, int((documents.lengths > 0).sum()))

        def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
            if model.best_tokens is not None:
                return _best(model.scores(self.encoded[part], documents), depth)
            return raw.search(self.encoded[part], depth)

        ranking, speed = self._searched(search)
        return Outcome(ranking, documents.values.nbytes / len(self.ids), speed)

    def _plaid(self, nbits: int, depth: int) -> Outcome:
        documents = self.documents
        path = self.folder / f"{nbits}.index"
        if not path.exists():
            Index.build(
                path,
                embeddings=documents.values,
                lengths=documents.lengths,
                nbits=nbits,
                progress=None,
            )
        index = Index.open(path)
        assert self.model is not None
        settings: dict[str, Any] = {"mode": self.mode, "best_tokens": self.model.best_tokens}
        ranking, speed = self._searched(
            lambda part: index.search(self.encoded[part], depth, **settings)
        )
        size = sum(file.stat().st_size for file in path.iterdir())
        return Outcome(ranking, size / len(self.ids), speed)

    def _searched(
        self, search: Callable[[slice], tuple[np.ndarray, np.ndarray] | Hits], positive=False
    ) -> tuple[Ranking, float]:
        """Rankings of all queries, and queries a second.

        Args:
          positive: leave out scores of zero: documents without a word of the query.
        """
        ranking: Ranking = {}
        names = list(self.queries)
        search(slice(0, _BATCH))  # compiled
        start, timed = time.perf_counter(), 0.0
        for part in _parts(len(names)):
            positions, scores = search(part)
            if part.stop >= min(_TIMED, len(names)) and not timed:
                timed = (time.perf_counter() - start) / part.stop
            for name, row, values in zip(
                names[part], positions.tolist(), scores.tolist(), strict=True
            ):
                ranking[name] = {
                    self.ids[i]: score
                    for i, score in zip(row, values, strict=True)
                    if not positive or score > 0
                }
        return ranking, 1 / timed


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _BATCH):
        yield slice(start, min(start + _BATCH, count))


def _best(scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores [B, depth] of the best of [B, N], equal ones by position."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return best, np.take_along_axis(scores, best, 1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
