"""This library, through its class Index."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from colbert_jax import Index, __version__
from colbert_jax.batching import ladder_length

BATCHES = True
# Earlier versions called the mode recall, and "accurate" high.
MODES = {"mode": ("fast", "accurate", "exact"), "recall": ("fast", "high", "exact")}


def settings(k: int) -> list[dict[str, Any]]:
    known = inspect.signature(Index.search).parameters
    knob = [{name: mode} for name, modes in MODES.items() if name in known for mode in modes]
    sweep = [
        (1, -1.0, 64),
        (1, -1.0, 128),
        (1, 0.5, 256),
        (1, 0.5, 512),
        (2, -1.0, 768),
        (2, 0.45, 1024),
        (2, -1.0, 1024),
    ]
    sweep += [(3, 0.35, 1280), (4, 0.4, 1024), (2, 0.45, 4096), (4, 0.4, 3584), (6, -1.0, 3072)]
    sweep += [(6, 0.3, 5120), (8, 0.3, 16384)]
    return [{}, *knob] + [
        {"ncells": ncells, "centroid_score_threshold": threshold, "ndocs": ndocs}
        for ncells, threshold, ndocs in sweep
        if ndocs >= 4 * k
    ]


def versions() -> dict[str, str]:
    others = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"colbert-jax": __version__} | others | {"backend": jax.default_backend()}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    Index.build(folder, embeddings=values, lengths=lengths, nbits=nbits, progress=False)


def named(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    ids = names(range(len(lengths)))
    Index.build(folder, embeddings=values, lengths=lengths, ids=ids, nbits=nbits, progress=False)


def documents(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values, lengths


def add(opened: Index, documents: tuple[np.ndarray, np.ndarray], first: int) -> Index:
    values, lengths = documents
    ids = names(range(first, first + len(lengths)))
    return opened.add(embeddings=values, lengths=lengths, ids=ids, progress=False)


def delete(opened: Index, numbers: list[int]) -> Index:
    return opened.delete(names(numbers))


def update(opened: Index, numbers: list[int], documents: tuple[np.ndarray, np.ndarray]) -> Index:
    values, lengths = documents
    return opened.update(embeddings=values, lengths=lengths, ids=names(numbers), progress=False)


def names(numbers: Iterable[int]) -> list[str]:
    """The documents' ids in lifecycle.py."""
    return [f"document-{number}" for number in numbers]


def open(folder: Path) -> Index:
    return Index.open(folder)


def prepare(queries: list[np.ndarray]) -> np.ndarray:
    """[B, Lq, D] with rows of zeros behind each query, as `encode_queries` gives them."""
    width = ladder_length(max(map(len, queries)))
    block = np.zeros((len(queries), width, queries[0].shape[1]), np.float32)
    for row, query in zip(block, queries, strict=True):
        row[: len(query)] = query
    return block


def search(opened: Index, prepared: np.ndarray, k: int, settings: dict[str, Any]) -> Any:
    return opened.search(prepared, k, **settings)


def ids(found: Any) -> list[list[int]]:
    return found[0].tolist()
