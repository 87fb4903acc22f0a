"""`colbert-jax evaluate`."""

from __future__ import annotations

import argparse
import json

from colbert_jax.commands.common import add_search_settings, search_queries, warn
from colbert_jax.data.collections import read_qrels, read_queries
from colbert_jax.evaluation.metrics import (
    DEPTH,
    check_judged,
    evaluate_ranking,
    no_query_judged,
    require_ir_measures,
)
from colbert_jax.index.index import Index
from colbert_jax.retriever import Retriever


def add_evaluate(sub: argparse.ArgumentParser) -> None:
    """Its flags."""
    sub.add_argument("index")
    sub.add_argument("--queries", required=True, help="TSV of qid, text, or JSONL")
    sub.add_argument("--qrels", required=True, help="lines of qid, 0, pid, gain")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--ignore-self",
        action="store_true",
        help="leave out the document whose id is the query's (ArguAna, Quora, SciDocs)",
    )
    add_search_settings(sub)


def evaluate(args: argparse.Namespace) -> None:
    require_ir_measures()
    given, judged = read_queries(args.queries), read_qrels(args.qrels)
    queries = {qid: text for qid, text in given.items() if qid in judged}
    if not queries:
        raise no_query_judged(args.queries, given, args.qrels, judged)
    qrels = {qid: judged[qid] for qid in queries}
    for name, number in (
        ("without a judgement", len(given)),
        ("judged but not given", len(judged)),
    ):
        if number > len(queries):
            warn(f"{number - len(queries)} queries {name}: left out")
    opened = Index.open(args.index)
    if len(opened) == 0:
        raise ValueError(f"{args.index}: holds no document")
    known = opened.ids
    message = check_judged(
        qrels,
        lambda pid: known.position(pid, opened.deleted) is not None,
        known[int(opened.deleted.argmin())],
        f"the index {args.index}",
    )
    if message is not None:
        warn(message)
    retriever = Retriever.open(opened, args.checkpoint)
    found = search_queries(retriever, queries, DEPTH + args.ignore_self, args, texts=False)
    ranking = {qid: [hit.id for hit in hits] for qid, hits in found}
    values = evaluate_ranking(ranking, qrels, ignore_self=args.ignore_self)
    own = sum(qid in pids[:1] for qid, pids in ranking.items())
    if not args.ignore_self and own > len(queries) / 2:
        warn(
            f"{own} of {len(queries)} queries find the document of their own id first: if the "
            "queries are documents themselves, leave these out with --ignore-self"
        )
    if args.json:
        about = {"index": str(args.index), "queries": len(queries), "mode": args.mode}
        print(json.dumps(about | values))
    else:
        print(f"{len(queries)} queries, mode: {args.mode}")
        for name, value in values.items():
            print(f"{name:<12}{value:.4f}")
