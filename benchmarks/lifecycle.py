"""What changes of an index cost, and what a changed index costs its searchers.

    python benchmarks/lifecycle.py CACHE [--sizes 10000,60000] [--peer fast-plaid=PYTHON] \
        [--peer xtr-warp=PYTHON] [--collection DATA/eval/cranfield --checkpoint CHECKPOINT] \
        [--output benchmarks/results/lifecycle-cpu]

CACHE is a folder that `benchmarks/passages.py` filled, with 2,000 passages more than the largest
size. Installs nothing: a peer is run by the PYTHON given for it. benchmarks/README.md says how to
install each and what the tables mean. Writes OUTPUT.json with everything and OUTPUT.md with the
tables. What runs beside it on the machine is in wall time, so processor time stands beside it, and
ratios are medians over rounds in which both take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lifecycle_report
import numpy as np
import search
import search_data
from passages import load, project, rotation
from search_process import OtherLoad, PeerError, Process

from colbert_jax import ColBERT, Index
from colbert_jax.batching import ladder_length
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation import evaluate_ranking, read_collection, read_qrels, read_queries
from colbert_jax.index.build import OUTLIERS
from colbert_jax.index.fields import FIELDS, FieldsWriter
from colbert_jax.index.format import read_metadata, replace_metadata
from colbert_jax.runtime import enable_compilation_cache

OURS = search.OURS
ADAPTERS = {OURS: "colbert_jax_", "fast-plaid": "fast_plaid_", "xtr-warp": "xtr_warp_"}
CHANGES = ("add", "delete", "update")
PARTS = ("changes", "search", "filters", "growth", "quality")
BATCH = 64
NOISE = 0.3  # length of what is added to a repeated token, before it is one long again
_ROWS = 1 << 16
_TIMED = 2 * BATCH  # queries of a round
DELETED = 0.2  # of the documents, in the changed index that is searched
NDCG = "nDCG@10"


def main() -> None:
    args = parse()
    enable_compilation_cache()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache)))
        systems = find_systems(args, work, stack)
        results: dict[str, Any] = {"about": about(systems, args)}
        sizes: dict[str, Any] = {}
        load_ = OtherLoad([])
        for size in args.sizes:
            some = systems if size <= args.peers_up_to else systems[:1]
            sizes[str(size)] = measure_size(some, size, args, work)
        results["sizes"] = sizes
        if "growth" in args.parts:
            results["growth"] = growth(args, work)
        if "quality" in args.parts:
            results["quality"] = [quality(folder, args, work) for folder in args.collection]
        results["other_load_cores"] = load_.cores()
    report = lifecycle_report.markdown(results, OURS)
    print(report)
    if args.output:
        # Not with_suffix: a dot in the name is no suffix.
        Path(f"{args.output}.json").write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{args.output}.md").write_text(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="what benchmarks/passages.py filled")
    parser.add_argument("--sizes", type=search._integers, default=[10_000, 60_000])
    parser.add_argument(
        "--repeat", action="store_true", help="passages with noise where CACHE holds too few"
    )
    parser.add_argument("--count", type=int, default=100, help="documents of a change")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adds", type=int, default=50, help="before the changed index is searched")
    parser.add_argument("--growth", type=int, default=10_000, help="documents at the end of it")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=search._cores())
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="the interpreter that has it: fast-plaid, xtr-warp",
    )
    parser.add_argument(
        "--peers-up-to",
        type=int,
        default=sys.maxsize,
        metavar="SIZE",
        help="the largest of --sizes that peers are measured at",
    )
    parser.add_argument(
        "--grow-peers",
        action="store_true",
        help="a peer's larger indexes are its smallest one and one add, not a build",
    )
    parser.add_argument(
        "--reuse-index", action="store_true", help="keep built indexes in CACHE/indexes"
    )
    parser.add_argument("--collection", type=Path, action="append", default=[])
    parser.add_argument("--checkpoint", help="encodes the collections")
    parser.add_argument("--output", type=Path, help="without suffix")
    args = parser.parse_args()
    args.device = "cpu"
    if not args.cache.is_dir():
        parser.error(f"{args.cache}: not a folder; fill one with benchmarks/passages.py")
    for given in args.peer:
        name, found, _ = given.partition("=")
        if name not in ADAPTERS or name == OURS or not found:
            parser.error(f"--peer {given}: not NAME=PYTHON with NAME fast-plaid or xtr-warp")
    if args.collection and not args.checkpoint:
        parser.error("--collection needs --checkpoint")
    if min(args.sizes) < 3 * (args.rounds + 1) * args.count:
        parser.error(f"--sizes: at least {3 * (args.rounds + 1) * args.count} are changed")
    return args


def _parts(text: str) -> list[str]:
    found = text.split(",")
    if not set(found) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text}: not of {','.join(PARTS)}")
    return found


def find_systems(
    args: argparse.Namespace, work: Path, stack: contextlib.ExitStack
) -> list[search.System]:
    systems = [search.System(OURS, sys.executable)]
    systems += [search.System(*peer.split("=", 1)) for peer in args.peer]
    if "changes" not in args.parts:
        return systems[:1]
    for system in systems:
        try:
            with start(system, args, work) as process:
                system.about = process.ask("about")
        except (OSError, PeerError) as error:
            raise SystemExit(f"{system.python} cannot run {system.name}: {error}") from None
    return systems


def start(system: search.System, args: argparse.Namespace, work: Path) -> Process:
    log, adapter = work / f"{system.name}.log", ADAPTERS[system.name]
    return Process(system.name, system.python, adapter, log, args.threads, args.device)


# --- Timing ---------------------------------------------------------------------------------


def timed(function: Callable[..., Any], *args: Any, **named: Any) -> tuple[Any, dict[str, float]]:
    cpu, begin = time.process_time(), time.perf_counter()
    value = function(*args, **named)
    seconds = time.perf_counter() - begin
    return value, {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}


def take_turns(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[dict]]:
    """Every case once in each round; a first round is not counted."""
    found: dict[str, list[dict]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            _, took = timed(cases[name])
            if turn:
                found[name].append(took)
    return found


def middle(times: list[dict[str, float]], per: float = 1) -> dict[str, float]:
    return {name: median(t[name] for t in times) / per for name in times[0]}


def ratio(times: list[dict[str, float]], of: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds of what one took, as a multiple of what another took."""
    return {
        name: median(t[name] / max(o[name], 1e-9) for t, o in zip(times, of, strict=True))
        for name in times[0]
    }


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- Changes, beside the peers --------------------------------------------------------------


def measure_size(
    systems: list[search.System], size: int, args: argparse.Namespace, work: Path
) -> dict[str, Any]:
    data = work / f"data-{size}"
    data.mkdir()
    more = max(2 * (args.rounds + 1), args.adds) * args.count  # that changes bring
    documents, padded, real = passages_of(args, size + more)
    np.save(data / "values.npy", documents.values)
    np.save(data / "lengths.npy", documents.lengths)
    out: dict[str, Any] = {"tokens": int(documents.lengths[:size].sum()), "real": real}
    if "changes" not in args.parts:
        systems = systems[:1]
    out["builds"] = {s.name: build(s, size, data, args, work) for s in systems}
    folders = {name: record.pop("folder") for name, record in out["builds"].items()}
    if "changes" in args.parts:
        out["changes"] = changes(systems, folders, size, data, args, work)
    queries, mine = queries_of(padded, args.queries), folders[OURS]
    if "search" in args.parts:
        out["search"] = changed_search(mine, documents, queries, size, args, work)
        print(size, "search", json.dumps(out["search"]), flush=True)
    if "filters" in args.parts:
        out["filters"] = filters(mine, queries, size, args, work)
        print(size, "filters", json.dumps(out["filters"]), flush=True)
    shutil.rmtree(data)
    for folder in folders.values():
        if work in folder.parents:
            shutil.rmtree(folder)
    return out


def passages_of(args: argparse.Namespace, count: int) -> tuple[DocumentEmbeddings, np.ndarray, int]:
    """Documents, queries [Q, Lq, D], and how many of the documents are no repetitions."""
    there = 0
    for file in args.cache.glob("chunk*.npz"):
        with np.load(file) as chunk:
            there += len(chunk["lengths"])
    real = min(count, there)
    if real < count and not args.repeat:
        raise SystemExit(
            f"{args.cache}: holds {there} passages, {count} wanted: fill it by "
            "benchmarks/passages.py, or give --repeat"
        )
    documents, padded = load(args.cache, real)
    return repeated(documents, count), padded, real


def repeated(documents: DocumentEmbeddings, count: int) -> DocumentEmbeddings:
    """As many documents: those there are, over and over, every repetition with noise of its own."""
    rng = np.random.default_rng(4)
    lengths = np.resize(documents.lengths, count)
    values = np.empty((int(lengths.sum()), documents.values.shape[1]), np.float16)
    values[: len(documents.values)] = documents.values
    for start in range(len(documents.values), len(values), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(values)))
        block = documents.values[rows % len(documents.values)].astype(np.float32)
        block += rng.normal(0, NOISE / block.shape[1] ** 0.5, block.shape).astype(np.float32)
        values[rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return DocumentEmbeddings.from_lengths(values, lengths)


def changes(
    systems: list[search.System],
    built: dict[str, Path],
    size: int,
    data: Path,
    args: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """What changes of copies of the built indexes take in every system."""
    folders = {name: copied(folder, work / f"{name}.index") for name, folder in built.items()}
    times: dict[str, dict[str, list[dict]]] = {s.name: {c: [] for c in CHANGES} for s in systems}
    first: dict[str, dict[str, dict]] = {s.name: {} for s in systems}
    rng = np.random.default_rng(0)
    victims = rng.permutation(size)
    with contextlib.ExitStack() as stack:
        processes = {s.name: stack.enter_context(start(s, args, work)) for s in systems}
        for name, process in processes.items():
            process.ask("open", folder=str(folders[name]), data=str(data))
        for turn in range(args.rounds + 1):
            for i, do in enumerate(CHANGES):
                numbers = victims[(3 * turn + i) * args.count :][: args.count]
                coming = size + (2 * turn + (do == "update")) * args.count
                for name, process in processes.items():
                    own = numbers if name == OURS or name == "xtr-warp" else np.sort(numbers)
                    took = process.ask(
                        "change",
                        what=do,
                        data=str(data),
                        first=coming,
                        count=args.count,
                        numbers=[int(n) for n in own],
                    )
                    print(f"{size} {name} {do}: {took}", flush=True)
                    if turn:
                        times[name][do].append(took)
                    else:
                        first[name][do] = took
    for folder in folders.values():
        shutil.rmtree(folder)
    return {
        name: {
            do: {"first": first[name][do], **middle(of[do])}
            | ({} if name == OURS else {"ratio": ratio(of[do], times[OURS][do])})
            for do in CHANGES
        }
        for name, of in times.items()
    }


def build(
    system: search.System, size: int, data: Path, args: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """A folder with an index of the first documents, and what building it took."""
    smallest = min(args.sizes)
    grown = system.name != OURS and args.grow_peers and size > smallest
    name = f"lifecycle-{system.name}-{size}-{args.nbits}bits" + ("-grown" if grown else "")
    parent = args.cache / "indexes" if args.reuse_index else work / "built"
    parent.mkdir(exist_ok=True)
    kept, notes = parent / name, parent / f"{name}.json"
    if not notes.exists() or not kept.exists():
        shutil.rmtree(kept, ignore_errors=True)
        print(f"building {name}", flush=True)
        with start(system, args, work) as process:
            beside = OtherLoad([process])
            if grown:
                base = parent / name.replace(f"-{size}-", f"-{smallest}-").removesuffix("-grown")
                copied(base, kept)
                process.ask("open", folder=str(kept), data=str(data))
                more = dict(first=smallest, count=size - smallest, numbers=[])
                record = process.ask("change", what="add", data=str(data), **more)
            else:
                record = process.ask(
                    "build", folder=str(kept), data=str(data), nbits=args.nbits, documents=size
                )
            record = {**record, "grown": grown, "other_load_cores": beside.cores()}
        notes.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(notes.read_text())
    return {**record, "folder": kept, "bytes": size_of(kept)}


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


# --- Searching what was changed -------------------------------------------------------------


def queries_of(padded: np.ndarray, count: int) -> np.ndarray:
    rows = [query[query.any(axis=1)] for query in padded[:count]]
    rows = [rows[i] for i in search_data.spread([len(row) for row in rows])]
    block = np.zeros((len(rows), ladder_length(max(map(len, rows))), padded.shape[2]), np.float32)
    for out, row in zip(block, rows, strict=True):
        out[: len(row)] = row
    return block


def part(documents: DocumentEmbeddings, first: int, last: int) -> dict[str, Any]:
    """Documents first..last-1, as `Index.build` and `Index.add` take them."""
    start, stop = documents.offsets[first], documents.offsets[last]
    return {
        "embeddings": documents.values[start:stop],
        "lengths": documents.lengths[first:last],
        "ids": [f"document-{i}" for i in range(first, last)],
        "progress": False,
    }


def searches(
    cases: Mapping[str, Callable[[np.ndarray], Any]], queries: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """Single queries and batches, the cases in turn; the ratios are to the first of them."""
    out: dict[str, Any] = {}
    one = [queries[i : i + 1] for i in range(min(32, len(queries)))]
    most = min(len(queries), _TIMED)
    several = [queries[i : i + BATCH] for i in range(0, most, BATCH)]
    base = next(iter(cases))
    for batch, blocks in (("1", one), (str(BATCH), several)):
        count = sum(map(len, blocks))

        def run(ask: Callable[[np.ndarray], Any], blocks: list[np.ndarray] = blocks) -> None:
            for block in blocks:
                ask(block)

        times = take_turns({n: partial(run, ask) for n, ask in cases.items()}, 2 * args.rounds)
        for name in cases:
            out.setdefault(name, {})[batch] = {
                **middle(times[name], per=count),
                "ratio": ratio(times[name], times[base]),
            }
    return out


def changed_search(
    built: Path,
    documents: DocumentEmbeddings,
    queries: np.ndarray,
    size: int,
    args: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """An index after many adds and deletes, beside the same compacted; compacting and opening."""
    path, clean = copied(built, work / "changed"), work / "clean"
    end = size + args.adds * args.count
    index, took = timed(add_in_parts, Index.open(path), documents, size, end, args.adds)
    dead = np.random.default_rng(1).permutation(end)[: int(DELETED * end)]
    index = index.delete([f"document-{i}" for i in dead.tolist()])
    before = size_of(path)
    compacting, compacted = [], None
    for _ in range(3):
        dirty = Index.open(copied(path, clean))
        compacted, one = timed(dirty.compact, progress=False)
        compacting.append(one)
    assert compacted is not None and len(compacted) == len(index)
    cases = {
        "clean": partial(compacted.search, k=args.k),
        "changed": partial(index.search, k=args.k),
    }
    same = agreement(compacted, index, queries, args.k)
    found = searches(cases, queries, args)
    opening = take_turns(
        {"clean": partial(Index.open, clean), "changed": partial(Index.open, path)}, 4 * args.rounds
    )
    after = size_of(clean)
    for folder in (path, clean):
        shutil.rmtree(folder)
    change = index.metadata.change
    assert change is not None
    return {
        "documents": len(index),
        "adds_seconds": took["seconds"] / args.adds,
        "unlisted_documents": len(index.lengths) - change.num_listed_documents,
        "same_answers": same,
        "searches": found,
        "open": {name: middle(times) for name, times in opening.items()},
        "open_ratio": ratio(opening["changed"], opening["clean"]),
        "compact": {**middle(compacting), "bytes_before": before, "bytes_after": after},
    }


def agreement(one: Index, other: Index, queries: np.ndarray, k: int) -> float:
    """Share of the k documents that both find, by id."""
    found = [index.search(queries, k).positions for index in (one, other)]
    shares = [
        len({one.ids[i] for i in a} & {other.ids[i] for i in b}) / max(len(a), 1)
        for a, b in zip(*found, strict=True)
    ]
    return float(np.mean(shares))


def add_in_parts(
    index: Index, documents: DocumentEmbeddings, first: int, last: int, parts: int
) -> Index:
    bounds = np.linspace(first, last, parts + 1).astype(int)
    for start, stop in itertools.pairwise(bounds.tolist()):
        index = index.add(**part(documents, start, stop))
    return index


# --- Filters --------------------------------------------------------------------------------


def filters(
    built: Path, queries: np.ndarray, size: int, args: argparse.Namespace, work: Path
) -> dict[str, Any]:
    path = copied(built, work / "filtered")
    percent = np.random.default_rng(2).permutation(size) % 100
    with FieldsWriter(path / FIELDS) as writer:  # beside the arrays that are there
        writer.extend({"percent": int(p)} for p in percent)
    replace_metadata(path, dataclasses.replace(read_metadata(path), fields=FIELDS))
    index = Index.open(path)
    shares = (1, 50, 99)
    conditions = {f"{s} %": {"percent": {"lt": s}} for s in shares}
    selecting = take_turns(
        {name: partial(index.select, where) for name, where in conditions.items()},
        2 * args.rounds,
    )
    chosen = {name: index.select(where) for name, where in conditions.items()}
    cases: dict[str, Callable[[np.ndarray], Any]] = {"all": partial(index.search, k=args.k)}
    for name, selection in chosen.items():
        cases[name] = partial(index.search, k=args.k, where=selection)
    found = searches(cases, queries, args)
    ranked = {name: overlap_exact(index, queries, chosen[name], args.k) for name in chosen}
    shutil.rmtree(path)
    return {
        "select": {name: middle(times) for name, times in selecting.items()},
        "num_results": {name: s.num_results for name, s in chosen.items()},
        "overlap_exact": ranked,
        "searches": found,
    }


def overlap_exact(index: Index, queries: np.ndarray, selection: Any, k: int) -> float:
    """Share of the k best of mode="exact" that the default mode finds within the filter."""
    exact = index.search(queries, k, mode="exact", where=selection).positions
    found = index.search(queries, k, where=selection).positions
    return search_data.overlap(found.tolist(), exact, k)


# --- Growth ---------------------------------------------------------------------------------


def growth(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Overlap with exact scoring after growing tenfold, beside a build of everything."""
    size, data = args.growth, work / "data-growth"
    data.mkdir()
    _, _, exact = search_data.prepare(args.cache, size, args.queries, data)
    documents, padded = load(args.cache, size)
    shutil.rmtree(data)
    queries, rows = queries_of(padded, args.queries), []
    for adds in (0, 9, 90):
        index, took = timed(grown, documents, size, adds, args, work / "grown")
        rows.append({"adds": adds, **took, **state_of(index)})
        for mode in ("fast", "accurate", "exact"):
            hits = index.search(queries, args.k, mode=mode)
            overlap = search_data.overlap(hits.positions.tolist(), exact, args.k)
            rows[-1][f"overlap_{mode}"] = overlap
        print(rows[-1], flush=True)
        shutil.rmtree(work / "grown")
    return {"documents": size, "rows": rows}


def grown(
    documents: DocumentEmbeddings, size: int, adds: int, args: argparse.Namespace, path: Path
) -> Index:
    """An index of the first documents: a build of a tenth and some adds; no adds: a build."""
    begin = size // 10 if adds else size
    index = Index.build(path, **part(documents, 0, begin), nbits=args.nbits)
    return add_in_parts(index, documents, begin, size, adds) if adds else index


def state_of(index: Index) -> dict[str, Any]:
    change = index.metadata.change
    return {
        "num_centroids": index.metadata.num_centroids,
        "outliers": change.num_outliers / change.num_added_tokens if change else OUTLIERS,
        "advice": index.advice(),
    }


def quality(folder: Path, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """nDCG@10 of a collection grown from a tenth, beside a build of everything."""
    pids, documents, queries, qrels = encoded(folder, args)
    size, rows = len(documents.lengths), []
    order = np.random.default_rng(3).permutation(size)  # a tenth of it is a sample of all
    values = [documents.values[documents.offsets[i] : documents.offsets[i + 1]] for i in order]
    shuffled = DocumentEmbeddings.from_lengths(np.concatenate(values), documents.lengths[order])
    for adds in (0, 9, 90):
        index = grown(shuffled, size, adds, args, work / "grown")
        rows.append({"adds": adds, **state_of(index)})
        for mode in ("accurate", "exact"):
            hits = index.search(np.stack(list(queries.values())), min(100, size), mode=mode)
            ranking = {
                q: [pids[order[i]] for i in found]
                for q, found in zip(queries, hits.positions, strict=True)
            }
            rows[-1][mode] = evaluate_ranking(ranking, qrels)[NDCG]
        print(folder.name, rows[-1], flush=True)
        shutil.rmtree(work / "grown")
    return {"collection": folder.name, "documents": size, "queries": len(queries), "rows": rows}


def encoded(folder: Path, args: argparse.Namespace) -> Any:
    """A collection as `passages.py` would encode it: ids, documents, queries by id, judgements."""
    pids, texts = zip(*read_collection(folder / "collection.tsv"), strict=True)
    qrels = read_qrels(folder / "qrels.tsv")
    asked = {q: t for q, t in read_queries(folder / "queries.tsv").items() if q in qrels}
    file = args.cache / f"collection_{folder.name}.npz"
    if not file.exists():
        model = ColBERT.from_pretrained(args.checkpoint, doc_maxlen=180, query_maxlen=32)
        directions = None
        if (args.cache / "directions.npy").exists():
            directions = np.load(args.cache / "directions.npy")
        rows = model.encode_documents(texts, progress=True)
        queries = np.asarray(model.encode_queries(list(asked.values())))
        temporary = file.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            values=project(rows.values, directions).astype(np.float16),
            lengths=rows.lengths,
            queries=project(queries, directions).astype(np.float32),
        )
        temporary.rename(file)
    found = np.load(file)
    turn = rotation(found["values"].shape[1])
    documents = found["values"].astype(np.float32) @ turn
    return (
        pids,
        DocumentEmbeddings.from_lengths(documents.astype(np.float16), found["lengths"]),
        dict(zip(asked, found["queries"] @ turn, strict=True)),
        qrels,
    )


def about(systems: list[search.System], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "machine": search._machine(),
        "threads": args.threads,
        "nbits": args.nbits,
        "count": args.count,
        "rounds": args.rounds,
        "adds": args.adds,
        "k": args.k,
        "queries": args.queries,
        "versions": {s.name: s.about.get("versions", {}) for s in systems},
    }


def command(args: argparse.Namespace) -> str:
    """The command without the paths of this machine."""
    return search._command(args).replace("search.py", "lifecycle.py")


if __name__ == "__main__":
    main()
