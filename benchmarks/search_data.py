"""What search.py gives to every system, and the exact answers it holds them to."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from passages import load, token_ids

DEPTH = 100  # of the exact answers, at least
_TOKENS = 2048  # of documents in one product


def prepare(
    cache: Path, passages: int, queries: int, folder: Path, depth: int = DEPTH
) -> tuple[int, str, np.ndarray]:
    """Write the embeddings as plain arrays into `folder` and find the exact answers.

    values.npy float16[T, D], lengths.npy int64[N], queries.npz: the rows of all queries without
    padding, float32, and their lengths; token_ids.npy int32[T] if the cache has them. The exact
    answers are kept in `cache`.

    Returns:
      T, a checksum of values.npy, and the exact answers int[queries, min(depth, N)], at least
      those down to DEPTH.
    """
    depth = max(depth, DEPTH)
    try:
        documents, padded = load(cache, passages)
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing: fill {cache} with {passages} passages by "
            "benchmarks/passages.py"
        ) from None
    lengths = documents.lengths
    if len(lengths) < passages:
        raise SystemExit(f"{cache}: holds {len(lengths)} passages, --passages {passages}")
    if len(padded) < queries:
        raise SystemExit(f"{cache}: holds {len(padded)} queries, --queries {queries}")
    rows = [query[query.any(axis=1)] for query in padded[:queries]]
    rows = [rows[i] for i in spread([len(row) for row in rows])]
    np.save(folder / "values.npy", documents.values)
    np.save(folder / "lengths.npy", lengths)
    np.savez(
        folder / "queries.npz", values=np.concatenate(rows), lengths=[len(row) for row in rows]
    )
    ids = token_ids(cache, passages)
    if ids is not None:
        np.save(folder / "token_ids.npy", ids)
    check = f"{zlib.crc32(np.ascontiguousarray(documents.values)):08x}"
    both = zlib.crc32(np.concatenate(rows), int(check, 16))
    deep = "" if depth == DEPTH else f"_{depth}"
    file = cache / f"exact_{passages}_{queries}_{both:08x}{deep}.npy"
    if not file.exists():
        print(f"exact scoring of {queries} queries on {passages} passages", flush=True)
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, exact_answers(documents.values, lengths, rows, depth))
        temporary.rename(file)
    return len(documents.values), check, np.load(file)


def spread(lengths: list[int]) -> list[int]:
    """An order of the queries in which the first n have about the lengths of all, whatever n is."""
    by_length = np.argsort(lengths, kind="stable")
    golden = (0.5 + np.arange(len(lengths)) * 0.6180339887498949) % 1
    return by_length[np.argsort(np.argsort(golden, kind="stable"), kind="stable")].tolist()


def exact_answers(
    values: np.ndarray, lengths: np.ndarray, queries: list[np.ndarray], depth: int = DEPTH
) -> np.ndarray:
    """int64[Q, min(depth, documents with a token)]: the best by MaxSim in float32, ties by id.

    Args:
      values: float[T, D], the documents' tokens one after the other; lengths: int[N].
      queries: float32[Lq, D] each.
    """
    columns = np.concatenate(queries).T
    query_starts = np.cumsum([0] + [len(query) for query in queries[:-1]])
    documents = np.flatnonzero(lengths)
    ends = np.cumsum(lengths)
    scores = np.empty((len(documents), len(queries)), np.float32)
    first = 0
    while first < len(documents):
        start = ends[documents[first]] - lengths[documents[first]]
        past = np.searchsorted(ends[documents], start + _TOKENS, side="right")
        some = documents[first : max(past, first + 1)]
        similarity = values[start : ends[some[-1]]].astype(np.float32) @ columns
        best = np.maximum.reduceat(similarity, ends[some] - lengths[some] - start, axis=0)
        scores[first : first + len(some)] = np.add.reduceat(best, query_starts, axis=1)
        first += len(some)
    ranked = np.argsort(-scores.T, axis=1, kind="stable")[:, :depth]
    return documents[ranked]


def overlap(found: list[list[int]], exact: np.ndarray, k: int) -> float:
    """Share of the exact k best that were found among the k returned, averaged over queries."""
    best = exact[:, :k]
    shares = [
        np.isin(row, found_row[:k]).mean() for row, found_row in zip(best, found, strict=True)
    ]
    return float(np.mean(shares))
