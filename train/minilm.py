"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`, `debian_descriptions.jsonl.gz`,
`wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web queries without judgements, and
129 queries with 64 passages each that a cross-encoder scored.

1. start/: the projection is one to a random third of all directions.
2. warm/: contrast of 23,000 pairs (title and abstract, question and answer, ...), the projection
   alone. A batch holds pairs of one source, so that its negatives are not told apart by their
   subject.
3. round1/: the model so far retrieves 10 of 9,000 passages for each of 160 web queries. No
   cross-encoder is at hand, so two teachers score them: MiniLM's own token embeddings at full
   width, and MPNet's single vectors with half the weight. Against the cross-encoder's order of the
   pool the two are better than either. The projection learns from these and from draws of 8 of the
   64 scored passages of each of the 129 queries.
4. round2/: the same with the model of round one, other queries and other draws.

The encoder stays as it is throughout: to move it for the better takes longer than this run, and
pairs as easy as these move it for the worse. Every setting is below.
`benchmarks/results/training_minilm.md` says what came of it. Started again, it goes on where it
stopped.
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

ROUNDS, DRAWS = ("round1", "round2"), 5
DIM, BATCH, WARM_STEPS = 128, 64, 360
MOST_PAIRS = {"acl": 5000, "medquad": 5000, "debian": 4000}
PASSAGES, WEB_QUERIES, K, WAYS, STEPS, NBITS = 9_000, 160, 10, 8, 48, 2
DOC_MAXLEN, MPNET_WEIGHT = 96, 0.5  # tokens of a passage, for all but the first teacher
WARM = [
    *("--loss", "contrastive"),
    *("--nway", "1"),
    *("--bsize", str(BATCH)),
    *("--maxsteps", str(WARM_STEPS)),
    *("--warmup", "30"),
    *("--warmup-bert", str(WARM_STEPS)),  # the encoder stays as it is
    *("--head-lr", "2e-3"),
    *("--dropout", "0"),
    *("--shuffle", "false"),  # batches are made up in the file
    *("--length-groups", "2"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "128"),
    *("--save-every", "60"),
    *("--log-every", "10"),
]
DISTILL = [
    # Teachers have scales of their own: each query's scores are mapped to 0..8. The student's lie
    # within 1 or 2: at a temperature of 1 it would learn to spread them before anything else.
    *("--normalize-teacher", "true"),
    *("--distillation-alpha", "8"),
    *("--student-temperature", "0.25"),
    *("--use-ib-negatives", "false"),
    *("--dropout", "0"),
    *("--nway", str(WAYS)),
    *("--bsize", "16"),
    *("--maxsteps", str(STEPS)),
    *("--warmup", "4"),
    *("--warmup-bert", str(STEPS)),
    *("--head-lr", "1e-3"),
    *("--length-groups", "2"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", str(DOC_MAXLEN)),
    *("--save-every", "8"),
    *("--log-every", "2"),
]


def random_start(args: argparse.Namespace, folder: Path) -> Path:
    """The encoder with a projection to 128 random orthonormal directions.

    Untrained they retrieve as well as principal components do.
    """
    model = ColBERT.from_pretrained(args.checkpoint, dim=DIM)
    params = model.params
    width = params["head"][0]["linear"]["kernel"].shape[0]
    directions, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, DIM)))
    params["head"][0]["linear"]["kernel"] = directions.astype(np.float32)
    model.set_params(params)
    model.save_pretrained(folder)
    return folder


def pairs(data: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and (query, passage) pairs of each source; Wikipedia's topics are sources."""

    def read(name: str) -> list[dict]:
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    yield "acl", [(r["title"], r["abstract"]) for r in read("acl_title_abstract")]
    yield "medquad", [(r["question"], r["answer"]) for r in read("medquad")]
    yield "debian", [(r["synopsis"], r["description"]) for r in read("debian_descriptions")]
    topics: dict[str, list[tuple[str, str]]] = {}
    for r in read("wikipedia_vital10k"):
        query = f"{r['title']} {r['description']}".strip()
        topics.setdefault(r["topic"], []).append((query, r["text"]))
    yield from topics.items()


def write_pairs(data: Path, file: Path) -> None:
    """Batches of pairs of one source each, in random order."""
    rng, batches = random.Random(0), []
    for name, rows in pairs(data):
        seen: set[str] = set()
        kept = []
        for query, passage in rows:
            # One answer a question, one question an answer: the others would be false negatives.
            known = query in seen or passage[:200] in seen
            if query.strip() and passage.strip() and not known:
                seen |= {query, passage[:200]}
                kept.append({"query": query, "positive": passage})
        rng.shuffle(kept)
        kept = kept[: MOST_PAIRS.get(name, len(kept))]
        batches += [kept[i : i + BATCH] for i in range(0, len(kept) - BATCH + 1, BATCH)]
    rng.shuffle(batches)
    file.write_text("".join(json.dumps(pair) + "\n" for batch in batches for pair in batch))


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
    retriever = ColBERT.from_pretrained(start, doc_maxlen=DOC_MAXLEN)
    if not index.exists():
        pids, texts = zip(*read_collection(collection), strict=True)
        Index.build(index, retriever, texts, ids=pids, nbits=NBITS)
    retrieve(Index.open(index), retriever, read_queries(queries), ranking, k=K)
    tokens = LateInteraction(ColBERT.from_pretrained(args.checkpoint))
    vectors = load_teacher(args.teacher, maxlen=DOC_MAXLEN)
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
        write_pairs(args.data, data / "pairs.jsonl")
        write_pool(args.data / "msmarco_v2_pool", data)
    if not model.exists():
        random_start(args, model)
    flags = [f"--checkpoint={model}", f"--folder={args.folder / 'warm'}"]
    if main(["train", "colbertv1", *flags, f"--triples={data / 'pairs.jsonl'}", *WARM]):
        return 2
    model = args.folder / "warm" / "last"
    files = data / "collection.tsv", data / "queries.tsv"
    for name in ROUNDS:
        folder = args.folder / name
        mined = mine(model, args, data / f"{name}.tsv", files[0], folder)
        examples = folder / "all.jsonl"
        examples.write_text(
            mined.read_text("utf-8") + (data / f"{name}.jsonl").read_text("utf-8"), "utf-8"
        )
        flags = [f"--checkpoint={model}", f"--folder={folder / 'run'}", f"--examples={examples}"]
        flags += [f"--collection={files[0]}", f"--queries={files[1]}", *DISTILL]
        if main(["train", "distill", *flags]):
            return 2
        model = folder / "run" / "last"
    return 0


if __name__ == "__main__":
    sys.exit(run())
