"""`colbert-jax evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from colbert_jax.colbert import ColBERT
from colbert_jax.commands.common import (
    add_checkpoint_settings,
    add_search_settings,
    checkpoint_settings,
    refuse_checkpoint_settings,
    search_queries,
    warn,
)
from colbert_jax.data.collections import read_qrels, read_queries
from colbert_jax.data.published import read_test_collection
from colbert_jax.data.tables import parse_columns
from colbert_jax.evaluation.collections import evaluate_collections
from colbert_jax.evaluation.metrics import (
    DEPTH,
    check_judged,
    evaluate_ranking,
    no_query_judged,
    require_ir_measures,
)
from colbert_jax.evaluation.presets import PRESETS
from colbert_jax.evaluation.report import Report
from colbert_jax.evaluation.runs import FORMATS, check_run_ids, read_run, write_run
from colbert_jax.evaluation.systems import SYSTEMS, Ranking, check_systems
from colbert_jax.files import output_place, writing
from colbert_jax.index.folder import METADATA
from colbert_jax.index.index import Index
from colbert_jax.retriever import Hit, Retriever


def add_evaluate(sub: argparse.ArgumentParser) -> None:
    """Its flags."""
    sub.add_argument(
        "index",
        nargs="*",
        metavar="PLACE",
        help="an index, with --queries and --qrels; or published collections: folders of BEIR, "
        "NanoBEIR, LoTTE, MS MARCO, ir_datasets:ID, datasets:OWNER/NAME",
    )
    sub.add_argument("--queries", help="TSV of qid, text, JSONL, or TREC's topics")
    sub.add_argument("--qrels", help="lines of qid, 0, pid, gain")
    sub.add_argument("--collection", help="documents of --queries and --qrels, in place of PLACE")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--ignore-self",
        action="store_true",
        help="leave out the document whose id is the query's (ArguAna, Quora, SciDocs)",
    )
    add_search_settings(sub)
    more = sub.add_argument_group("collections")
    more.add_argument(
        "--systems",
        help=f"of bm25, single, exact, plaid-N (default: {','.join(SYSTEMS)}); none: runs only",
    )
    more.add_argument(
        "--run", action="append", dest="run_files", metavar="NAME=FILE", help="a run to measure"
    )
    more.add_argument("--baseline", help="what others are compared with (default: exact)")
    more.add_argument("--measures", help="of ir-measures, with commas between; the first is tested")
    more.add_argument("--preset", choices=list(PRESETS), help="default: by the collection's form")
    more.add_argument("--split", help="which queries (default: test, or the only ones)")
    more.add_argument("--query-maxlen", type=int, help="tokens (default: the preset's)")
    more.add_argument("--doc-maxlen", type=int, help="tokens (default: the preset's)")
    add_checkpoint_settings(more)
    more.add_argument("--columns", help="of the documents: id=COLUMN,text=COLUMN, or places from 0")
    more.add_argument("--query-columns", help="of the queries, likewise")
    more.add_argument("--qrel-columns", help="query=COLUMN,document=COLUMN,gain=COLUMN")
    more.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")
    more.add_argument("--html", metavar="FILE", help="write a page with tables and plots")
    more.add_argument("--per-query", metavar="FILE", help="write the values of single queries, TSV")
    more.add_argument("--runs", metavar="FOLDER", help="write a run file for each system")
    more.add_argument("--format", choices=FORMATS, default="trec", help="of these run files")
    more.add_argument("--keep", metavar="FOLDER", help="keep the indexes here")


def evaluate(args: argparse.Namespace) -> None:
    require_ir_measures()
    if args.collection is None and args.queries and args.qrels and len(args.index) == 1:
        args.index = args.index[0]
        refuse_checkpoint_settings(args, "an index, which has its own")
        _evaluate_index(args)
        return
    if bool(args.queries) != bool(args.qrels) or bool(args.queries) != bool(args.collection):
        raise ValueError(
            "give an index with --queries and --qrels, or these two with --collection, or "
            "published collections without them"
        )
    if bool(args.collection) == bool(args.index):
        raise ValueError("give a place or --collection, one of the two")
    _evaluate_collections(args)


def _evaluate_collections(args: argparse.Namespace) -> None:
    for place in args.index:
        if (Path(place) / METADATA).is_file():
            raise ValueError(f"{place}: an index, which needs --queries and --qrels")
    odd = [
        name
        for name in (
            "where",
            "ncells",
            "centroid_score_threshold",
            "ndocs",
            "candidates",
            "hybrid",
            "bm25_weight",
        )
        if getattr(args, name) is not None
    ]
    if odd:
        raise ValueError(f"--{odd[0].replace('_', '-')} is for an index, not for collections")
    files = {name: getattr(args, name) for name in ("markdown", "html", "per_query")}
    for file in filter(None, files.values()):
        output_place(file)
    runs = dict(_named_run(text) for text in args.run_files or ())
    default = "none" if runs and args.checkpoint is None else ",".join(SYSTEMS)
    systems = [name for name in (args.systems or default).split(",") if name != "none"]
    check_systems(systems)
    needs_model = bool(set(systems) - {"bm25"})
    if needs_model and args.checkpoint is None:
        raise ValueError("name the model with --checkpoint, or choose --systems bm25")
    columns, query_columns, qrel_columns = (
        None if text is None else parse_columns(text)
        for text in (args.columns, args.query_columns, args.qrel_columns)
    )
    opened = [
        read_test_collection(
            place,
            queries=args.queries,
            qrels=args.qrels,
            split=args.split,
            columns=columns,
            query_columns=query_columns,
            qrel_columns=qrel_columns,
        )
        for place in args.index or [args.collection]
    ]
    if len({one.name for one in opened}) < len(opened):
        raise ValueError("two collections have one name: rename a folder, for tables and files")
    for one in opened:
        print(f"{one.name}: {one.describe()}", file=sys.stderr)
        for note in one.notes:
            print(f"  {note}", file=sys.stderr)
        if args.runs:
            check_run_ids(one.queries, "query", args.format)
            check_run_ids((pid for pid, _, _ in one.documents()), "document", args.format)
    report = evaluate_collections(
        opened,
        ColBERT.from_pretrained(args.checkpoint, **checkpoint_settings(args))
        if needs_model
        else None,
        systems,
        runs=runs,
        measures=None if args.measures is None else args.measures.split(","),
        preset=args.preset,
        query_maxlen=args.query_maxlen,
        doc_maxlen=args.doc_maxlen,
        mode=args.mode,
        ignore_self=args.ignore_self or None,
        baseline=args.baseline,
        folder=args.keep,
    )
    made = {"markdown": report.markdown, "html": report.page, "per_query": report.per_query}
    for name, make in made.items():
        if files[name]:
            with writing(files[name]) as stream:
                stream.write(make())
    if args.runs:
        _write_runs(report, Path(args.runs), args.format)
    print(json.dumps(report.to_json()) if args.json else report.text(), end="\n" * args.json)


def _named_run(text: str) -> tuple[str, Ranking]:
    name, equals, file = text.partition("=")
    if not name or not equals or not file:
        raise ValueError(f"--run {text!r:.80}: expected NAME=FILE")
    return name, read_run(file)


def _write_runs(report: Report, folder: Path, format: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in report.collections:
        for system in one.systems:
            found = {
                qid: [Hit(pid, score, None, i) for i, (pid, score) in enumerate(row.items())]
                for qid, row in system.ranking.items()
            }
            write_run(folder / f"{one.name}.{system.name}.run", found, format)


def _evaluate_index(args: argparse.Namespace) -> None:
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
        about |= {} if args.hybrid is None else {"hybrid": args.hybrid}
        print(json.dumps(about | values))
    else:
        both = "" if args.hybrid is None else f", hybrid: {args.hybrid}"
        print(f"{len(queries)} queries, mode: {args.mode}{both}")
        for name, value in values.items():
            print(f"{name:<12}{value:.4f}")
