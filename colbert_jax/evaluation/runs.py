"""Run files: what a search returned, in Stanford ColBERT's ranking format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from colbert_jax.files import replacing
from colbert_jax.retriever import Hit


def write_run(path: str | Path, found: Mapping[str, Iterable[Hit]]) -> None:
    """Write lines of `qid, pid, rank, score` separated by tabs, ranks from 1.

    Args:
      found: query id -> hits, best first.
    """
    with replacing(Path(path)) as stream:
        for qid, hits in found.items():
            for rank, hit in enumerate(hits, 1):
                stream.write(f"{qid}\t{hit.id}\t{rank}\t{hit.score:.6f}\n")
