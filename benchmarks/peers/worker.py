"""One measured system in a process of its own: what a peer's Python runs for search.py and
lifecycle.py.

    PYTHON worker.py ADAPTER

Reads requests from standard input, a line of JSON each, and answers each with a line of JSON: what
was asked for, or {"error": traceback}. Needs numpy and the peer, nothing of colbert_jax. ADAPTER
names a module of this folder with

    BATCHES                                 whether one call takes many queries
    versions()                              of what it uses, by name
    settings(k)                             what to measure: dicts, the first of them the defaults
    build(folder, values, lengths, nbits)   make an index at `folder`, where nothing is yet
    open(folder)                            what search takes
    prepare(queries)                        queries [Lq, D] as its users would hold them
    search(opened, prepared, k, settings)   the timed call, complete when it returns
    ids(found)                              what search returned, as lists of document numbers
    NEEDS_TOKEN_IDS                         may be missing; if True, `build` gets a last argument
                                            int32[T], the vocabulary's id of every token

and for lifecycle.py, where a document is its number among all that are ever added,

    named(folder, values, lengths, nbits)   `build` of an index whose documents will be changed;
                                            may be missing
    documents(values, lengths)              documents as its users would hold them
    add(opened, documents, first)           the number of the first of these documents
    delete(opened, numbers)
    update(opened, numbers, documents)

of which the last three return what search takes from then on, the change being in effect.

Only `search` is timed for queries, only `build` and `open` for building and opening, and only the
changes themselves: imports, reading the embeddings and converting to and from the peer's types are
not.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def peak_mb() -> float:
    """Largest resident size since the start or the last reset, MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:  # not Linux; on Linux ru_maxrss would count the process that forked this one
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # else the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    def __init__(self, adapter: ModuleType):
        self.adapter = adapter
        self.opened: Any = None
        self.queries: list[np.ndarray] = []
        self.prepared: dict[tuple[int, int], Any] = {}

    def about(self) -> dict[str, Any]:
        return {"versions": self.adapter.versions(), "batches": self.adapter.BATCHES}

    def settings(self, k: int) -> list[dict[str, Any]]:
        return self.adapter.settings(k)

    def build(
        self, folder: str, data: str, nbits: int, documents: int | None = None
    ) -> dict[str, float]:
        """Make an index, of the first documents only if it will be changed."""
        # Copy on write: some libraries want writable arrays, none gets a copy of its own.
        values = np.load(Path(data) / "values.npy", mmap_mode="c")
        lengths = np.load(Path(data) / "lengths.npy")[:documents]
        values = values[: lengths.sum()]
        more = []
        if getattr(self.adapter, "NEEDS_TOKEN_IDS", False):
            if not (Path(data) / "token_ids.npy").exists():
                raise ValueError("no token ids in the cache: run benchmarks/passages.py again")
            more = [np.load(Path(data) / "token_ids.npy")[: len(values)]]
        before, cpu, start = peak_mb(), time.process_time(), time.perf_counter()
        build = self.adapter.build
        if documents is not None:
            build = getattr(self.adapter, "named", build)
        build(Path(folder), values, lengths, nbits, *more)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mb": peak_mb(),
            "start_mb": before,
        }

    def open(self, folder: str, data: str) -> dict[str, float]:
        file = Path(data) / "queries.npz"
        if file.exists():
            queries = np.load(file)
            self.queries = np.split(queries["values"], np.cumsum(queries["lengths"])[:-1])
        start = time.perf_counter()
        self.opened = self.adapter.open(Path(folder))
        return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}

    def search(
        self, k: int, settings: dict[str, Any], batch: int, first: int, calls: int, answers: bool
    ) -> dict[str, Any]:
        """Make `calls` calls of `batch` queries, beginning with query `first`, round and round."""
        batches = [self.batch(first + i * batch, batch) for i in range(calls)]
        seconds, found = [], []
        reset_peak()
        cpu = time.process_time()
        for queries in batches:
            start = time.perf_counter()
            hits = self.adapter.search(self.opened, queries, k, settings)
            seconds.append(time.perf_counter() - start)
            found.append(hits)
        out = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_mb": peak_mb()}
        if answers:
            out["ids"] = [row for hits in found for row in self.adapter.ids(hits)]
        return out

    def change(
        self, what: str, data: str, first: int, count: int, numbers: list[int]
    ) -> dict[str, float]:
        """Add documents first..first+count-1, delete those of `numbers`, or update these to be
        documents first..first+count-1."""
        documents = self.adapter.documents(*_some(Path(data), first, count))
        cpu, start = time.process_time(), time.perf_counter()
        if what == "add":
            self.opened = self.adapter.add(self.opened, documents, first)
        elif what == "delete":
            self.opened = self.adapter.delete(self.opened, numbers)
        else:
            self.opened = self.adapter.update(self.opened, numbers, documents)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
        }

    def batch(self, first: int, size: int) -> Any:
        first %= len(self.queries)
        if (first, size) not in self.prepared:
            rows = [self.queries[(first + i) % len(self.queries)] for i in range(size)]
            self.prepared[first, size] = self.adapter.prepare(rows)
        return self.prepared[first, size]


def _some(data: Path, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of some documents."""
    lengths = np.load(data / "lengths.npy")
    start, stop = lengths[:first].sum(), lengths[: first + count].sum()
    values = np.load(data / "values.npy", mmap_mode="r")
    return np.array(values[start:stop]), lengths[first : first + count]


def main() -> None:
    # What libraries print goes to standard error; the pipe carries answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(importlib.import_module(sys.argv[1]))
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
