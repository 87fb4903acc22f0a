"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds pairs of texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`,
`debian_descriptions.jsonl.gz`, `wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web
queries without judgements, and 129 queries with 64 passages each that a cross-encoder scored.

1. projection/: the projection alone, by contrast of 4,800 pairs. A batch holds pairs of one source,
   so that its negatives are not told apart by their subject.
2. round1/: distillation from the cross-encoder's scores: six draws of 8 of each query's passages.
3. mined/: round one retrieves 10 of 10,000 passages for each of 250 other web queries. No
   cross-encoder is at hand, so two teachers score them: MiniLM's own token embeddings at full
   width, and MPNet's single vectors with half the weight. Against the cross-encoder's order of the
   pool the two are better than either.
4. round2/: distillation from these and from four more draws of the pool.

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

MODEL = [
    # Markers and [MASK] expansion would have to be learnt; this run is too short for that.
    *("--markers", "false"),
    *("--query-expansion", "false"),
    *("--mask-punctuation", "false"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "96"),
    *("--dropout", "0"),
    *("--length-groups", "2"),
]
PROJECTION = [
    *("--loss", "contrastive"),
    *("--nway", "1"),
    *("--bsize", "32"),
    *("--maxsteps", "150"),
    *("--warmup", "10"),
    *("--warmup-bert", "150"),
    *("--head-lr", "4e-4"),
    *("--shuffle", "false"),
    *("--save-every", "50"),
    *("--log-every", "5"),
]
DISTILL = [
    # Teachers have scales of their own: each query's scores are mapped to 0..8.
    *("--normalize-teacher", "true"),
    *("--distillation-alpha", "8"),
    *("--use-ib-negatives", "false"),
    *("--nway", "8"),
    *("--bsize", "16"),
    *("--maxsteps", "48"),
    *("--warmup", "4"),
    *("--head-lr", "1e-4"),
    *("--save-every", "12"),
    *("--log-every", "2"),
]
LR = {"round1": "3e-5", "round2": "2e-5"}
BATCH = 32
MOST_PAIRS = {"debian": 6000, "medquad": 5000}
PASSAGES, WEB_QUERIES, WAYS = 10_000, 250, 8
DRAWS = {"round1": range(6), "round2": range(6, 10)}  # seeds
K, NBITS, MPNET_MAXLEN, MPNET_WEIGHT = 10, 2, 96, 0.5


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
    """The collection, all queries, the web queries to mine for, the draws of each round."""
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
    asked = [line for line in web if line.split("\t")[0] not in ids][:WEB_QUERIES]
    (folder / "web.tsv").write_text("".join(asked), "utf-8")
    (folder / "queries.tsv").write_text("".join(queries + asked), "utf-8")
    for name, seeds in DRAWS.items():
        draws = []
        for seed in seeds:
            draw = folder / "draw.jsonl"
            make_examples(pool / "examples_64way.jsonl", draw, nway=WAYS, seed=seed, overwrite=True)
            draws.append(draw.read_text("utf-8"))
        for made in folder.glob("draw.jsonl*"):
            made.unlink()
        (folder / f"{name}.jsonl").write_text("".join(draws), "utf-8")


def mine(retriever: ColBERT, args: argparse.Namespace, data: Path, folder: Path) -> Path:
    """Examples of the web queries, scored by both teachers."""
    folder.mkdir(parents=True, exist_ok=True)
    collection, queries = data / "collection.tsv", data / "web.tsv"
    index, ranking = folder / "index", folder / "ranking.tsv"
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
    data = args.folder / "data"
    if not (data / "round2.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        write_pairs(args.data, data / "pairs.jsonl")
        write_pool(args.data / "msmarco_v2_pool", data)

    def stage(recipe: str, start: str | Path, name: str, *flags: str) -> Path:
        folder = args.folder / name
        if main(["train", recipe, f"--checkpoint={start}", f"--folder={folder}", *MODEL, *flags]):
            raise SystemExit(2)
        return folder / "last"

    def distil(start: Path, name: str, examples: Path) -> Path:
        texts = [f"--{file}={data / file}.tsv" for file in ("collection", "queries")]
        flags = [f"--examples={examples}", *texts, *DISTILL, "--lr", LR[name]]
        return stage("distill", start, name, *flags)

    triples = f"--triples={data / 'pairs.jsonl'}"
    start = stage("colbertv1", args.checkpoint, "projection", "--dim=128", triples, *PROJECTION)
    first = distil(start, "round1", data / "round1.jsonl")
    mined = mine(ColBERT.from_pretrained(first), args, data, args.folder / "mined")
    examples = args.folder / "mined" / "all.jsonl"
    examples.write_text(mined.read_text("utf-8") + (data / "round2.jsonl").read_text("utf-8"))
    distil(first, "round2", examples)
    return 0


if __name__ == "__main__":
    sys.exit(run())
