"""`colbert-jax rerank`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colbert_jax.colbert import ColBERT
from colbert_jax.commands.common import (
    add_checkpoint_settings,
    checkpoint_settings,
    refuse_checkpoint_settings,
    warn,
)
from colbert_jax.data.collections import read_collection, read_queries
from colbert_jax.data.streams import unpacked_suffix
from colbert_jax.data.tables import read_records
from colbert_jax.evaluation.runs import FORMATS, check_run_ids, read_run, write_run
from colbert_jax.files import output_place
from colbert_jax.index.index import Index
from colbert_jax.reranking import candidate_texts, rerank_indexed
from colbert_jax.reranking import rerank as rerank_texts
from colbert_jax.retriever import Hit, Retriever


def add_rerank(sub: argparse.ArgumentParser) -> None:
    """Its flags."""
    sub.add_argument(
        "run_file",
        metavar="RUN",
        help="run file, in TREC's six columns or Stanford's; or JSONL of query, candidates[, qid]",
    )
    sub.add_argument("--output", required=True, help="the run file to write, or a pipe")
    sub.add_argument("--queries", help="of the run: TSV of qid, text, JSONL or other formats")
    sub.add_argument("--collection", help="texts of the candidates, encoded with --checkpoint")
    sub.add_argument("--index", help="in place of --collection: an index that has the candidates")
    sub.add_argument("--checkpoint", help="folder or hub id; with --index by default its own")
    add_checkpoint_settings(sub)
    sub.add_argument("-k", type=int, help="results per query (default: all candidates)")
    sub.add_argument("--format", choices=FORMATS, default="trec", help="of the output")


def rerank(args: argparse.Namespace) -> None:
    output_place(args.output)
    if unpacked_suffix(Path(args.run_file)) == ".jsonl":
        queries, hits = _lists(args)
    elif args.queries is None or bool(args.index) == bool(args.collection):
        raise ValueError("a run file needs --queries, and one of --collection and --index")
    else:
        queries, hits = _run(args)
    check_run_ids(queries, "query", args.format)
    results = write_run(args.output, zip(queries, hits, strict=True), args.format)
    whole = output_place(args.output) is not None
    print(
        f"{len(queries)} queries, {results} results: {args.output}",
        file=sys.stdout if whole else sys.stderr,
    )


def _lists(args: argparse.Namespace) -> tuple[list[str], Iterator[list[Hit]]]:
    """Query ids and hits of JSONL with queries and their candidates."""
    given = {name: getattr(args, name) for name in ("queries", "collection", "index")}
    odd = [f"--{name}" for name, value in given.items() if value]
    if odd or args.checkpoint is None:
        raise ValueError(
            "queries with their candidates in JSONL need --checkpoint"
            + (f", and no {' and no '.join(odd)}" if odd else "")
        )
    batch: dict[str, tuple[str, list[Any]]] = {}
    for where, record in read_records(args.run_file):
        query, candidates = record.get("query"), record.get("candidates")
        if not isinstance(query, str) or not query.strip() or not isinstance(candidates, list):
            raise ValueError(f"{where}: expected a text 'query' and a list 'candidates'")
        qid = str(record.get("qid", f"q{len(batch) + 1}"))
        if qid in batch:
            raise ValueError(f"{where}: query id {qid!r:.80} appears twice")
        batch[qid] = (query, candidates)
    if not batch:
        raise ValueError(f"{args.run_file}: no queries")
    model = ColBERT.from_pretrained(args.checkpoint, **checkpoint_settings(args))
    hits = rerank_texts(model, batch.values(), args.k, total=len(batch), progress=None)
    return list(batch), hits


def _run(args: argparse.Namespace) -> tuple[list[str], Iterator[list[Hit]]]:
    """Query ids and hits of a run file."""
    if args.index:
        refuse_checkpoint_settings(args, "an index, which has its own")
    run = {qid: list(pids) for qid, pids in read_run(args.run_file).items()}
    queries = read_queries(args.queries)
    asked = [qid for qid in run if qid in queries]
    _say_missing(run.keys() - queries.keys(), len(run), "queries", args.queries)
    wanted = {pid for qid in asked for pid in run[qid]}
    if args.index:
        opened = Index.open(args.index)
        known = {p for p in wanted if opened.ids.position(p, opened.deleted) is not None}
        _say_missing(wanted - known, len(wanted), "candidates", args.index)
        retriever = Retriever.open(opened, args.checkpoint)
        listed = [(queries[qid], [pid for pid in run[qid] if pid in known]) for qid in asked]
        return asked, rerank_indexed(retriever, listed, args.k, total=len(asked), progress=None)
    if args.checkpoint is None:
        raise ValueError("--collection needs --checkpoint")
    texts = candidate_texts({qid: run[qid] for qid in asked}, read_collection(args.collection))
    _say_missing(wanted - texts.keys(), len(wanted), "candidates", args.collection)
    empty = sum(not texts[pid].strip() for pid in texts)
    if empty:
        warn(f"{empty} candidates have an empty text: they may be left out")
    model = ColBERT.from_pretrained(args.checkpoint, **checkpoint_settings(args))
    pairs = ((queries[qid], _pairs(run[qid], texts)) for qid in asked)
    return asked, rerank_texts(model, pairs, args.k, total=len(asked), progress=None)


def _pairs(pids: Sequence[str], texts: dict[str, str]) -> list[tuple[str, str]]:
    return [(pid, texts[pid]) for pid in pids if pid in texts]


def _say_missing(missing: set[str], total: int, what: str, place: str) -> None:
    """Raises ValueError where all of the run's queries or candidates are missing; else warns."""
    if missing:
        message = f"{len(missing)} of {total} {what} of the run are not in {place}"
        message += f", {min(missing)!r:.60} for example"
        if len(missing) == total:
            raise ValueError(f"{message}: give the file that the run was made with")
        warn(f"{message}: left out")
