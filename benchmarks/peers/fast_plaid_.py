"""fast-plaid, through its class FastPlaid."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fast_plaid.search import FastPlaid

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
BATCHES = True


def settings(k: int) -> list[dict[str, Any]]:
    """A quarter of n_full_scores are scored fully, so that k asks for at least 4 k of them."""
    defaults: dict[str, Any] = {}
    pylate = {"n_ivf_probe": 8, "n_full_scores": 8192}  # what PyLate's PLAID passes
    sweep = [(8, 1024), (2, 512)]
    return [defaults, pylate] + [
        {"n_ivf_probe": probe, "n_full_scores": full} for probe, full in sweep if full >= 4 * k
    ]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("fast-plaid", "torch")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    documents = list(torch.from_numpy(values).split(lengths.tolist()))
    index = FastPlaid(index=str(folder), device=_device())
    index.create(documents_embeddings=documents, nbits=nbits)


def open(folder: Path) -> FastPlaid:
    return FastPlaid(index=str(folder), device=_device())


def documents(values: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(values).split(lengths.tolist()))


def add(opened: FastPlaid, documents: list[torch.Tensor], first: int) -> FastPlaid:
    return opened.update(documents_embeddings=documents)


def delete(opened: FastPlaid, numbers: list[int]) -> FastPlaid:
    """Deletes those that have these places now: all later ones move, nothing has an id."""
    return opened.delete(subset=numbers)


def update(opened: FastPlaid, numbers: list[int], documents: list[torch.Tensor]) -> FastPlaid:
    """It has no update: `delete`, then `add`."""
    return opened.delete(subset=numbers).update(documents_embeddings=documents)


def prepare(queries: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(query) for query in queries]


def search(
    opened: FastPlaid, prepared: list[torch.Tensor], k: int, settings: dict[str, Any]
) -> Any:
    return opened.search(prepared, top_k=k, show_progress=False, **settings)


def ids(found: Any) -> list[list[int]]:
    return [[document for document, _ in row] for row in found]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
