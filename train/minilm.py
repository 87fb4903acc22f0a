"""A small ColBERT on a plain CPU: all-MiniLM-L6-v2 with a new 128-wide projection.

    python train/minilm.py DATA --checkpoint MINILM --teacher MPNET --folder runs/minilm

DATA holds pairs of texts (`acl_title_abstract.jsonl.gz`, `medquad.jsonl.gz`,
`debian_descriptions.jsonl.gz`, `wikipedia_vital10k.jsonl.gz`) and `msmarco_v2_pool/`: passages, web
queries without judgements, and 129 queries with 64 scored passages each.

1. Warm start: 400 steps of contrast on 12,800 pairs. A batch holds pairs of one source, so that its
   negatives are not told apart by their subject.
2. One round of denoised supervision over 12,000 web passages: 529 queries, 12 passages each, scored
   by MPNet, and four draws of 8 from the 64 passages of the 129 scored queries.

Every setting is below; flags after the ones above change single ones (`colbert-jax train
denoised-supervision --help`). `benchmarks/results/training_minilm.md` says what came of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from colbert_jax.cli import main
from colbert_jax.training.mining import make_examples

SETTINGS = [
    *("--dim", "128"),
    # Markers and [MASK] expansion would have to be learnt; this run is too short for that.
    *("--markers", "false"),
    *("--query-expansion", "false"),
    *("--mask-punctuation", "true"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "128"),
    # Warm start.
    *("--warm-loss", "contrastive"),
    *("--warm-nway", "1"),
    *("--warm-bsize", "32"),
    *("--warm-maxsteps", "400"),
    *("--warm-warmup", "30"),
    *("--warm-warmup-bert", "30"),
    *("--warm-lr", "3e-5"),
    *("--warm-head-lr", "1e-3"),
    *("--warm-shuffle", "false"),
    *("--warm-dropout", "0"),
    *("--warm-length-groups", "2"),
    *("--warm-save-every", "50"),
    *("--warm-log-every", "5"),
    # One round.
    *("--rounds", "1"),
    *("--k", "12"),
    *("--nbits", "2"),
    *("--teacher-maxlen", "128"),
    # Cosines and the pool's scores have different scales: both are mapped to 0..8.
    *("--normalize-teacher", "true"),
    *("--distillation-alpha", "8"),
    *("--nway", "8"),
    *("--bsize", "16"),
    *("--maxsteps", "64"),
    *("--warmup", "6"),
    *("--lr", "2e-5"),
    *("--head-lr", "1e-4"),
    *("--dropout", "0"),
    *("--length-groups", "2"),
    *("--save-every", "16"),
    *("--log-every", "4"),
]
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
        draw.unlink()
    (folder / "examples.jsonl").write_text("".join(draws), "utf-8")


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    args, flags = parser.parse_known_args()
    data = args.folder / "data"
    if not (data / "examples.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        write_pairs(args.data, data / "pairs.jsonl")
        write_pool(args.data / "msmarco_v2_pool", data)
    files = [f"--{name}={data / f'{name}.tsv'}" for name in ("queries", "collection")]
    files += [f"--warm-pairs={data / 'pairs.jsonl'}", f"--examples={data / 'examples.jsonl'}"]
    recipe = ["train", "denoised-supervision", f"--folder={args.folder}"]
    return main([*recipe, *files, *SETTINGS, *flags])


if __name__ == "__main__":
    sys.exit(run())
