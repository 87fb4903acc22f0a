"""Run files: what a search returned, in Stanford ColBERT's ranking format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colbert_jax.files import replacing
from colbert_jax.search.arrays import Hits


def write_run(path: str | Path, qids: Sequence[str], hits: Hits, pids: Any) -> None:
    """Write lines of `qid, pid, rank, score` separated by tabs, ranks from 1.

    Args:
      qids: [B] query ids.
      pids: the collection's document ids by position: `Index.ids`, or a list.
    """
    with replacing(Path(path)) as stream:
        for qid, ids, scores in zip(qids, hits.positions, hits.scores, strict=True):
            for rank, (i, score) in enumerate(zip(ids, scores, strict=True), 1):
                stream.write(f"{qid}\t{pids[int(i)]}\t{rank}\t{score:.6f}\n")
