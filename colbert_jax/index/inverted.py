"""Inverted lists: for each centroid the documents that have a token there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.index.folder import naming
from colbert_jax.index.format import ArrayWriter, write_array
from colbert_jax.search.arrays import DamagedArrayError, check_codes

_TOKENS = 1 << 20  # tokens inverted at a time
_ENTRIES = 1 << 20  # entries joined at a time


def write_inverted_lists(
    folder: Path,
    codes: np.ndarray,
    offsets: np.ndarray,
    num_centroids: int,
    *,
    first: int = 0,
    suffix: str = "",
) -> int:
    """Write `lists.npy` and `list_offsets.npy`; returns the number of entries.

    Two passes over the codes, one to count and one to place, so that memory is bounded by a block.

    Args:
      codes: int32[T], may be mapped.
      offsets: int64[N+1].
      first: the id of the first of these documents.
      suffix: of the files' names, for lists to be joined.
    """
    sizes = np.zeros(num_centroids, np.int64)
    for centroids, _ in _pairs(codes, offsets):
        sizes += np.bincount(centroids, minlength=num_centroids)
    list_offsets = offsets_from_lengths(sizes)
    total = int(list_offsets[-1])
    file = folder / f"lists{suffix}.npy"
    with ArrayWriter(file, np.int32) as writer:
        writer.reserve(total)
    lists = np.load(file, mmap_mode="r+" if total else None)
    free = list_offsets[:-1].copy()
    for centroids, documents in _pairs(codes, offsets):
        counts = np.bincount(centroids, minlength=num_centroids)
        start = np.cumsum(counts) - counts  # where each centroid's run starts in this block
        places = free[centroids] + np.arange(len(centroids)) - start[centroids]
        lists[places] = documents + first
        free += counts
    if isinstance(lists, np.memmap):
        with naming(file):
            lists.flush()
    write_array(folder / f"list_offsets{suffix}.npy", list_offsets)
    return total


def join_inverted_lists(folder: Path, suffixes: Sequence[str]) -> int:
    """Join lists of consecutive ranges of documents; returns the number of entries.

    Centroid by centroid the ranges' lists one after the other, a block of centroids at a time.
    """
    lists = [np.load(folder / f"lists{suffix}.npy", mmap_mode="r") for suffix in suffixes]
    offsets = np.stack([np.load(folder / f"list_offsets{suffix}.npy") for suffix in suffixes])
    joined = offsets.sum(axis=0)
    last = len(joined) - 1
    with ArrayWriter(folder / "lists.npy", np.int32) as writer:
        start = 0
        while start < last:
            stop = int(np.searchsorted(joined, joined[start] + _ENTRIES, side="right")) - 1
            stop = min(max(stop, start + 1), last)
            block = np.empty(joined[stop] - joined[start], np.int32)
            free = joined[start:stop] - joined[start]
            for part, own in zip(lists, offsets, strict=True):
                sizes = np.diff(own[start : stop + 1])
                # Entry j of a centroid's run goes to place j of its free room.
                shift = np.repeat(free - (own[start:stop] - own[start]), sizes)
                block[shift + np.arange(len(shift))] = part[own[start] : own[stop]]
                free += sizes
            writer.append(block)
            start = stop
    write_array(folder / "list_offsets.npy", joined)
    return int(joined[-1])


def recent_lists(
    codes: np.ndarray, offsets: np.ndarray, first: int, num_centroids: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inverted lists of the last documents, in memory.

    Args:
      codes: int32[T], of all documents; may be mapped.
      offsets: int64[N+1].
      first: the position of the first document that is listed.
      num_centroids: K.

    Returns:
      lists int32[sum], their entries positions among all documents, and list offsets int64[K+1].

    Raises:
      DamagedArrayError: a code of these documents is out of range.
    """
    codes = np.asarray(codes[offsets[first] :])
    within = (codes >= 0) & (codes < num_centroids)
    check_codes(within.all(), num_centroids)
    count = len(offsets) - 1 - first
    documents = np.repeat(np.arange(count), np.diff(offsets[first:]))
    centroids, documents = _distinct(codes, documents, max(count, 1))
    sizes = np.bincount(centroids, minlength=num_centroids)
    return (documents + first).astype(np.int32), offsets_from_lengths(sizes)


def check_inverted_lists(
    codes: np.ndarray,
    offsets: np.ndarray,
    lists: np.ndarray,
    list_offsets: np.ndarray,
    num_documents: int,
    num_centroids: int,
) -> None:
    """Hold the lists on disk to the codes of the first documents, and all codes to their range.

    Raises:
      DamagedArrayError: they are not what `write_inverted_lists` writes.
    """
    for start in range(0, len(codes), _TOKENS):
        block = np.asarray(codes[start : start + _TOKENS])
        check_codes(((block >= 0) & (block < num_centroids)).all(), num_centroids)
    listed = len(list_offsets) - 1
    free, ends = np.array(list_offsets[:-1]), list_offsets[1:]
    right = True
    for centroids, documents in _pairs(codes, offsets[: num_documents + 1]):
        counts = np.bincount(centroids, minlength=listed)
        right = right and len(counts) == listed and bool((free + counts <= ends).all())
        if right:
            start_of = np.cumsum(counts) - counts
            places = free[centroids] + np.arange(len(centroids)) - start_of[centroids]
            right = bool((lists[places] == documents).all())
            free += counts
    if not right or (free != ends).any():
        raise DamagedArrayError("lists", "other documents than those with such codes")


def _pairs(codes: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct (centroid, document) pairs, a block of documents at a time, by centroid."""
    start, num_documents = 0, len(offsets) - 1
    while start < num_documents:
        stop = int(np.searchsorted(offsets, offsets[start] + _TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), num_documents)
        documents = np.repeat(np.arange(start, stop), np.diff(offsets[start : stop + 1]))
        block = codes[offsets[start] : offsets[stop]]
        yield _distinct(block, documents, num_documents)
        start = stop


def _distinct(
    codes: np.ndarray, documents: np.ndarray, num_documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (centroid, document) pairs of tokens, by centroid, then by document."""
    # One sort of numbers: `np.unique` takes fifty times as long.
    pairs = np.sort(codes.astype(np.int64) * num_documents + documents)
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    centroids = pairs // num_documents
    return centroids, pairs - centroids * num_documents
