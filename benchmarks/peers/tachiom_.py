"""TACHIOM, through its class Tachiom. It takes every token's vocabulary id beside its vector."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tachiom import Tachiom

THREADS = int(os.environ["OMP_NUM_THREADS"])
os.environ["RAYON_NUM_THREADS"] = str(THREADS)
BATCHES = True
NEEDS_TOKEN_IDS = True


def settings(k: int) -> list[dict[str, Any]]:
    sweep = [(20, 1000), (40, 2000), (80, 4000), (160, 10_000)]
    return [{}] + [
        {"k_centroids": cells, "ef_search": max(30, 2 * cells), "k_docs_to_score": documents}
        for cells, documents in sweep
        if documents >= k
    ]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("tachiom", "numpy")}


def build(
    folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int, token_ids: np.ndarray
) -> None:
    """Product quantisation of 32 bytes a token, whatever nbits is."""
    folder.mkdir()
    halves = np.ascontiguousarray(values).view(np.uint16)
    index = Tachiom.build_from_arrays(halves, token_ids.astype(np.uint32), lengths.astype(np.int32))
    index.save(str(folder / "index.bin"))


def open(folder: Path) -> Tachiom:
    return Tachiom.load(str(folder / "index.bin"))


def prepare(queries: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0] + [len(query) for query in queries]).astype(np.uint64)
    return np.ascontiguousarray(np.concatenate(queries)), offsets


def search(
    opened: Tachiom, prepared: tuple[np.ndarray, np.ndarray], k: int, settings: dict[str, Any]
) -> Any:
    tokens, offsets = prepared
    if len(offsets) == 2:
        return opened.search(tokens, k=k, **settings)[1][None]
    return opened.batch_search(
        tokens, len(offsets) - 1, k=k, offsets=offsets, num_threads=THREADS, **settings
    )[1]


def ids(found: Any) -> list[list[int]]:
    return np.asarray(found).tolist()
