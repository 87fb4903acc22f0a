"""xtr-warp-rs, through its class XTRWarp."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xtr_warp import XTRWarp

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
BATCHES = True


def settings(k: int) -> list[dict[str, Any]]:
    pylate = {"nprobe": 32, "t_prime": 100_000}  # what PyLate's WARP passes
    return [{}, pylate, {"nprobe": 16, "bound": 256}, {"nprobe": 64, "bound": 512}]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("xtr-warp-rs", "torch")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    XTRWarp(index=str(folder)).create(
        embeddings_source=documents(values, lengths),
        device=_device(),
        nbits=nbits,
        show_progress=False,
    )


def open(folder: Path) -> XTRWarp:
    return XTRWarp(index=str(folder), device=_device()).load(_device())


def prepare(queries: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(query) for query in queries]


def search(opened: XTRWarp, prepared: list[torch.Tensor], k: int, settings: dict[str, Any]) -> Any:
    return opened.search(prepared, top_k=k, num_threads=THREADS, show_progress=False, **settings)


def ids(found: Any) -> list[list[int]]:
    return [[document for document, _ in row] for row in found]


def documents(values: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
    """In float32: it takes no float16 on a CPU."""
    return list(torch.from_numpy(values.astype(np.float32)).split(lengths.tolist()))


def add(opened: XTRWarp, documents: list[torch.Tensor], first: int) -> XTRWarp:
    opened.add(documents, show_progress=False)
    return opened


def delete(opened: XTRWarp, numbers: list[int]) -> XTRWarp:
    return opened.delete(numbers)


def update(opened: XTRWarp, numbers: list[int], documents: list[torch.Tensor]) -> XTRWarp:
    return opened.update(numbers, documents, show_progress=False)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
