"""Inverted lists: for each centroid the documents that have a token there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.index.format import write_array

_TOKENS = 1 << 20  # tokens inverted at a time


def write_inverted_lists(
    folder: Path, codes: np.ndarray, offsets: np.ndarray, num_centroids: int
) -> int:
    """Write `lists.npy` and `list_offsets.npy`; returns the number of entries.

    Two passes over the codes, one to count and one to place, so that memory is bounded by a block.

    Args:
      codes: int32[T], may be mapped.
      offsets: int64[N+1].
    """
    sizes = np.zeros(num_centroids, np.int64)
    for centroids, _ in _pairs(codes, offsets):
        sizes += np.bincount(centroids, minlength=num_centroids)
    list_offsets = offsets_from_lengths(sizes)
    total = int(list_offsets[-1])
    lists = np.lib.format.open_memmap(folder / "lists.npy", "w+", np.int32, (total,))
    free = list_offsets[:-1].copy()
    for centroids, documents in _pairs(codes, offsets):
        counts = np.bincount(centroids, minlength=num_centroids)
        first = np.cumsum(counts) - counts  # where each centroid's run starts in this block
        lists[free[centroids] + np.arange(len(centroids)) - first[centroids]] = documents
        free += counts
    lists.flush()
    write_array(folder / "list_offsets.npy", list_offsets)
    return total


def _pairs(codes: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct (centroid, document) pairs, a block of documents at a time, by centroid."""
    start, num_documents = 0, len(offsets) - 1
    while start < num_documents:
        stop = int(np.searchsorted(offsets, offsets[start] + _TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), num_documents)
        documents = np.repeat(np.arange(start, stop), np.diff(offsets[start : stop + 1]))
        block = codes[offsets[start] : offsets[stop]].astype(np.int64)
        pairs = np.unique(block * num_documents + documents)
        yield pairs // num_documents, pairs % num_documents
        start = stop
