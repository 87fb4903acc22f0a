"""Rankings in Stanford's format, as pairs of a query and a passage for a teacher to score."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from colbert_jax.data.lines import Lines
from colbert_jax.progress import progress_bar


class TextsById(Protocol):
    """Texts by their ids: `data.Texts` of a file, `MappedTexts` of a mapping.

    fingerprint: equal for equal texts.
    """

    fingerprint: str

    def row(self, key: int | str) -> int:
        """The row with an id. Raises KeyError."""
        ...

    def text(self, row: int) -> str:
        """The text of a row. Raises ValueError where it is empty."""
        ...


class MappedTexts:
    """Texts in a mapping, as `TextsById`."""

    def __init__(self, texts: Mapping[Any, str]):
        self._texts, self._keys = texts, list(texts)
        self._rows = {str(key): row for row, key in enumerate(self._keys)}
        self.fingerprint = hash_texts(texts)

    def row(self, key: int | str) -> int:
        return self._rows[str(key)]

    def text(self, row: int) -> str:
        text = self._texts[self._keys[row]]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the text with id {self._keys[row]!r:.80} is empty, or not a string")
        return text


def hash_texts(texts: Mapping[Any, str]) -> str:
    """A hash of ids and texts in their order."""
    digest = hashlib.sha256()
    for key, text in texts.items():
        digest.update(json.dumps([str(key), text]).encode())
    return digest.hexdigest()


class RankedPairs:
    """The pairs of a ranking: B queries, with P passages of theirs in all.

    qids: the B queries' ids.
    rows: int32[P], rows of the passages; query i has `rows[offsets[i]:offsets[i + 1]]`, first those
      of the ranking in its order, then labelled passages that are not in it.
    offsets: int64[B + 1].
    """

    def __init__(
        self,
        path: Path,
        queries: TextsById,
        passages: TextsById,
        positives: Mapping[str, Collection[str]] | None = None,
        progress: bool | None = None,
    ):
        """
        Args:
          path: TSV of `qid, pid, rank, ...`, the lines of a query together and by rank.
          positives: qid -> pids of labelled passages.

        Raises:
          ValueError: naming file and line, see `mining.score_ranking`.
        """
        self.queries, self.passages = queries, passages
        self._lines = Lines(path)
        self._positives = positives or {}
        self.qids: list[str] = []
        self._first_line: list[int] = []
        self._unranked: dict[int, list[str]] = {}  # labelled pids that are not in the ranking
        rows, offsets = array("i"), array("q", [0])
        ranked: set[int] = set()
        seen: set[str] = set()
        last = 0

        def close() -> None:
            extra = self._labelled(self.qids[-1])
            missing = sorted(extra.keys() - ranked)
            if missing:
                self._unranked[len(self.qids) - 1] = [extra[row] for row in missing]
            rows.extend(missing)
            offsets.append(len(rows))
            ranked.clear()

        with progress_bar(len(self._lines), "reading the ranking", "line", progress) as bar:
            for i in range(len(self._lines)):
                qid, pid, rank = self._lines.read(i, _parse)
                if not self.qids or qid != self.qids[-1]:
                    if self.qids:
                        close()
                    if qid in seen:
                        self._fail(
                            i, f"query {qid!r:.80} again, after another one: sort the ranking"
                        )
                    self._row(i, queries, qid, "query", "among the queries")
                    seen.add(qid)
                    self.qids.append(qid)
                    self._first_line.append(i)
                    last = 0
                if rank <= last:
                    self._fail(i, f"rank {rank!s:.20} of query {qid!r:.80} after rank {last}")
                row = self._row(i, passages, pid, "passage", "in the collection")
                if row in ranked:
                    self._fail(i, f"passage {pid!r:.80} of query {qid!r:.80} appears twice")
                ranked.add(row)
                rows.append(row)
                last = rank
                if i % 4096 == 4095:
                    bar.update(4096)
            close()
        self.rows = np.frombuffer(rows, np.int32)
        self.offsets = np.frombuffer(offsets, np.int64)

    def __len__(self) -> int:
        return len(self.qids)

    def pids(self, i: int) -> list[str]:
        """The ids of query i's passages."""
        extra = self._unranked.get(i, [])
        first = self._first_line[i]
        ranked = int(self.offsets[i + 1] - self.offsets[i]) - len(extra)
        return [self._lines.read(n, _parse)[1] for n in range(first, first + ranked)] + extra

    def query(self, i: int) -> str:
        """The text of query i."""
        return self.queries.text(self.queries.row(self.qids[i]))

    def documents(self, first: int, last: int) -> list[str]:
        """The texts of all passages of queries `first` to `last` - 1."""
        return [self.passages.text(row) for row in self.rows_of(first, last).tolist()]

    def rows_of(self, first: int, last: int) -> np.ndarray:
        """int32: the rows of these queries' passages."""
        return self.rows[self.offsets[first] : self.offsets[last]]

    def counts(self, first: int, last: int) -> np.ndarray:
        """int64[last - first]: how many passages each of these queries has."""
        return np.diff(self.offsets[first : last + 1])

    def end_of(self, first: int, pairs: int) -> int:
        """The end of the shortest run of queries from `first` on with at least `pairs` pairs."""
        enough = int(np.searchsorted(self.offsets, self.offsets[first] + pairs))
        return min(enough, len(self))

    def _labelled(self, qid: str) -> dict[int, str]:
        """Row -> pid of a query's labelled passages."""
        pids = self._positives.get(qid, ())
        return {_labelled_row(self.passages, qid, pid): pid for pid in pids}

    def _row(self, i: int, texts: TextsById, key: str, kind: str, where: str) -> int:
        try:
            return texts.row(key)
        except KeyError:
            self._fail(i, f"{kind} {key!r:.80} is not {where}")
            raise

    def _fail(self, i: int, message: str) -> None:
        raise ValueError(f"{self._lines.where(i)}: {message}")


def check_labels(positives: Mapping[str, Collection[str]] | None, passages: TextsById) -> None:
    """Raises ValueError for a labelled passage that is not in the collection."""
    for qid, pids in (positives or {}).items():
        for pid in pids:
            _labelled_row(passages, qid, pid)


def _labelled_row(passages: TextsById, qid: str, pid: str) -> int:
    try:
        return passages.row(pid)
    except KeyError:
        raise ValueError(
            f"positives: passage {pid!r:.80}, labelled for query {qid!r:.80}, is not in the "
            "collection"
        ) from None


def _parse(line: str) -> tuple[str, str, int]:
    fields = line.split("\t")
    if len(fields) < 3 or not fields[2].isdecimal():
        raise ValueError(f"expected 'qid<TAB>pid<TAB>rank<TAB>score', got {line[:80]!r}")
    return fields[0], fields[1], int(fields[2])
