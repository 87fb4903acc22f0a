"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`, `debian_descriptions.jsonl.gz`,
`wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web queries without judgements, and
129 queries with 64 passages each that a cross-encoder scored.

1. start/: the projection is that to the principal components of the token embeddings of 1,600
   passages.
2. round1/: the model so far retrieves 10 of 9,000 passages for each of 160 web queries. No
   cross-encoder is at hand, so two teachers score them: MiniLM's own token embeddings at full
   width, and MPNet's single vectors with half the weight. Against the cross-encoder's order of the
   pool the two are better than either. Distillation from these and from draws of 8 of the 64
   scored passages of each of the 129 queries.
3. round2/: the same with the model of round one, other queries and other draws.

Every setting is below. `benchmarks/results/training_minilm.md` says what came of it. Started again,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from colbert_jax import ColBERT
from colbert_jax.cli import main
from colbert_jax.evaluation import read_collection, read_queries
from colbert_jax.index import Index
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import LateInteraction, load_teacher
from colbert_jax.training.mining import make_examples, retrieve, score_ranking

TEXT = [*("--query-maxlen", "32"), *("--doc-maxlen", "96")]
DISTILL = [
    # Teachers have scales of their own: each query's scores are mapped to 0..8. The student's lie
    # within 1 or 2: at a temperature of 1 it would learn to spread them before anything else.
    *("--normalize-teacher", "true"),
    *("--distillation-alpha", "8"),
    *("--student-temperature", "0.25"),
    *("--use-ib-negatives", "false"),
    *("--dropout", "0"),
    *("--nway", "8"),
    *("--bsize", "16"),
    *("--maxsteps", "32"),
    *("--warmup", "4"),
    *("--lr", "2e-5"),
    *("--head-lr", "5e-5"),
    *("--length-groups", "2"),
    *("--save-every", "8"),
    *("--log-every", "2"),
]
ROUNDS, DRAWS = ("round1", "round2"), 3
DIM, SAMPLE = 128, 400  # passages of each source
PASSAGES, WEB_QUERIES, K, WAYS, NBITS = 9_000, 160, 10, 8, 2
MPNET_MAXLEN, MPNET_WEIGHT = 96, 0.5


def principal_start(args: argparse.Namespace, folder: Path) -> Path:
    """The encoder with a projection to the principal components of its token embeddings."""
    fields = {
        "acl_title_abstract": "abstract",
        "medquad": "answer",
        "debian_descriptions": "description",
        "wikipedia_vital10k": "text",
    }
    passages, rng = [], random.Random(0)
    for name, field in fields.items():
        with gzip.open(args.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts = [json.loads(line)[field] for line in file]
        passages += rng.sample([text for text in texts if text.strip()], SAMPLE)
    full = ColBERT.from_pretrained(args.checkpoint, doc_maxlen=128)
    tokens = full.encode_documents(passages).values.astype(np.float32)
    vectors = np.linalg.eigh(tokens.T @ tokens)[1]  # the largest last
    model = ColBERT.from_pretrained(args.checkpoint, dim=DIM)
    params = model.params
    params["head"][0]["linear"]["kernel"] = vectors[:, : -DIM - 1 : -1].astype(np.float32)
    model.set_params(params)
    model.save_pretrained(folder)
    return folder


def write_pool(pool: Path, folder: Path) -> None:
    """The collection, all queries, and for each round its web queries and draws of the pool."""
    scored = [json.loads(line) for line in (pool / "examples_64way.jsonl").open()]
    wanted = {str(pid) for _, *passages in scored for pid, _ in passages}
    with gzip.open(pool / "collection.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    others = [line for line in lines if line.split("\t")[0] not in wanted]
    kept = {*others[: PASSAGES - len(wanted)]}
    chosen = [line for line in lines if line in kept or line.split("\t")[0] in wanted]
    (folder / "collection.tsv").write_text("".join(chosen), "utf-8")
    web = (pool / "dev_small_queries.tsv").read_text("utf-8").splitlines(keepends=True)
    queries = (pool / "queries.tsv").read_text("utf-8").splitlines(keepends=True)
    ids = {line.split("\t")[0] for line in queries}
    asked = [line for line in web if line.split("\t")[0] not in ids]
    for number, name in enumerate(ROUNDS):
        part = asked[number * WEB_QUERIES : (number + 1) * WEB_QUERIES]
        queries += part
        (folder / f"{name}.tsv").write_text("".join(part), "utf-8")
        draws = []
        for seed in range(number * DRAWS, (number + 1) * DRAWS):
            draw = folder / "draw.jsonl"
            make_examples(pool / "examples_64way.jsonl", draw, nway=WAYS, seed=seed, overwrite=True)
            draws.append(draw.read_text("utf-8"))
        for made in folder.glob("draw.jsonl*"):
            made.unlink()
        (folder / f"{name}.jsonl").write_text("".join(draws), "utf-8")
    (folder / "queries.tsv").write_text("".join(queries), "utf-8")


def mine(start: Path, args: argparse.Namespace, queries: Path, collection: Path, folder: Path):
    """Examples of the queries, scored by both teachers."""
    folder.mkdir(parents=True, exist_ok=True)
    index, ranking = folder / "index", folder / "ranking.tsv"
    retriever = ColBERT.from_pretrained(start, doc_maxlen=MPNET_MAXLEN)
    if not index.exists():
        pids, texts = zip(*read_collection(collection), strict=True)
        Index.build(index, retriever, texts, ids=pids, nbits=NBITS)
    retrieve(Index.open(index), retriever, read_queries(queries), ranking, k=K)
    tokens = LateInteraction(ColBERT.from_pretrained(args.checkpoint))
    vectors = load_teacher(args.teacher, maxlen=MPNET_MAXLEN)
    files = []
    for name, teacher in (("tokens", tokens), ("vectors", vectors)):
        files.append(folder / f"{name}.jsonl")
        score_ranking(ranking, queries, collection, teacher, files[-1])
    both = folder / "scores.jsonl"
    both.write_text("".join(combined(*files)), "utf-8")
    return make_examples(both, folder / "examples.jsonl", nway=WAYS, overwrite=True).path


def combined(tokens: Path, vectors: Path) -> Iterator[str]:
    """Lines of scores: of each query's, both are brought to mean 0 and deviation 1, and added."""

    def standard(passages: list) -> dict:
        scores = np.array([score for _, score in passages])
        scores = (scores - scores.mean()) / max(scores.std(), 1e-9)
        return {pid: float(score) for (pid, _), score in zip(passages, scores, strict=True)}

    for line, other in zip(tokens.open(), vectors.open(), strict=True):
        (qid, *first), (same, *second) = json.loads(line), json.loads(other)
        assert qid == same
        more = standard(second)
        total = {pid: x + MPNET_WEIGHT * more[pid] for pid, x in standard(first).items()}
        best_first = sorted(total.items(), key=lambda item: -item[1])
        yield json.dumps([qid, *([pid, score] for pid, score in best_first)]) + "\n"


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    data, model = args.folder / "data", args.folder / "start"
    if not (data / "queries.tsv").exists():
        data.mkdir(parents=True, exist_ok=True)
        write_pool(args.data / "msmarco_v2_pool", data)
    if not model.exists():
        principal_start(args, model)
    files = data / "collection.tsv", data / "queries.tsv"
    for name in ROUNDS:
        folder = args.folder / name
        mined = mine(model, args, data / f"{name}.tsv", files[0], folder)
        examples = folder / "all.jsonl"
        examples.write_text(
            mined.read_text("utf-8") + (data / f"{name}.jsonl").read_text("utf-8"), "utf-8"
        )
        flags = [f"--checkpoint={model}", f"--folder={folder / 'run'}", f"--examples={examples}"]
        flags += [f"--collection={files[0]}", f"--queries={files[1]}", *TEXT, *DISTILL]
        if main(["train", "distill", *flags]):
            return 2
        model = folder / "run" / "last"
    return 0


if __name__ == "__main__":
    sys.exit(run())
