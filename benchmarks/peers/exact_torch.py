"""Exact MaxSim by torch in float32: one matmul and a maximum over blocks of equal length."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
BATCHES = True
BLOCK_TOKENS = 1 << 12
SIMILARITIES = 1 << 22  # of one product: more queries are scored in turn


class Blocks(NamedTuple):
    """documents: int64[N], the order of the scores; blocks: float32[n, Ld, D] each."""

    documents: torch.Tensor
    blocks: list[torch.Tensor]


def settings(k: int) -> list[dict[str, Any]]:
    return [{}]


def versions() -> dict[str, str]:
    return {"torch": version("torch")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    """There is no index to make: the embeddings as they were given are what is kept on disk."""
    folder.mkdir()
    for name, array in (("values", values), ("lengths", lengths)):
        np.save(folder / f"{name}.npy", array)


def open(folder: Path) -> Blocks:
    """Blocks of documents sorted by length.

    A shorter document is filled up with its own first token, which leaves every maximum as it is.
    """
    lengths = np.load(folder / "lengths.npy")
    values = np.load(folder / "values.npy", mmap_mode="r")
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    blocks, first = [], 0
    while first < len(order):
        longest = lengths[order[first:]]
        fits = np.arange(1, len(longest) + 1) * longest <= BLOCK_TOKENS
        some = order[first : first + max(1, int(fits.sum()))]
        column = np.arange(lengths[some[-1]])
        rows = starts[some, None] + np.where(column < lengths[some, None], column, 0)
        blocks.append(torch.from_numpy(values[rows].astype(np.float32)).to(_device()))
        first += len(some)
    return Blocks(torch.from_numpy(order), blocks)


def prepare(queries: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(query) for query in queries]


@torch.inference_mode()
def search(opened: Blocks, prepared: list[torch.Tensor], k: int, settings: dict[str, Any]) -> Any:
    sizes = [len(query) for query in prepared]
    group = max(1, SIMILARITIES // (BLOCK_TOKENS * max(sizes)))
    parts = []
    for i in range(0, len(prepared), group):
        some = prepared[i : i + group]
        columns = torch.cat(some).to(_device()).T  # [D, all Lq]
        owner = torch.repeat_interleave(torch.tensor(sizes[i : i + group])).to(_device())
        best = torch.cat([(block @ columns).amax(dim=1) for block in opened.blocks])
        scores = best.new_zeros(len(some), len(best)).index_add_(0, owner, best.T)
        parts.append(scores.topk(min(k, scores.shape[1])).indices.cpu())
    return opened.documents[torch.cat(parts)]


def ids(found: torch.Tensor) -> list[list[int]]:
    return found.tolist()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
