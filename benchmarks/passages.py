"""Real token embeddings for the search benchmarks: passages and queries of a data folder, encoded.

    python benchmarks/passages.py DATA --checkpoint CHECKPOINT --cache FOLDER [--passages 60000]

DATA holds `train/` and `eval/` (their README says what is in them). Passages are package
descriptions, medical answers, web passages and the evaluation collections, without repetitions, in
an order shuffled by a fixed seed, so that the first n of them are a random sample whatever n is.
Queries are real questions, at most 32 tokens. Embeddings wider than --dim are projected on the
principal directions of the first passages' tokens and brought back to unit length, for an encoder
that has no trained projection; `load` turns them all by one random rotation, because principal
directions differ in variance as those of a trained projection do not. An interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from colbert_jax import ColBERT
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation import read_collection, read_queries
from colbert_jax.progress import log_to_stderr, progress_bar
from colbert_jax.runtime import enable_compilation_cache

_CHUNK = 1000  # passages in one file of the cache
_MAXLEN = 180
_QUERY_MAXLEN = 32
_COLLECTIONS = ("scifact", "squad_dev", "cranfield", "vaswani_npl", "cacm")


def read_passages(data: Path) -> list[str]:
    """All distinct passages, shuffled."""
    texts = list(dict.fromkeys(" ".join(text.split()) for text in _passages(data)))
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order if texts[i]]


def _passages(data: Path) -> Iterator[str]:
    for record in _records(data / "train" / "debian_descriptions.jsonl.gz"):
        yield f"{record['synopsis']}. {record['description']}"
    for record in _records(data / "train" / "medquad.jsonl.gz"):
        yield record["answer"]
    with gzip.open(data / "train" / "msmarco_v2_pool" / "collection.tsv.gz", "rt") as stream:
        for line in stream:
            yield line.split("\t", 1)[1]
    for name in _COLLECTIONS:
        for _, text in read_collection(data / "eval" / name / "collection.tsv"):
            yield text


def _records(file: Path) -> Iterator[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def read_questions(data: Path, n: int) -> list[str]:
    """n real questions, the same number from each file as far as it goes, shuffled."""
    files = [data / "eval" / name / "queries.tsv" for name in _COLLECTIONS]
    files.append(data / "train" / "msmarco_v2_pool" / "dev_small_queries.tsv")
    rng = np.random.default_rng(1)
    groups = [list(read_queries(file).values()) for file in files]
    mixed = [texts[i] for texts in groups for i in rng.permutation(len(texts))[: n // len(groups)]]
    rest = sorted(set(groups[-1]) - set(mixed))
    mixed += [rest[i] for i in rng.permutation(len(rest))[: n - len(mixed)]]
    return [mixed[i] for i in rng.permutation(n)]


def principal_directions(values: np.ndarray, dim: int) -> np.ndarray:
    """float32[D, dim]: the directions that keep most of the dot products between these rows."""
    values = np.asarray(values, np.float32)
    _, vectors = np.linalg.eigh(values.T @ values)
    return np.ascontiguousarray(vectors[:, ::-1][:, :dim])


def project(values: np.ndarray, directions: np.ndarray | None) -> np.ndarray:
    """Unit rows in fewer dimensions; rows of zeros stay zeros."""
    if directions is None:
        return values
    values = values @ directions
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def prepare(
    data: Path, checkpoint: str, cache: Path, passages: int, queries: int, dim: int
) -> None:
    """Encode into the cache what is not there yet."""
    cache.mkdir(parents=True, exist_ok=True)
    texts = read_passages(data)
    if len(texts) < passages:
        raise SystemExit(f"{data}: {len(texts)} distinct passages, {passages} wanted")
    model = ColBERT.from_pretrained(checkpoint, doc_maxlen=_MAXLEN, query_maxlen=_QUERY_MAXLEN)
    directions = None
    if model.dim > dim:
        file = cache / "directions.npy"
        if not file.exists():
            np.save(file, principal_directions(model.encode_documents(texts[:_CHUNK]).values, dim))
        directions = np.load(file)
    file = cache / "queries.npy"
    if not file.exists():
        encoded = model.encode_queries(read_questions(data, queries))
        np.save(file, project(np.asarray(encoded), directions).astype(np.float32))
    with progress_bar(passages, "encoding", "doc") as bar:
        for start in range(0, passages, _CHUNK):
            file = cache / f"chunk{start // _CHUNK:04d}.npz"
            if not file.exists():
                rows = model.encode_documents(texts[start : start + _CHUNK])
                values = project(rows.values, directions).astype(np.float16)
                temporary = file.with_suffix(".tmp.npz")
                np.savez(temporary, values=values, lengths=rows.lengths)
                temporary.rename(file)
            file = cache / f"token_ids{start // _CHUNK:04d}.npy"
            if not file.exists():
                np.save(file, _token_ids(model, texts[start : start + _CHUNK]))
            bar.update(_CHUNK)


def _token_ids(model: ColBERT, texts: list[str]) -> np.ndarray:
    """int32[T]: the vocabulary's ids of the tokens that `encode_documents` returns."""
    rows = model.tokenizer.documents(texts).ids
    return np.concatenate([ids[model.tokenizer.kept(ids)] for ids in rows]).astype(np.int32)


def token_ids(cache: Path, passages: int) -> np.ndarray | None:
    """int32[T] of the first passages' tokens, or None where the cache lacks some."""
    files = [cache / f"token_ids{i:04d}.npy" for i in range(-(-passages // _CHUNK))]
    if not all(file.exists() for file in files):
        return None
    chunks = [np.load(cache / f"chunk{i:04d}.npz")["lengths"] for i in range(len(files))]
    lengths = np.concatenate(chunks)[:passages]
    return np.concatenate([np.load(file) for file in files])[: lengths.sum()]


def load(cache: Path, passages: int) -> tuple[DocumentEmbeddings, np.ndarray]:
    """float16 embeddings of the first passages, and float32[Q, Lq, dim] of the queries."""
    chunks = [np.load(cache / f"chunk{i:04d}.npz") for i in range(-(-passages // _CHUNK))]
    lengths = np.concatenate([chunk["lengths"] for chunk in chunks])[:passages]
    values = np.empty((int(lengths.sum()), chunks[0]["values"].shape[1]), np.float16)
    turn, start = rotation(values.shape[1]), 0
    for chunk in chunks:
        part = chunk["values"][: len(values) - start].astype(np.float32) @ turn
        values[start : start + len(part)] = part
        start += len(part)
    return DocumentEmbeddings.from_lengths(values, lengths), np.load(cache / "queries.npy") @ turn


def rotation(dim: int) -> np.ndarray:
    """A random orthogonal float32[dim, dim]."""
    normal = np.random.default_rng(2).normal(size=(dim, dim))
    return np.linalg.qr(normal)[0].astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=1_024)
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)  # keep more of a CPU's cores busy than one
    enable_compilation_cache()
    prepare(
        args.data,
        args.checkpoint,
        args.cache,
        passages=args.passages,
        queries=args.queries,
        dim=args.dim,
    )


if __name__ == "__main__":
    log_to_stderr()
    main()
