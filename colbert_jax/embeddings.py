"""Token embeddings of documents: ragged, as flat values and offsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DocumentEmbeddings:
    """Token embeddings of documents of different lengths.

    values: float32[T, D], the token embeddings of all documents, one after the other.
    offsets: int64[N+1]; document i is values[offsets[i]:offsets[i+1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: Iterable[int]) -> DocumentEmbeddings:
        """Make them from flat values [T, D] and the documents' lengths [N].

        Raises ValueError unless the lengths add up to T.
        """
        offsets = offsets_from_lengths(np.asarray(lengths))
        if offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"lengths must be >= 0 and add up to {len(values)}, the rows of values"
            )
        return cls(values, offsets)

    @classmethod
    def from_list(cls, rows: list[np.ndarray], dim: int) -> DocumentEmbeddings:
        """Make them from one [Ld, D] array per document; `dim` is D."""
        values = np.concatenate(rows) if rows else np.zeros((0, dim), np.float32)
        return cls.from_lengths(values, [len(row) for row in rows])

    @property
    def lengths(self) -> np.ndarray:
        """int64[N], tokens of each document."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """[Ld, D], the embeddings of document i."""
        i = range(len(self))[i]
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def padded(self, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pad to [N, Ld, D] with zeros; also the mask bool[N, Ld] of the documents' tokens.

        Raises ValueError if `length` is less than that of the longest document.
        """
        longest = int(self.lengths.max(initial=0))
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"the longest document has {longest} tokens, more than {length}")
        mask = np.arange(length) < self.lengths[:, None]
        block = np.zeros((len(self), length, self.values.shape[1]), self.values.dtype)
        block[mask] = self.values
        return block, mask


def offsets_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """Offsets int64[N+1] of rows with lengths [N]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def document_ranges(offsets: np.ndarray, shards: int) -> np.ndarray:
    """Cut documents into ranges with about equally many tokens: int64[shards + 1], ascending."""
    targets = offsets[-1] * np.arange(1, shards) // shards
    cuts = np.searchsorted(offsets, targets, side="left")
    return np.concatenate([[0], cuts, [len(offsets) - 1]]).astype(np.int64)
