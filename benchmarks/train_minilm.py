"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python benchmarks/train_minilm.py DATA --checkpoint MINILM --folder runs/minilm

DATA holds texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`, `wikipedia_vital10k.jsonl.gz`)
and `msmarco_v2_pool/`: passages, web queries without judgements, and 129 queries with 64 passages
each that a cross-encoder scored. Nothing is learned from the collections that the result is
measured on.

1. wide/: the coupled teacher, a 384-wide projection. It starts from MiniLM's own tokens, half
   whitened: principal component i is divided by the fourth root of its variance, for what tells
   passages apart is in components of little variance too. It learns from titles and questions with
   their passages, from what the cross-encoder made of the 129 queries' passages, and to score as it
   did before. The encoder stays as it is, so its tokens are computed once, and 300 steps are short.
2. narrow/: the start, the first 128 half whitened components of these tokens, weighted so that each
   word piece counts alike, however often it occurs.
3. round1/: the model so far retrieves the 32 nearest passages of each query; draws of them are what
   the upper half of the encoder and the projection learn from, to score as the teacher does and to
   match each query token as it does: web queries and titles of Wikipedia over short passages,
   titles, questions and sentences over long ones. Titles and questions learn which passage is
   theirs too, by contrast, and the 129 queries what the cross-encoder made of their passages.
4. round2/: the same with the model of round one, other queries and other passages.

Every setting is below. `benchmarks/results/training_minilm.md` says what came of it. Started again,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax import ColBERT, Retriever
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation import read_collection, read_queries
from colbert_jax.mining import make_examples, retrieve
from colbert_jax.models.colbert import unit_length
from colbert_jax.progress import log_to_stderr
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import Task, TrainingConfig, stanford_examples, train
from colbert_jax.training.step import apply_gradients, init_moments, matches, score_loss

ROUNDS = ("round1", "round2")
DIM, NBITS = 128, 2
TEXT: dict[str, Any] = dict(query_maxlen=32, doc_maxlen=180)
SHORT = 90  # tokens of a short passage at most

# Of each round.
WEB_PASSAGES, WEB_QUERIES, WIKIPEDIA, ABSTRACTS, ANSWERS = 6_000, 1_500, 2_500, 2_000, 2_000
NEAREST, WAYS, DRAWS = 32, 4, 6
POOL_WAYS, POOL_DRAWS = 12, 8
WHITENING = 0.25  # a component is divided by its variance to this power
EIGENVALUE = 1e-5  # the smallest variance that is believed

# The wide projection. Titles and questions with their passage, those of the batch as negatives.
WIDE = TrainingConfig(
    loss="contrastive",
    temperature=1 / 3,
    nway=1,
    use_ib_negatives=False,
    coupled_weight=0.5,
    coupled_tokens=0.5,
    bsize=40,
    head_lr=1e-3,
    maxsteps=300,
    warmup=30,
)
WIDE_NEIGHBOURS = replace(WIDE, coupled_weight=1.0, bsize=16, nway=WAYS)  # any passages
# A cross-encoder's scores, each query's mapped to 0..8.
POOL: dict[str, Any] = dict(
    loss="distillation",
    nway=POOL_WAYS,
    bsize=4,
    normalize_teacher=True,
    distillation_alpha=8.0,
)
WIDE_POOL = replace(WIDE, **POOL, coupled_weight=0.3)
WIDE_SHARES = {"pool": 0.3, "neighbours": 0.25}  # of the steps; the rest are pairs
WIDE_LONG, WIDE_SHORT = 2_500, 4_000  # passages

# Titles and questions with their passage and three of the nearest ones.
ROUND = TrainingConfig(
    loss="contrastive",
    temperature=1 / 3,
    nway=WAYS,
    use_ib_negatives=False,
    coupled_weight=0.9,
    coupled_tokens=0.5,
    bsize=8,
    dropout=0.0,
    freeze_layers=3,
    lr=1e-4,
    head_lr=3e-4,
    length_groups=1,
    maxsteps=150,
    warmup=10,
    save_every=50,
)
# Any four of the nearest passages: none is marked as the answer, so only the teacher teaches.
SENTENCES: dict[str, Any] = dict(coupled_weight=1.0)
NEIGHBOURS: dict[str, Any] = dict(coupled_weight=1.0, bsize=16)
ROUND_POOL = POOL | {"coupled_weight": 0.8}
SHARES = {"sentences": 0.2, "neighbours": 0.4, "pool": 0.15}  # of the steps; the rest are pairs


# --- Texts ----------------------------------------------------------------------------------


def read(data: Path, name: str) -> list[dict]:
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_tsv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    lines = (f"{key}\t{' '.join(text.split())}\n" for key, text in rows)
    path.write_text("".join(lines), "utf-8")


def write_long(data: Path, folder: Path, number: int, rng: random.Random) -> None:
    """Abstracts and answers, with titles, questions and sentences as queries of their passages."""
    abstracts = [(r["title"], r["abstract"]) for r in read(data, "acl_title_abstract")]
    answers = [(r["question"], r["answer"]) for r in read(data, "medquad")]
    passages, pairs, sentences = {}, {}, {}
    for name, rows, count in (("a", abstracts, ABSTRACTS), ("m", answers, ANSWERS)):
        # One answer a question, one question an answer: the others would be false negatives.
        rows = list({q: (q, p) for q, p in {p[:200]: (q, p) for q, p in rows}.values()}.values())
        random.Random(name).shuffle(rows)
        for i, (query, passage) in enumerate(rows[number * count : (number + 1) * count]):
            key = f"{name}{i}"
            pairs[key], passages[key] = query, passage
            whole = [s for s in passage.split(". ") if 6 <= len(s.split()) <= 24]
            if whole:
                sentences[key] = rng.choice(whole)
    write_tsv(folder / "long.tsv", passages.items())
    write_tsv(folder / "pairs_queries.tsv", pairs.items())
    write_tsv(folder / "sentences_queries.tsv", sentences.items())


def write_short(data: Path, folder: Path, number: int, model: ColBERT, used: set[str]) -> None:
    """Short web passages and articles, with web queries and titles. `used`: queries left out."""
    pool = data / "msmarco_v2_pool"
    articles = read(data, "wikipedia_vital10k")
    random.Random("w").shuffle(articles)
    articles = articles[number * WIKIPEDIA : (number + 1) * WIKIPEDIA]
    with gzip.open(pool / "collection.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        web = [line.rstrip("\n").split("\t")[1] for line in file]
    random.Random("p").shuffle(web)
    web = web[number * WEB_PASSAGES : (number + 1) * WEB_PASSAGES]
    texts = [*web, *(r["text"] for r in articles)]
    lengths = model.tokenizer.documents(texts).attended
    kept = [(f"p{i}", text) for i, text in enumerate(texts) if lengths[i] <= SHORT]
    write_tsv(folder / "short.tsv", kept)
    web_queries = read_queries(pool / "dev_small_queries.tsv")
    asked = [(q, t) for q, t in web_queries.items() if q not in used and t.strip()]
    titles = [
        (f"w{i}", f"{r['title']} {r['description'] or ''}".strip()) for i, r in enumerate(articles)
    ]
    write_tsv(
        folder / "neighbours_queries.tsv",
        [*asked[number * WEB_QUERIES : (number + 1) * WEB_QUERIES], *titles],
    )


def write_pool(pool: Path, folder: Path) -> None:
    """Draws of the scored passages, their queries and the passages."""
    draws = []
    for seed in range(POOL_DRAWS):
        draw = folder / "draw.jsonl"
        make_examples(
            pool / "examples_64way.jsonl", draw, nway=POOL_WAYS, seed=seed, overwrite=True
        )
        draws.append(draw.read_text("utf-8"))
    for made in folder.glob("draw.jsonl*"):
        made.unlink()
    (folder / "pool.jsonl").write_text("".join(draws), "utf-8")
    lines = [json.loads(line) for draw in draws for line in draw.splitlines()]
    drawn = {str(pid) for _, *scored in lines for pid, _ in scored}
    with gzip.open(pool / "collection.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        kept = [line for line in file if line.split("\t")[0] in drawn]
    (folder / "pool.tsv").write_text("".join(kept), "utf-8")


# --- Models ---------------------------------------------------------------------------------


def with_projection(checkpoint: str, kernel: np.ndarray, folder: Path) -> None:
    """The encoder with a projection, float[384, dim], unless it is there."""
    if folder.exists():
        return
    model = ColBERT.from_pretrained(checkpoint, dim=kernel.shape[1], **TEXT)
    params = model.params
    params["head"][0]["linear"]["kernel"] = kernel.astype(np.float32)
    model.set_params(params)
    model.save_pretrained(folder)


def whitened(tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The projection to half whitened principal components, float[384, 384], the first first."""
    second = (tokens * weights[:, None]).T @ tokens / weights.sum()
    variances, directions = np.linalg.eigh(second)
    return (directions * np.maximum(variances, EIGENVALUE) ** -WHITENING)[:, ::-1]


class Encoded(NamedTuple):
    """Texts as the encoder's own tokens, by their ids.

    queries: float32[Lq, 384] each; rows of zeros fill up.
    documents: float32[Ld, 384] each.
    pieces: int[T], the word pieces of all documents.
    """

    queries: dict[str, np.ndarray]
    documents: dict[str, np.ndarray]
    pieces: np.ndarray


def encoded(model: ColBERT, queries: Path, collection: Path, most: int | None = None) -> Encoded:
    """Encode the queries of a file and the passages of another, of these at most `most`."""
    asked, found = read_queries(queries), list(read_collection(collection))
    texts = dict(random.Random(0).sample(found, min(most or len(found), len(found))))
    passages = list(texts.values())
    return Encoded(
        dict(zip(asked, model.encode_queries(list(asked.values())), strict=True)),
        dict(zip(texts, model.encode_documents(passages), strict=True)),
        np.concatenate(model.tokenizer.documents(passages).ids),
    )


def wide_batches(long: Encoded, short: Encoded, pool: Encoded, draws: Path) -> Iterator[tuple]:
    """Without end: settings, queries, passages and their mask, a cross-encoder's scores if any."""
    rng = random.Random(0)
    scored = [json.loads(line) for line in draws.read_text("utf-8").splitlines()]
    own = sorted(long.queries.keys() & long.documents.keys())
    # Pairs of one source: an answer is not to be told by its subject.
    sources = [[key for key in own if key[0] == kind] for kind in "am"]
    asked, passages = sorted(short.queries), sorted(short.documents)

    def made(config: TrainingConfig, texts: Encoded, qids: list, pids: list, scores: Any = None):
        documents = [texts.documents[pid] for pid in pids]
        rows = DocumentEmbeddings.from_list(documents, documents[0].shape[1])
        queries = np.stack([texts.queries[qid] for qid in qids])
        return config, queries, *rows.padded(TEXT["doc_maxlen"]), scores

    while True:
        chance = rng.random()
        if chance < WIDE_SHARES["pool"]:
            lines = rng.sample(scored, WIDE_POOL.batch_size)
            pairs = [pair for _, *pairs in lines for pair in pairs]
            scores = np.array([score for _, score in pairs]).reshape(len(lines), -1)
            pids = [str(pid) for pid, _ in pairs]
            yield made(WIDE_POOL, pool, [str(qid) for qid, *_ in lines], pids, scores)
        elif chance < WIDE_SHARES["pool"] + WIDE_SHARES["neighbours"]:
            count = WIDE_NEIGHBOURS.batch_size
            qids, pids = rng.sample(asked, count), rng.sample(passages, count * WAYS)
            yield made(WIDE_NEIGHBOURS, short, qids, pids)
        else:
            keys = rng.sample(rng.choice(sources), WIDE.batch_size)
            yield made(WIDE, long, keys, keys)


def learned(start: np.ndarray, batches: Iterator[tuple]) -> np.ndarray:
    """The wide projection after its steps, float32[384, 384]. The encoder is left as it is, so its
    tokens are computed once; the coupled teacher is the projection that it started with."""
    fixed = jnp.asarray(start, jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def step(config, params, moments, number, queries, documents, mask, scores):
        teacher = unit_length(queries @ fixed), unit_length(documents @ fixed)
        coupled = matches(config, *teacher, mask)

        def loss(params: dict) -> jax.Array:
            kernel = params["head"]
            tokens = unit_length(queries @ kernel), unit_length(documents @ kernel)
            return score_loss(config, *tokens, mask, scores, coupled=coupled)[0]

        return apply_gradients(WIDE, params, moments, jax.grad(loss)(params), number)[:2]

    params = {"head": fixed}
    moments = init_moments(WIDE, params)
    steps = itertools.islice(batches, WIDE.maxsteps)
    for number, (config, *batch) in enumerate(steps):
        params, moments = step(config, params, moments, number, *batch)
    return np.asarray(params["head"])


def make_projections(checkpoint: str, data: Path, folder: Path) -> None:
    """wide/ and narrow/, from texts of the first round."""
    model = ColBERT.from_pretrained(checkpoint, **TEXT)
    texts = data / ROUNDS[0]
    long = encoded(model, texts / "pairs_queries.tsv", texts / "long.tsv", WIDE_LONG)
    short = encoded(model, texts / "neighbours_queries.tsv", texts / "short.tsv", WIDE_SHORT)
    pool = encoded(model, data / "pool_queries.tsv", data / "pool.tsv")
    tokens = np.concatenate([*long.documents.values(), *short.documents.values()])
    pieces = np.concatenate([long.pieces, short.pieces])
    start = whitened(tokens, np.ones(len(tokens)))
    wide = learned(start, wide_batches(long, short, pool, data / "pool.jsonl"))
    # Turned at random, so that all dimensions vary alike, as the residuals' codec expects.
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))
    learnt = np.asarray(unit_length(jnp.asarray(tokens) @ wide))
    components = whitened(learnt, 1 / np.bincount(pieces)[pieces])
    with_projection(checkpoint, wide @ components[:, :DIM] @ turn, folder / "narrow")
    with_projection(checkpoint, wide, folder / "wide")


# --- A round --------------------------------------------------------------------------------


def nearest(model: ColBERT, collection: Path, names: Iterable[str], folder: Path) -> None:
    """`<name>_ranking.tsv`: of each of the queries of a name the nearest passages."""
    path = folder / f"{collection.stem}.index"
    if path.exists():
        retriever = Retriever.open(path, model)
    else:
        retriever = Retriever.build(path, model, collection, nbits=NBITS, store_texts=False)
    for name in names:
        queries = read_queries(collection.with_name(f"{name}_queries.tsv"))
        ranking = folder / f"{name}_ranking.tsv"
        retrieve(retriever, queries, ranking, k=NEAREST, mode="fast")


def drawn(ranking: Path, own_first: bool) -> Iterator[str]:
    """Examples without scores: WAYS of each query's passages at random, several times.

    own_first: the query's own passage, which has its id, is the first of each.
    """
    rng = random.Random(0)
    found: dict[str, list[str]] = {}
    with ranking.open(encoding="utf-8") as file:
        for line in file:
            qid, pid = line.split("\t")[:2]
            found.setdefault(qid, []).append(pid)
    for qid, pids in found.items():
        first = [qid] if own_first else []
        others = [pid for pid in pids if pid not in first]
        rng.shuffle(others)
        step = WAYS - len(first)
        for start in range(0, min(DRAWS * step, len(others) - step + 1), step):
            yield json.dumps([qid, *first, *others[start : start + step]]) + "\n"


def learn(start: Path, wide: Path, data: Path, folder: Path) -> Path:
    """A round from its texts in `data` to the trained model."""
    model = ColBERT.from_pretrained(start)
    nearest(model, data / "long.tsv", ("pairs", "sentences"), folder)
    nearest(model, data / "short.tsv", ("neighbours",), folder)
    sources = {}
    for name, texts in (("pairs", "long"), ("sentences", "long"), ("neighbours", "short")):
        examples = folder / f"{name}.jsonl"
        lines = drawn(folder / f"{name}_ranking.tsv", own_first=name == "pairs")
        examples.write_text("".join(lines), "utf-8")
        sources[name] = stanford_examples(
            examples, data / f"{name}_queries.tsv", data / f"{texts}.tsv"
        )
    common = data.parent
    sources["pool"] = stanford_examples(
        common / "pool.jsonl", common / "pool_queries.tsv", common / "pool.tsv"
    )
    own = {"sentences": SENTENCES, "neighbours": NEIGHBOURS, "pool": ROUND_POOL}
    tasks = [Task(name, sources[name], SHARES[name], own[name]) for name in SHARES]
    teacher = ColBERT.from_pretrained(wide)
    return train(model, sources["pairs"], folder / "run", ROUND, tasks=tasks, teacher=teacher).model


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    data, pool = args.folder / "data", args.data / "msmarco_v2_pool"
    if not (data / "pool_queries.tsv").exists():
        reader = ColBERT.from_pretrained(args.checkpoint, **TEXT)
        used = set(read_queries(pool / "queries.tsv"))
        for number, name in enumerate(ROUNDS):
            (data / name).mkdir(parents=True, exist_ok=True)
            write_long(args.data, data / name, number, random.Random(number))
            write_short(args.data, data / name, number, reader, used)
        write_pool(pool, data)
        (data / "pool_queries.tsv").write_bytes((pool / "queries.tsv").read_bytes())
    if not (args.folder / "wide").exists():
        make_projections(args.checkpoint, data, args.folder)
    model = args.folder / "narrow"
    for name in ROUNDS:
        (args.folder / name).mkdir(exist_ok=True)
        model = learn(model, args.folder / "wide", data / name, args.folder / name)


if __name__ == "__main__":
    log_to_stderr()
    run()
