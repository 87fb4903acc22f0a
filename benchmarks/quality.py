"""Retrieval quality: PLAID and exact scoring of compressed and raw token embeddings, side by side.

    python benchmarks/quality.py DATA --checkpoint CHECKPOINT [--collections cranfield,scifact] \
        [--json results.json]

DATA holds a folder per collection with `collection.tsv`, `queries.tsv` and `qrels.tsv`. Prints one
Markdown table of nDCG@10, and writes every measure with --json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from colbert_jax import ColBERT, Index
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation import evaluate_ranking, read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import DEPTH
from colbert_jax.progress import log_to_stderr
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.search.arrays import Hits, RawArrays, concatenate_hits
from colbert_jax.search.exact import exact_search

_ALLOWED_LOSS = {2: 0.01, 4: 0.003}


def main() -> None:
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
    args = parser.parse_args()
    enable_compilation_cache()
    model = ColBERT.from_pretrained(args.checkpoint)
    work = (args.cache or Path(tempfile.mkdtemp())) / model.fingerprint()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.collections.split(","):
        results[name] = evaluate_collection(
            args.data / name, model, work / name, [int(b) for b in args.nbits.split(",")]
        )
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.cache is None:
        shutil.rmtree(work.parent)
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


def evaluate_collection(
    folder: Path, model: ColBERT, work: Path, bits: list[int]
) -> dict[str, dict[str, float]]:
    pids, texts = zip(*read_collection(folder / "collection.tsv"), strict=True)
    qrels = read_qrels(folder / "qrels.tsv")
    queries = {q: t for q, t in read_queries(folder / "queries.tsv").items() if q in qrels}
    work.mkdir(parents=True, exist_ok=True)

    def measure(hits: Hits, seconds: float) -> dict[str, float]:
        ranking = {
            q: [pids[i] for i in row] for q, row in zip(queries, hits.positions, strict=True)
        }
        return evaluate_ranking(ranking, qrels) | {"seconds": round(seconds, 2)}

    file = work / "embeddings.npz"
    if file.is_file():
        documents = DocumentEmbeddings(**np.load(file))
    else:
        documents = model.encode_documents(texts)
        partial_file = work / "partial.npz"
        np.savez(partial_file, values=documents.values, offsets=documents.offsets)
        partial_file.rename(file)
    encoded = model.encode_queries(list(queries.values()))
    raw = RawArrays(jnp.asarray(documents.values), jnp.asarray(documents.offsets, jnp.int32))
    out = {}
    start = time.perf_counter()
    depth = min(DEPTH, int((documents.lengths > 0).sum()))
    score_all = partial(exact_search, raw, documents.lengths, k=depth)
    hits = batched(lambda q: score_all(jnp.asarray(q)), encoded)
    out["exact, raw"] = measure(hits, time.perf_counter() - start)
    for nbits in bits:
        path = work / f"{nbits}bit.index"
        if not path.exists():
            Index.build(path, embeddings=documents.values, lengths=documents.lengths, nbits=nbits)
        index = Index.open(path)
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


def batched(search, queries: np.ndarray, size: int = 32) -> Hits:
    parts = [search(queries[i : i + size]) for i in range(0, len(queries), size)]
    return concatenate_hits(parts)


if __name__ == "__main__":
    log_to_stderr()
    main()
