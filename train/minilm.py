"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`, `debian_descriptions.jsonl.gz`,
`wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web queries without judgements, and
129 queries with 64 passages each that a cross-encoder scored.

1. wide/: a 384-wide projection, the identity to begin with, learns from three sources in turn,
   each step from one: contrast of pairs (title and abstract, question and answer, ...), Wikipedia's
   titles and texts, and draws of 12 of the 64 scored passages of the 129 queries. A batch of pairs
   is of one source, so that its negatives are not told apart by their subject. How MiniLM's own
   tokens score all pairs of a batch is half of what is learned; of Wikipedia, whose titles are no
   questions, all of it.
2. narrow/: the principal components of the wide tokens. Learning at full width first lost less than
   learning at 128 from the start.
3. round1/: the model so far retrieves 10 of 9,000 passages for each of 160 web queries. No
   cross-encoder is at hand, so two teachers score them: the wide tokens, and MPNet's single
   vectors with half the weight. The narrow projection learns from these lists and the sources
   before, and in every step from how the wide tokens score the batch.
4. round2/: the same with the model of round one and other queries.

The encoder stays as it is throughout: to move it for the better takes longer than this run, and
pairs as easy as these move it for the worse. Every setting is below.
`benchmarks/results/training_minilm.md` says what came of it. Started again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax import ColBERT
from colbert_jax.evaluation import read_collection, read_queries
from colbert_jax.index import Index
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import (
    LateInteraction,
    Task,
    TrainingConfig,
    load_teacher,
    pair_examples,
    stanford_examples,
    train,
)
from colbert_jax.training.mining import make_examples, retrieve, score_ranking

ROUNDS, NBITS = ("round1", "round2"), 2
WIDTH, DIM = 384, 128
TEXT: dict[str, Any] = dict(query_maxlen=32, doc_maxlen=96)
BATCH = 48
MOST_PAIRS = {"acl": 5000, "medquad": 5000, "debian": 4000}
PASSAGES, WEB_QUERIES, K, DRAWS = 9_000, 160, 10, 8
MPNET_WEIGHT, POOL_WAYS, WEB_WAYS = 0.5, 12, 8
WIDE_STEPS, ROUND_STEPS = 300, 80
PCA_EVERY = 4  # one in so many pairs gives tokens to the principal components

# Pairs: the answer to a query among those of the batch.
WIDE = TrainingConfig(
    loss="contrastive",
    nway=1,
    use_ib_negatives=False,
    bsize=BATCH,
    dropout=0.0,
    shuffle=False,  # batches are made up in the file
    length_groups=2,
    maxsteps=WIDE_STEPS,
    warmup=30,
    warmup_bert=WIDE_STEPS,  # the encoder stays as it is
    head_lr=1e-3,
    coupled_weight=0.5,
    save_every=40,
)
ROUND = dataclasses.replace(
    WIDE,
    coupled_weight=0.75,
    maxsteps=ROUND_STEPS,
    warmup=10,
    warmup_bert=ROUND_STEPS,
    head_lr=3e-4,
    save_every=20,
)
# Lists with a teacher's scores. Teachers have scales of their own: each query's are mapped to 0..8.
LISTS = dict(
    loss="distillation",
    normalize_teacher=True,
    distillation_alpha=8.0,
    shuffle=True,
)
POOL = LISTS | dict(nway=POOL_WAYS, bsize=4)
# Two weak teachers know the order of ten alike passages less well: scores need to differ by 2 only.
WEB = LISTS | dict(nway=WEB_WAYS, bsize=8, student_temperature=0.25)


def with_projection(args: argparse.Namespace, make: Callable[[], np.ndarray], folder: Path) -> Path:
    """The encoder with the projection that `make` returns, float32[384, dim]."""
    if not folder.exists():
        kernel = make()
        model = ColBERT.from_pretrained(args.checkpoint, dim=kernel.shape[1], **TEXT)
        params = model.params
        params["head"][0]["linear"]["kernel"] = kernel.astype(np.float32)
        model.set_params(params)
        model.save_pretrained(folder)
    return folder


def narrowed(wide: Path, texts: Path) -> np.ndarray:
    """The principal components of the wide tokens of some texts, turned at random so that all
    dimensions vary alike, as the residuals' codec expects; after the wide projection."""
    model = ColBERT.from_pretrained(wide)
    rows = [json.loads(line) for line in texts.open()][::PCA_EVERY]
    tokens = model.encode_documents([row["positive"] for row in rows]).values
    asked = model.encode_queries([row["query"] for row in rows]).reshape(-1, model.dim)
    _, directions = np.linalg.eigh(tokens.T @ tokens + asked.T @ asked)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))
    return model.params["head"][0]["linear"]["kernel"] @ directions[:, -DIM:] @ turn


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


def write_pairs(data: Path, folder: Path) -> None:
    """Batches of pairs of one source each, in random order: `pairs.jsonl`, and `wiki.jsonl`."""
    rng = random.Random(0)
    batches: dict[str, list[list[dict]]] = {"pairs": [], "wiki": []}
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
        file = batches["pairs" if name in MOST_PAIRS else "wiki"]
        file += [kept[i : i + BATCH] for i in range(0, len(kept) - BATCH + 1, BATCH)]
    for name, made in batches.items():
        rng.shuffle(made)
        lines = [json.dumps(pair) + "\n" for batch in made for pair in batch]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_pool(pool: Path, folder: Path) -> None:
    """The collection, all queries, draws of the scored pool, and each round's web queries."""
    scored = [json.loads(line) for line in (pool / "examples_64way.jsonl").open()]
    wanted = {str(pid) for _, *passages in scored for pid, _ in passages}
    with gzip.open(pool / "collection.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    others = [line for line in lines if line.split("\t")[0] not in wanted]
    kept = {*others[: PASSAGES - len(wanted)]}
    chosen = [line for line in lines if line in kept or line.split("\t")[0] in wanted]
    (folder / "collection.tsv").write_text("".join(chosen), "utf-8")
    draws = []
    for seed in range(DRAWS):
        draw = folder / "draw.jsonl"
        make_examples(
            pool / "examples_64way.jsonl", draw, nway=POOL_WAYS, seed=seed, overwrite=True
        )
        draws.append(draw.read_text("utf-8"))
    for made in folder.glob("draw.jsonl*"):
        made.unlink()
    (folder / "pool.jsonl").write_text("".join(draws), "utf-8")
    web = (pool / "dev_small_queries.tsv").read_text("utf-8").splitlines(keepends=True)
    queries = (pool / "queries.tsv").read_text("utf-8").splitlines(keepends=True)
    ids = {line.split("\t")[0] for line in queries}
    asked = [line for line in web if line.split("\t")[0] not in ids]
    for number, name in enumerate(ROUNDS):
        part = asked[number * WEB_QUERIES : (number + 1) * WEB_QUERIES]
        queries += part
        (folder / f"{name}.tsv").write_text("".join(part), "utf-8")
    (folder / "queries.tsv").write_text("".join(queries), "utf-8")


def mine(
    start: Path,
    wide: Path,
    args: argparse.Namespace,
    queries: Path,
    collection: Path,
    folder: Path,
) -> Path:
    """Examples of the queries, scored by both teachers."""
    folder.mkdir(parents=True, exist_ok=True)
    index, ranking = folder / "index", folder / "ranking.tsv"
    retriever = ColBERT.from_pretrained(start)
    if not index.exists():
        pids, texts = zip(*read_collection(collection), strict=True)
        Index.build(index, retriever, texts, ids=pids, nbits=NBITS)
    retrieve(Index.open(index), retriever, read_queries(queries), ranking, k=K)
    tokens = LateInteraction(ColBERT.from_pretrained(wide))
    vectors = load_teacher(args.teacher, maxlen=TEXT["doc_maxlen"])
    files = []
    for name, teacher in (("tokens", tokens), ("vectors", vectors)):
        files.append(folder / f"{name}.jsonl")
        score_ranking(ranking, queries, collection, teacher, files[-1])
    both = folder / "scores.jsonl"
    both.write_text("".join(combined(*files)), "utf-8")
    made = make_examples(both, folder / "examples.jsonl", nway=WEB_WAYS, overwrite=True)
    return made.path


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


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    data = args.folder / "data"
    if not (data / "queries.tsv").exists():
        data.mkdir(parents=True, exist_ok=True)
        write_pairs(args.data, data)
        write_pool(args.data / "msmarco_v2_pool", data)
    collection, queries = data / "collection.tsv", data / "queries.tsv"

    answers, wiki = (pair_examples(data / f"{name}.jsonl") for name in ("pairs", "wiki"))
    pool = stanford_examples(data / "pool.jsonl", queries, collection)

    def learn(start: Path, teacher: Path, name: str, config: TrainingConfig, *tasks: Task) -> Path:
        fixed, model = (ColBERT.from_pretrained(place) for place in (teacher, start))
        return train(model, answers, args.folder / name, config, tasks=tasks, teacher=fixed).model

    # Titles are no questions: what the teacher makes of them is learned, not which is whose.
    titles = Task("wiki", wiki, 0.25, {"coupled_weight": 1.0})
    draws = Task("pool", pool, 0.3, POOL | {"coupled_weight": 0.3})
    wide = with_projection(args, lambda: np.eye(WIDTH), args.folder / "wide_start")
    wide = learn(wide, wide, "wide", WIDE, titles, draws)
    principal = partial(narrowed, wide, data / "pairs.jsonl")
    model = with_projection(args, principal, args.folder / "narrow")
    for name in ROUNDS:
        mined = mine(model, wide, args, data / f"{name}.tsv", collection, args.folder / name)
        web = stanford_examples(mined, queries, collection)
        lists = Task("web", web, 0.2, WEB | {"coupled_weight": 0.3})
        model = learn(model, wide, f"{name}/run", ROUND, titles, draws, lists)


if __name__ == "__main__":
    run()
