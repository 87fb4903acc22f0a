"""Retrieval quality: PLAID and exact scoring of compressed and raw token embeddings, side by side.

    python benchmarks/quality.py DATA --checkpoint CHECKPOINT [--collections cranfield,scifact] \
        [--json results.json]
    python benchmarks/quality.py DATA --checkpoint CHECKPOINT --collections scifact --spread 3

DATA holds a folder per collection with `collection.tsv`, `queries.tsv` and `qrels.tsv`. Prints one
Markdown table of nDCG@10, and writes every measure with --json. With --spread it prints how far
nDCG@10 moves by chance: indexes by both bucket rules and several seeds, and raw token embeddings
with random noise, each token's as far from it as its decompressed embedding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax import ColBERT, Index
from colbert_jax.compression.codec import (
    ResidualCodec,
    compress,
    decompress_on_host,
    train_codec,
)
from colbert_jax.config import BUCKETS
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation import evaluate_ranking, read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import DEPTH, measure_queries
from colbert_jax.progress import log_to_stderr
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.search.arrays import Hits, concatenate_hits
from colbert_jax.search.raw import RawSearch

_ALLOWED_LOSS = {2: 0.01, 4: 0.003}
_HELD_OUT = 50_000  # token embeddings that buckets are fitted to
_DRAWS = 2  # of noise for each seed
_RERANKED = 30  # documents of a query: those behind do not get among the best ten


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--collections", default="cranfield,scifact,vaswani_npl")
    parser.add_argument("--nbits", default="2,4")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="fail where compression loses too much"
    )
    parser.add_argument("--cache", type=Path, help="keep embeddings and indexes here")
    parser.add_argument("--spread", type=int, metavar="SEEDS", help="see above")
    args = parser.parse_args(argv)
    enable_compilation_cache()
    model = ColBERT.from_pretrained(args.checkpoint)
    work = (args.cache or Path(tempfile.mkdtemp())) / model.fingerprint()
    bits = [int(b) for b in args.nbits.split(",")]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.collections.split(","):
        collection = Collection(args.data / name, model, work / name)
        if args.spread:
            results[name] = measure_spread(collection, bits, args.spread)
        else:
            results[name] = evaluate_collection(collection, bits)
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.cache is None:
        shutil.rmtree(work.parent)
    if args.spread:
        print(spread_table(results))
        return
    columns = list(next(iter(results.values())))
    print("\n| nDCG@10 | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for name, rows in results.items():
        print(f"| {name} | " + " | ".join(f"{rows[c]['nDCG@10']:.4f}" for c in columns) + " |")
    if args.check:
        sys.exit(check(results))


def check(results: dict[str, dict[str, dict[str, float]]]) -> int:
    """1 where PLAID loses more nDCG@10 against raw embeddings than `_ALLOWED_LOSS`, else 0."""
    status = 0
    for name, rows in results.items():
        for nbits, allowed in _ALLOWED_LOSS.items():
            loss = rows["exact, raw"]["nDCG@10"] - rows[f"PLAID, {nbits} bits"]["nDCG@10"]
            if loss > allowed:
                print(f"{name}: {nbits} bits lose {loss:.4f}, allowed {allowed}")
                status = 1
    return status


class Collection:
    """A test collection and its token embeddings, kept in the folder `work`."""

    def __init__(self, folder: Path, model: ColBERT, work: Path):
        self.pids, texts = zip(*read_collection(folder / "collection.tsv"), strict=True)
        self.qrels = read_qrels(folder / "qrels.tsv")
        queries = read_queries(folder / "queries.tsv").items()
        self.queries = {q: t for q, t in queries if q in self.qrels}
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        file = work / "embeddings.npz"
        if file.is_file():
            self.documents = DocumentEmbeddings(**np.load(file))
        else:
            self.documents = model.encode_documents(texts)
            partial_file = work / "partial.npz"
            np.savez(partial_file, values=self.documents.values, offsets=self.documents.offsets)
            partial_file.rename(file)
        self.encoded = model.encode_queries(list(self.queries.values()))

    def search_raw(self) -> Hits:
        raw = RawSearch(self.documents.values, self.documents.offsets)
        depth = min(DEPTH, int((self.documents.lengths > 0).sum()))
        return batched(partial(raw.search, k=depth), self.encoded)

    def index(self, path: Path, **settings: Any) -> Index:
        documents = self.documents
        if not path.exists():
            Index.build(path, embeddings=documents.values, lengths=documents.lengths, **settings)
        return Index.open(path)

    def ranking(self, positions: np.ndarray) -> dict[str, list[str]]:
        rows = zip(self.queries, positions, strict=True)
        return {q: [self.pids[i] for i in row] for q, row in rows}


def evaluate_collection(collection: Collection, bits: list[int]) -> dict[str, dict[str, float]]:
    encoded = collection.encoded

    def measure(hits: Hits, seconds: float) -> dict[str, float]:
        ranking = collection.ranking(hits.positions)
        return evaluate_ranking(ranking, collection.qrels) | {"seconds": round(seconds, 2)}

    out = {}
    start = time.perf_counter()
    hits = collection.search_raw()
    out["exact, raw"] = measure(hits, time.perf_counter() - start)
    for nbits in bits:
        index = collection.index(collection.work / f"{nbits}bit.index", nbits=nbits)
        for exact in (False, True):
            start = time.perf_counter()
            mode = "exact" if exact else "accurate"
            search = lambda q, i=index, m=mode: i.search(q, DEPTH, mode=m)  # noqa: E731
            hits = batched(search, encoded)
            label = f"{'exact' if exact else 'PLAID'}, {nbits} bits"
            out[label] = measure(hits, time.perf_counter() - start)
        start = time.perf_counter()
        hits = batched(lambda q, i=index: i.search(q, 10), encoded)
        out[f"PLAID k=10, {nbits} bits"] = measure(hits, time.perf_counter() - start)
    return out


def measure_spread(
    collection: Collection, bits: list[int], seeds: int
) -> dict[str, dict[str, float]]:
    """nDCG@10 of compressed and of noisy token embeddings, reranking the raw ones' best."""
    found = collection.search_raw().positions[:, :_RERANKED]
    raw = gains(collection, found)
    used = np.unique(found)  # and no other documents are compressed
    candidates = np.searchsorted(used, found)
    everything = collection.documents
    documents = DocumentEmbeddings.from_list(
        [everything[i] for i in used], everything.values.shape[1]
    )
    out = {"raw": {"nDCG@10": float(raw.mean())}}

    def note(name: str, gained: np.ndarray, cosines: np.ndarray) -> None:
        changes = gained - raw
        out[name] = {
            "nDCG@10": float(gained.mean()),
            "change": float(changes.mean()),
            "standard error": float(changes.std() / len(changes) ** 0.5),
            "queries up": int((changes > 1e-9).sum()),
            "queries down": int((changes < -1e-9).sum()),
            "mean cosine": float(cosines.mean()),
        }
        print(name, json.dumps(out[name]), flush=True)

    values, path = documents.values, collection.work / "spread.index"
    for seed in range(seeds):
        shutil.rmtree(path, ignore_errors=True)
        # Neither the bits nor the rule change centroids.
        centroids = np.asarray(collection.index(path, nbits=bits[0], seed=seed).codec.centroids)
        heldout = np.random.default_rng(seed).choice(
            len(values), min(_HELD_OUT, len(values)), replace=False
        )
        for nbits, rule in itertools.product(bits, BUCKETS):
            codec = train_codec(centroids, values[np.sort(heldout)], nbits, rule)
            tokens = partial(decompressed, codec, *compress(codec, values), documents.offsets)
            cosines = np.concatenate([(x * tokens(i)).sum(1) for i, x in enumerate(documents)])
            order = reranked(collection, candidates, tokens)
            note(f"{nbits} bits, {rule}, seed {seed}", gains(collection, used[order]), cosines)
            if rule != BUCKETS[0]:
                continue
            for draw in range(_DRAWS):
                noisy = partial(with_noise, documents, cosines, (seed, draw))
                order = reranked(collection, candidates, noisy)
                name = f"{nbits} bits, noise, seed {seed}.{draw}"
                note(name, gains(collection, used[order]), cosines)
    shutil.rmtree(path)
    return out


def gains(collection: Collection, positions: np.ndarray) -> np.ndarray:
    """nDCG@10 of each query."""
    ranking = collection.ranking(positions)
    values = measure_queries(ranking, collection.qrels, ["nDCG@10"])["nDCG@10"]
    return np.array([values[q] for q in collection.queries])


def reranked(
    collection: Collection, candidates: np.ndarray, tokens: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Each query's candidates by MaxSim with other token embeddings; every document is read once.

    Args:
      candidates: int[Q, n], positions of documents.
      tokens: float32[L, D] of a position.
    """
    rows = [query[query.any(1)] for query in collection.encoded]
    scores = np.empty(candidates.shape, np.float32)
    flat = np.argsort(candidates, axis=None, kind="stable")
    documents, starts = np.unique(candidates.ravel()[flat], return_index=True)
    for document, places in zip(documents, np.split(flat, starts[1:]), strict=True):
        asking = [rows[i] for i in places // candidates.shape[1]]
        best = (np.concatenate(asking) @ tokens(document).T).max(axis=1)
        ends = np.cumsum([0, *map(len, asking[:-1])])
        scores.ravel()[places] = np.add.reduceat(best, ends)
    order = np.lexsort((candidates, -scores))
    return np.take_along_axis(candidates, order, axis=1)


def decompressed(
    codec: ResidualCodec, codes: np.ndarray, residuals: np.ndarray, offsets: np.ndarray, i: int
) -> np.ndarray:
    """Token embeddings of document i."""
    part = slice(offsets[i], offsets[i + 1])
    return decompress_on_host(codec, codes[part], residuals[part])


def with_noise(
    documents: DocumentEmbeddings, cosines: np.ndarray, seed: tuple[int, ...], i: int
) -> np.ndarray:
    """Document i, each token embedding turned in a random direction to a cosine with itself.

    Args:
      cosines: float32[T].
    """
    tokens = documents[i]
    cosine = np.minimum(cosines[documents.offsets[i] : documents.offsets[i + 1], None], 1)
    noise = np.random.default_rng((*seed, i)).standard_normal(tokens.shape, np.float32)
    noise -= (noise * tokens).sum(1, keepdims=True) * tokens
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return cosine * tokens + np.sqrt(1 - cosine**2) * noise


def spread_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Changes of nDCG@10 against raw token embeddings, all seeds of a kind in a row."""
    lines = ["| | | mean cosine | change of nDCG@10 | of each seed |", "|---" * 5 + "|"]
    for name, rows in results.items():
        kinds: dict[str, list[dict[str, float]]] = {}
        for label, row in rows.items():
            if "change" in row:
                kinds.setdefault(label.rpartition(", seed")[0], []).append(row)
        for kind, found in kinds.items():
            changes = np.array([row["change"] for row in found])
            cosine = np.mean([row["mean cosine"] for row in found])
            about = f"{changes.mean():+.4f}"
            if len(changes) > 1:
                about += f", standard deviation {changes.std(ddof=1):.4f}"
            each = " ".join(f"{change:+.4f}" for change in changes)
            lines.append(f"| {name} | {kind} | {cosine:.4f} | {about} | {each} |")
    return "\n".join(lines)


def batched(search, queries: np.ndarray, size: int = 32) -> Hits:
    parts = [search(queries[i : i + size]) for i in range(0, len(queries), size)]
    return concatenate_hits(parts)


if __name__ == "__main__":
    log_to_stderr()
    main()
