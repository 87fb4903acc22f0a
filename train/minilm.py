"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds pairs of texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`,
`debian_descriptions.jsonl.gz`, `wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web
queries without judgements, and 129 queries with 64 scored passages each.

1. warm/: 400 steps of contrast on 12,800 pairs. A batch holds pairs of one source, so that its
   negatives are not told apart by their subject. This model only mines: as a retriever it is worse
   than the one it starts from (see the results).
2. mined/: it retrieves 12 of 12,000 web passages for each of 529 queries, and MPNet scores them.
3. distilled/: from MiniLM again, 32 steps on 512 of the 1,045 examples: the mined ones, and four
   draws of 8 from the 64 passages of each scored query.

Every setting is below. `benchmarks/results/training_minilm.md` says what came of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from colbert_jax import ColBERT
from colbert_jax.cli import main
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import load_teacher, mine
from colbert_jax.training.mining import make_examples

MODEL = [
    *("--dim", "128"),
    # Markers and [MASK] expansion would have to be learnt; this run is too short for that.
    *("--markers", "false"),
    *("--query-expansion", "false"),
    *("--mask-punctuation", "true"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "128"),
    *("--dropout", "0"),
    *("--length-groups", "2"),
]
WARM = [
    *("--loss", "contrastive"),
    *("--nway", "1"),
    *("--bsize", "32"),
    *("--maxsteps", "400"),
    *("--warmup", "30"),
    *("--warmup-bert", "30"),
    *("--lr", "3e-5"),
    *("--head-lr", "1e-3"),
    *("--shuffle", "false"),
    *("--save-every", "50"),
    *("--log-every", "5"),
]
DISTILL = [
    # Cosines and the pool's scores have different scales: both are mapped to 0..8.
    *("--normalize-teacher", "true"),
    *("--distillation-alpha", "8"),
    *("--nway", "8"),
    *("--bsize", "16"),
    *("--maxsteps", "32"),
    *("--warmup", "3"),
    *("--lr", "2e-5"),
    *("--head-lr", "5e-5"),
    *("--save-every", "8"),
    *("--log-every", "2"),
]
K, NBITS, TEACHER_MAXLEN = 12, 2, 128
BATCH = 32
MOST_PAIRS = {"debian": 6000, "medquad": 5000}
PASSAGES, WEB_QUERIES, DRAWS, WAYS = 12_000, 400, 4, 8


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
    """collection.tsv, queries.tsv and examples.jsonl of the round."""
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
    (folder / "queries.tsv").write_text("".join(queries + asked), "utf-8")
    draws = []
    for seed in range(DRAWS):
        draw = folder / f"draw{seed}.jsonl"
        make_examples(pool / "examples_64way.jsonl", draw, nway=WAYS, seed=seed, overwrite=True)
        draws.append(draw.read_text("utf-8"))
        for made in folder.glob(f"{draw.name}*"):
            made.unlink()
    (folder / "examples.jsonl").write_text("".join(draws), "utf-8")


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    data, mined = args.folder / "data", args.folder / "mined"
    if not (data / "examples.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        write_pairs(args.data, data / "pairs.jsonl")
        write_pool(args.data / "msmarco_v2_pool", data)

    def stage(recipe: str, name: str, *flags: str) -> None:
        place = [f"--checkpoint={args.checkpoint}", f"--folder={args.folder / name}"]
        if main(["train", recipe, *place, *MODEL, *flags]):
            raise SystemExit(2)

    stage("colbertv1", "warm", f"--triples={data / 'pairs.jsonl'}", *WARM)
    files = (data / "collection.tsv", data / "queries.tsv")
    examples = mined / "all.jsonl"
    if not examples.exists():
        retriever = ColBERT.from_pretrained(args.folder / "warm" / "last")
        teacher = load_teacher(args.teacher, maxlen=TEACHER_MAXLEN)
        found = mine(retriever, *files, mined, teacher, nway=WAYS, k=K, nbits=NBITS, seed=12345)
        both = found.path.read_text("utf-8") + (data / "examples.jsonl").read_text("utf-8")
        examples.write_text(both, "utf-8")
    flags = [f"--collection={files[0]}", f"--queries={files[1]}", f"--examples={examples}"]
    stage("distill", "distilled", *flags, *DISTILL)
    return 0


if __name__ == "__main__":
    sys.exit(run())
