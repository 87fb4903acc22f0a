"""Token embeddings of documents: ragged, as flat values and offsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DocumentEmbeddings:
    """
    values: float32[T, D], the token embeddings of all documents, one after the other.
    offsets: int64[N+1], document i is values[offsets[i]:offsets[i+1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: Iterable[int]) -> DocumentEmbeddings:
        """From flat values [T, D] and the documents' lengths [N], which must add up to T."""
        offsets = offsets_from_lengths(np.asarray(lengths))
        if offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"lengths must be >= 0 and add up to {len(values)}, the rows of values"
            )
        return cls(values, offsets)

    @classmethod
    def from_list(cls, rows: list[np.ndarray], dim: int) -> DocumentEmbeddings:
        """From one [Ld, D] array per document."""
        values = np.concatenate(rows) if rows else np.zeros((0, dim), np.float32)
        return cls.from_lengths(values, [len(row) for row in rows])

    @property
    def lengths(self) -> np.ndarray:
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
        """[N, Ld, D] with zeros behind each document, and the mask bool[N, Ld] of its tokens."""
        longest = int(self.lengths.max(initial=0))
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"the longest document has {longest} tokens, more than {length}")
        mask = np.arange(length) < self.lengths[:, None]
        block = np.zeros((len(self), length, self.values.shape[1]), self.values.dtype)
        block[mask] = self.values
        return block, mask


def offsets_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """int64[N+1] from lengths [N]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def document_ranges(offsets: np.ndarray, shards: int) -> np.ndarray:
    """int64[shards + 1], ascending: where to cut documents into ranges of about equal tokens."""
    targets = offsets[-1] * np.arange(1, shards) // shards
    cuts = np.searchsorted(offsets, targets, side="left")
    return np.concatenate([[0], cuts, [len(offsets) - 1]]).astype(np.int64)
