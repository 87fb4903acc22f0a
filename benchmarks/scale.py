"""Builds an index of as many passages as asked for, and searches it: time, bytes, memory, overlap.

The passages are those of CACHE (`passages.py`), repeated: every further time each token embedding
is turned a little by noise. So times and bytes are those of so many different embeddings; overlap
is with exact scoring of the same index, since repeated passages say nothing of real answers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from passages import load

from colbert_jax import Index
from colbert_jax.config import ColBERTConfig
from colbert_jax.embeddings import DocumentEmbeddings

NOISE = 0.3  # length of what is added to a token embedding; a cosine of 0.96 with the original
_BANK = 1 << 16  # noise vectors


class Repeated:
    """An encoder whose texts are numbers: of the passages that are repeated."""

    config = ColBERTConfig()

    def __init__(self, passages: DocumentEmbeddings):
        self.passages, self.dim = passages, passages.values.shape[1]
        bank = np.random.default_rng(0).normal(size=(_BANK, self.dim)).astype(np.float32)
        self.bank = NOISE * bank / np.linalg.norm(bank, axis=1, keepdims=True)
        self.seconds = 0.0

    def describe(self) -> dict[str, Any]:
        return {"load": {"name_or_path": "none"}, "fingerprint": "repeated", "search": {}}

    def image_fingerprint(self) -> str:
        raise ValueError("no images")

    def check_document_images(self, items: Any) -> dict[int, int]:
        return {}

    def encode_windows(
        self, windows: Iterable[Any], bar: Any = None
    ) -> Iterator[DocumentEmbeddings]:
        for window in windows:
            start = time.thread_time()
            embeddings = self.encode([int(text) for text in window])
            self.seconds += time.thread_time() - start
            yield embeddings

    def encode(self, numbers: list[int]) -> DocumentEmbeddings:
        offsets, count = self.passages.offsets, len(self.passages.offsets) - 1
        parts = []
        for number in numbers:
            turn, i = divmod(number, count)
            part = self.passages.values[offsets[i] : offsets[i + 1]].astype(np.float32)
            if turn:
                place = (turn * 7919 + int(offsets[i])) % (_BANK - len(part))
                part += self.bank[place : place + len(part)]
                part /= np.sqrt(np.einsum("td,td->t", part, part))[:, None]
            parts.append(part)
        return DocumentEmbeddings.from_list(parts, self.dim)


def build(cache: Path, folder: Path, passages: int, real: int, nbits: int) -> dict[str, Any]:
    documents, _ = load(cache, real)
    encoder = Repeated(documents)
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    Index.build(
        folder,
        encoder,
        map(str, range(passages)),
        nbits=nbits,
        store_texts=False,
        overwrite=True,
    )
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return {
        "passages": passages,
        "tokens": json.loads((folder / "metadata.json").read_text())["num_tokens"],
        "nbits": nbits,
        "seconds": seconds,
        "cpu_seconds": used,
        "of_these_making_embeddings": encoder.seconds,
        "mb_on_disk": sum(file.stat().st_size for file in folder.rglob("*")) / 1e6,
        "peak_mb": _peak(),
        "mb_before": before,
    }


def search(cache: Path, folder: Path, queries: int, exact: int) -> dict[str, Any]:
    padded = load(cache, 1)[1][:queries]
    index = Index.open(folder)
    report: dict[str, Any] = {"mb_before": _peak()}
    for k in (10, 100):
        for mode in ("accurate", "fast"):
            index.search(padded[:2], k, mode=mode)
            singles = []
            for query in padded:
                start = time.perf_counter()
                index.search(query[None], k, mode=mode)
                singles.append(time.perf_counter() - start)
            start, used = time.perf_counter(), time.process_time()
            found = [index.search(padded[i : i + 64], k, mode=mode) for i in range(0, queries, 64)]
            seconds, used = time.perf_counter() - start, time.process_time() - used
            report[f"{mode}, k={k}"] = {
                "ms": 1e3 * float(np.median(singles)),
                "p95_ms": 1e3 * float(np.percentile(singles, 95)),
                "queries_per_second_batch_64": queries / seconds,
                "cpu_ms_per_query": 1e3 * used / queries,
                "positions": np.concatenate([hits.positions for hits in found])[:exact],
            }
    report["peak_mb"] = _peak()
    for k in (10, 100) if exact else ():
        start = time.perf_counter()
        best = index.search(padded[:exact], k, mode="exact").positions
        seconds = time.perf_counter() - start
        report[f"exact, k={k}"] = {"queries_per_second_one_batch": exact / seconds}
        for mode in ("accurate", "fast"):
            rows = zip(report[f"{mode}, k={k}"]["positions"], best, strict=True)
            report[f"{mode}, k={k}"]["overlap_with_exact"] = float(
                np.mean([len(set(a) & set(b)) / k for a, b in rows])
            )
    for value in report.values():
        if isinstance(value, dict):
            value.pop("positions", None)
    return report


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("folder", type=Path, help="of the index")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--real", type=int, default=34_000, help="passages of CACHE to repeat")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--exact", type=int, default=32, help="queries that are scored exactly")
    parser.add_argument("--only", choices=["build", "search"], help="one part, in this process")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.only == "build":
        report = build(given.cache, given.folder, given.passages, given.real, given.nbits)
    elif given.only == "search":
        report = search(given.cache, given.folder, given.queries, given.exact)
    else:  # in processes of their own, so that memory is that of each
        parts = ("build", "search")
        report = {part: _run(part) for part in parts}
        report["command"] = "python benchmarks/scale.py CACHE FOLDER " + " ".join(sys.argv[3:])
    text = json.dumps(report, indent=1)
    if given.output and not given.only:
        given.output.write_text(text + "\n")
    print(text)


def _run(part: str) -> Any:
    command = [sys.executable, *sys.argv, "--only", part]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
