"""Retrieval quality beside size: BM25, a single vector, token embeddings and their indexes.

    python benchmarks/training_quality.py DATA --results FILE --row "BM25" --bm25
    ... --row "MiniLM, single vector" --single-vector CHECKPOINT --set maxlen=256
    ... --row "MiniLM, tokens" --tokens CHECKPOINT --set doc_maxlen=256 --set query_maxlen=64
    ... --row "trained" --tokens CHECKPOINT --nbits 2 --set doc_maxlen=256
    python benchmarks/training_quality.py --results FILE --markdown

DATA holds a folder per collection with `collection.tsv`, `queries.tsv` and `qrels.tsv`. A call
measures one system over all collections and puts its row into FILE, in the place of a row of that
name; --nbits makes two, exact scoring of the index and PLAID at its defaults, both for k = 100.
Token embeddings and vectors are kept in float16, of which the bytes are counted and with which the
scores are computed. Of more than --queries judged queries that many are taken, evenly spaced.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from encode import machine, versions
from quality import batched

from colbert_jax import ColBERT, Index
from colbert_jax.batching import ladder_length
from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.evaluation import evaluate_ranking, read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import DEPTH
from colbert_jax.progress import log_to_stderr, progress_bar
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.search.arrays import Hits
from colbert_jax.search.raw import RawSearch

COLLECTIONS = ("scifact", "cranfield", "vaswani_npl", "cacm", "squad_dev")
FILES = ("collection.tsv", "queries.tsv", "qrels.tsv")
MEASURE = "nDCG@10"
QUERIES = 2000
_WINDOW = 4096  # documents encoded at once
_BM25 = dict(method="lucene", k1=1.2, b=0.75)
_TEXTS = ("texts.npy", "text_offsets.npy")  # of an index, not counted


@dataclass(frozen=True)
class Collection:
    """Passages, the judged queries that are asked, and their judgements.

    key: name and checksum of the passages, for the cache.
    """

    key: str
    pids: list[str]
    texts: list[str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    judged: int  # judged queries, asked or not


class Answer(NamedTuple):
    """What a system returned for a collection, and its size.

    found: for each query the positions of passages, best first.
    tokens: stored token embeddings, where the system has them.
    """

    found: list[np.ndarray]
    bytes: int
    tokens: int | None = None


# From a collection to the answers by what is added to the row's name.
System = Callable[[Collection], dict[str, Answer]]


def read(folder: Path, queries: int) -> Collection:
    """A collection with at most that many judged queries, evenly spaced in the file's order."""
    pids, texts = zip(*read_collection(folder / FILES[0]), strict=True)
    asked, qrels = read_queries(folder / FILES[1]), read_qrels(folder / FILES[2])
    judged = [qid for qid in asked if qid in qrels]
    if not judged:
        raise SystemExit(f"{folder}: none of the queries has a judgement")
    chosen = [judged[i] for i in evenly_spaced(len(judged), queries)]
    return Collection(
        key=f"{folder.name}-{zlib.crc32(chr(0).join(texts).encode()):08x}",
        pids=list(pids),
        texts=list(texts),
        queries={qid: asked[qid] for qid in chosen},
        qrels={qid: qrels[qid] for qid in chosen},
        judged=len(judged),
    )


def evenly_spaced(n: int, most: int) -> list[int]:
    """All of 0..n-1, or `most` of them at equal distances, the first among them."""
    return [i * n // most for i in range(most)] if n > most else list(range(n))


def bm25(collection: Collection) -> dict[str, Answer]:
    """Lucene's BM25 by bm25s. A passage without a word of the query is not an answer."""
    bm25s, stemmer = bm25_packages()
    split = partial(bm25s.tokenize, stopwords="en", stemmer=stemmer, show_progress=False)
    retriever = bm25s.BM25(**_BM25)
    retriever.index(split(collection.texts), show_progress=False)
    known = retriever.vocab_dict
    found = []
    for words in split(list(collection.queries.values()), return_ids=False):
        words = [word for word in words if word and word in known]
        scores = retriever.get_scores(words) if words else np.zeros(len(collection.texts))
        best = np.argsort(-scores, kind="stable")[:DEPTH]
        found.append(best[scores[best] > 0])
    with tempfile.TemporaryDirectory() as folder:
        retriever.save(folder, show_progress=False)
        return {"": Answer(found, folder_bytes(Path(folder)))}


def bm25_packages() -> tuple[Any, Any]:
    """The module bm25s and a stemmer."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise SystemExit(f"--bm25: {error}: pip install bm25s PyStemmer") from None
    return bm25s, Stemmer.Stemmer("english")


def single_vector(model: Any, cache: Path, collection: Collection) -> dict[str, Answer]:
    """One vector a passage, ranked by the model's own similarity."""
    file = cache / collection.key / "vectors.npy"
    if not file.exists():
        save(file, model.encode_documents(collection.texts).astype(np.float16))
    vectors = np.load(file)
    passages, everyone = vectors.astype(np.float32), np.arange(len(vectors))
    queries = model.encode_queries(list(collection.queries.values()))
    found = []
    for i in range(len(queries)):
        scores = model.similarity(queries, passages, np.full_like(everyone, i), everyone)
        found.append(np.argsort(-scores, kind="stable")[:DEPTH])
    return {"": Answer(found, vectors.nbytes)}


def tokens(
    model: ColBERT, cache: Path, nbits: int | None, collection: Collection
) -> dict[str, Answer]:
    """Token embeddings: raw by exact scoring, or an index of `nbits` bits exactly and by PLAID."""
    folder = cache / collection.key
    values, lengths = encode(model, folder, collection.texts)
    queries = model.encode_queries(list(collection.queries.values()))
    if nbits is None:
        raw = RawSearch(values, offsets_from_lengths(lengths))
        depth = min(DEPTH, int((lengths > 0).sum()))
        found = ranked(partial(raw.search, k=depth), queries)
        return {"": Answer(found, values.nbytes, len(values))}
    path = folder / f"{nbits}bit.index"
    if not path.exists():
        Index.build(path, embeddings=values, lengths=lengths, nbits=nbits)
    index = Index.open(path)
    size = folder_bytes(path, without=_TEXTS)
    return {
        name: Answer(
            ranked(partial(index.search, k=DEPTH, mode=mode), queries),
            size,
            len(values),
        )
        for name, mode in ((", exact", "exact"), (", PLAID", "accurate"))
    }


def encode(model: ColBERT, folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token embeddings of the texts, mapped, float16[T, D], and int64[N] lengths."""
    file, lengths_file = folder / "values.npy", folder / "lengths.npy"
    if not file.exists():
        windows = (texts[i : i + _WINDOW] for i in range(0, len(texts), _WINDOW))
        with progress_bar(len(texts), folder.name, "doc") as bar:
            parts = [
                (part.values.astype(np.float16), part.lengths)
                for part in model.encode_windows(windows, bar)
            ]
        values, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        save(lengths_file, lengths)
        save(file, values)
    return np.load(file, mmap_mode="r"), np.load(lengths_file)


def ranked(search: Callable[[np.ndarray], Hits], queries: np.ndarray) -> list[np.ndarray]:
    """The best of queries [B, Lq, D], asked in batches of like length without the padding."""
    rows = np.asarray(queries.any(axis=2))
    lengths = (rows * np.arange(1, rows.shape[1] + 1)).max(axis=1)
    order = np.argsort(lengths, kind="stable")

    def trimmed(batch: np.ndarray) -> Hits:
        used = np.flatnonzero(batch.any(axis=(0, 2)))
        return search(batch[:, : ladder_length(int(used.max(initial=0)) + 1)])

    ids = batched(trimmed, queries[order]).positions
    return list(ids[np.argsort(order)])


def save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npy")
    np.save(temporary, array)
    temporary.rename(file)


def folder_bytes(folder: Path, without: Sequence[str] = ()) -> int:
    return sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and file.name not in without
    )


def make_system(args: argparse.Namespace, cache: Path) -> tuple[System, dict[str, Any]]:
    """The system that the arguments name, and what its row says of it."""
    if args.bm25:
        bm25_packages()
        note = "k1 1.2, b 0.75, Lucene's formula; English stop words, Snowball stemmer (bm25s)"
        packages = {name: version(name) for name in ("bm25s", "PyStemmer")}
        return bm25, {"note": note, "settings": _BM25, "versions": packages}
    if args.single_vector:
        from colbert_jax.mining.teacher import BiEncoder, load_teacher

        settings = dict(args.set)
        if settings.keys() - {"maxlen"}:
            raise SystemExit("--set of a single vector knows maxlen only")
        teacher = load_teacher(args.single_vector, **settings)
        if not isinstance(teacher, BiEncoder):
            raise SystemExit(f"{args.single_vector}: not a single-vector encoder")
        cut = f"at {settings['maxlen']} tokens" if settings else "where its files say"
        return partial(single_vector, teacher, cache / teacher.fingerprint), {
            "note": f"{teacher.dim} dimensions, texts cut {cut}; float16",
            "settings": settings,
            "fingerprint": teacher.fingerprint,
        }
    model = ColBERT.from_pretrained(args.tokens, dim=args.dim, **dict(args.set))
    text = model.config.text
    projected = " of a new random projection" if args.dim else ""
    note = (
        f"{model.dim} dimensions{projected}, documents cut at {text.doc_maxlen} tokens, queries at "
        f"{text.query_maxlen}; "
        + ("float16" if args.nbits is None else f"{args.nbits}-bit index without texts")
    )
    changed = {k: v for k, v in vars(text).items() if v != getattr(type(text)(), k)}
    return partial(tokens, model, cache / model.fingerprint(), args.nbits), {
        "note": note,
        "settings": {"doc_maxlen": text.doc_maxlen, "query_maxlen": text.query_maxlen} | changed,
        "fingerprint": model.fingerprint(),
    }


def load_results(file: Path) -> dict[str, Any]:
    """{"collections": {name: counts}, "rows": {name: row}}, both empty where there is no file."""
    if not file.exists():
        return {"collections": {}, "rows": {}}
    try:
        results = json.loads(file.read_text("utf-8"))
        if not {"collections", "rows"} <= results.keys():
            raise ValueError("no field 'collections' or 'rows'")
    except (ValueError, AttributeError) as error:
        raise SystemExit(f"{file}: not results of this benchmark: {error}") from None
    return results


def add_measures(
    file: Path, collection: str, counts: dict[str, int], rows: dict[str, dict[str, Any]]
) -> None:
    """Put rows, as far as they are measured, into the file, whatever has been added meanwhile."""
    results = load_results(file)
    check_counts(file, results, collection, counts)
    results["collections"][collection] = counts
    results["rows"] |= rows
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    temporary.replace(file)


def check_counts(file: Path, results: dict[str, Any], name: str, counts: dict[str, int]) -> None:
    """Rows of one table must have answered the same queries on the same passages."""
    known = results["collections"].get(name, counts)
    if known != counts:
        raise SystemExit(
            f"{file}: its rows have {known} of {name}, this call has {counts}; give the same "
            "--queries and data, or another --results"
        )


def markdown(results: dict[str, Any]) -> str:
    """A table of nDCG@10, a row each system, and below it what the rows and columns are."""
    names = list(results["collections"])
    header = ["system", *names, "average", "MB", "bytes a token"]
    lines = [header, ["---"] * 1 + ["---:"] * (len(header) - 1)]
    for title, row in results["rows"].items():
        found = row["collections"]
        values = [found[name][MEASURE] if name in found else None for name in names]
        complete = None not in values
        size = sum(part["bytes"] for part in found.values())
        count = [part["tokens"] for part in found.values() if part["tokens"] is not None]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        cells.append(f"{np.mean(values):.4f}" if complete else "-")  # type: ignore[arg-type]
        cells.append(f"{size / 1e6:.1f}" if complete else "-")
        cells.append(f"{size / sum(count):.1f}" if count else "-")
        lines.append([title, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [f"- {title}: {row['note']}" for title, row in results["rows"].items()]
    asked = [
        f"{name}: {c['documents']:,} passages, {c['queries']:,} queries"
        + (f" of {c['judged']:,}, evenly spaced" if c["queries"] < c["judged"] else "")
        for name, c in results["collections"].items()
    ]
    return f"{MEASURE}, the best {DEPTH} of each system.\n\n{table}\n\n" + "\n".join(
        [*notes, "- " + "; ".join(asked)]
    )


def setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is that, else as it stands."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def command(argv: Sequence[str], data: Path) -> str:
    """The command without the paths of this machine."""
    words = ["DATA" if word == str(data) else word for word in argv]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    quoted = [f'"{word}"' if " " in word else word for word in words]
    return " ".join(["python benchmarks/training_quality.py", *quoted])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--row", help="the row's name")
    system = parser.add_mutually_exclusive_group()
    system.add_argument("--bm25", action="store_true")
    system.add_argument("--single-vector", metavar="CHECKPOINT")
    system.add_argument("--tokens", metavar="CHECKPOINT")
    parser.add_argument("--nbits", type=int, choices=(1, 2, 4, 8), help="index the tokens")
    parser.add_argument("--dim", type=int, help="a new random projection of the tokens")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE",
        help="a text setting of --tokens, such as doc_maxlen=256, or maxlen of --single-vector",
    )  # fmt: skip
    parser.add_argument("--collections", default=",".join(COLLECTIONS))
    parser.add_argument("--queries", type=int, default=QUERIES, help="at most, of a collection")
    parser.add_argument("--cache", type=Path, help="keep embeddings and indexes here")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    args = parser.parse_args(argv)
    measured = args.bm25 or args.single_vector or args.tokens
    if not measured and not args.markdown:
        parser.error("give --bm25, --single-vector, --tokens or --markdown")
    if not measured and not args.results.exists():
        parser.error(f"no table: {args.results} is missing")
    if measured and not (args.data and args.row):
        parser.error("a measurement needs DATA and --row")
    if not args.tokens and (args.nbits or args.dim):
        parser.error("--nbits and --dim belong to --tokens")
    if args.bm25 and args.set:
        parser.error("--bm25 has no settings")
    if args.queries < 1:
        parser.error("--queries must be at least 1")
    args.collections = args.collections.split(",")
    for name in args.collections if measured else ():
        for file in FILES:
            if not (args.data / name / file).is_file():
                parser.error(f"{args.data / name / file} is missing")
    return args


def measure(args: argparse.Namespace, argv: Sequence[str], cache: Path) -> None:
    """The rows of one call, written after each collection."""
    collections = {name: read(args.data / name, args.queries) for name in args.collections}
    counts = {
        name: {"documents": len(c.texts), "queries": len(c.queries), "judged": c.judged}
        for name, c in collections.items()
    }
    results = load_results(args.results)
    for name in collections:
        check_counts(args.results, results, name, counts[name])
    system, about = make_system(args, cache)
    about |= {
        "command": command(argv, args.data),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions() | about.get("versions", {}) | {"backend": jax.default_backend()},
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, collection in collections.items():
        for suffix, answer in system(collection).items():
            ranking = {
                qid: [collection.pids[i] for i in found]
                for qid, found in zip(collection.queries, answer.found, strict=True)
            }
            row = rows.setdefault(args.row + suffix, about | {"collections": {}})
            row["collections"][name] = evaluate_ranking(ranking, collection.qrels) | {
                "bytes": answer.bytes,
                "tokens": answer.tokens,
            }
            print(f"{args.row}{suffix}, {name}: {row['collections'][name]}", flush=True)
        add_measures(args.results, name, counts[name], rows)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.data is not None:
        enable_compilation_cache()
        with tempfile.TemporaryDirectory() as folder:
            measure(args, argv, args.cache or Path(folder))
    if args.markdown:
        print(markdown(load_results(args.results)))


if __name__ == "__main__":
    log_to_stderr()
    main()
