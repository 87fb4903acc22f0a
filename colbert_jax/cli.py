"""`colbert-jax`: the library from the command line; every command is a few library calls."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colbert_jax import __version__
from colbert_jax.checkpoints import LAYOUTS, convert_checkpoint
from colbert_jax.colbert import ColBERT
from colbert_jax.config import MODES
from colbert_jax.data.documents import Documents
from colbert_jax.demo import run_demo
from colbert_jax.evaluation import (
    evaluate_ranking,
    read_collection,
    read_qrels,
    read_queries,
    write_run,
)
from colbert_jax.evaluation.metrics import DEPTH, require_ir_measures
from colbert_jax.index import Index
from colbert_jax.index.format import FORMAT_VERSION
from colbert_jax.index.layouts.convert import TARGETS, convert_index
from colbert_jax.retriever import Hit, Retriever, rank_documents
from colbert_jax.runtime import cache_folder, enable_compilation_cache
from colbert_jax.settings import add_arguments, given, make, merge, read_settings
from colbert_jax.training.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
      the exit status: 0; 2 for bad input, named on stderr; 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        return _run(args)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the place in the code, which says nothing here."""
    print(f"colbert-jax: warning: {message}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    try:
        enable_compilation_cache()
    except OSError as error:
        print(f"colbert-jax: compiled programs are not kept: {error}", file=sys.stderr)
    try:
        args.run(args)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except KeyboardInterrupt:
        print(f"colbert-jax: interrupted{args.resumes}", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        message = str(error).replace("overwrite=True", "--overwrite")  # what to type here
        print(f"colbert-jax: error: {message}", file=sys.stderr)
        return 2
    return 0


def index(args: argparse.Namespace) -> None:
    settings = {} if args.doc_maxlen is None else {"doc_maxlen": args.doc_maxlen}
    retriever = Retriever.build(
        args.index,
        args.checkpoint,
        Path(args.collection),
        nbits=args.nbits,
        kmeans_niters=args.kmeans_niters,
        num_centroids=args.num_centroids,
        store_texts=not args.no_texts,
        overwrite=args.overwrite,
        dim=args.dim,
        **settings,
    )
    print(_summary(retriever.index))


def search(args: argparse.Namespace) -> None:
    if bool(args.query) == bool(args.queries):
        raise ValueError("give queries on the command line or --queries FILE, one of the two")
    if args.queries:
        queries = read_queries(args.queries)
    else:
        queries = {f"q{n}": text for n, text in enumerate(args.query, 1)}
    retriever = Retriever.open(args.index, args.checkpoint)
    found = _search(retriever, queries, args.k, args, texts=not args.output)
    if args.output:
        write_run(args.output, found)
        results = sum(map(len, found.values()))
        print(f"{len(found)} queries, {results} results: {args.output}")
        return
    for qid, hits in found.items():
        print(queries[qid])
        _print_hits(hits)


def rank(args: argparse.Namespace) -> None:
    documents = Documents(args.file)  # a bad file is named before the model is loaded
    model = ColBERT.from_pretrained(args.checkpoint)
    _print_hits(rank_documents(model, args.query, documents, args.k))


def evaluate(args: argparse.Namespace) -> None:
    require_ir_measures()
    given, judged = read_queries(args.queries), read_qrels(args.qrels)
    queries = {qid: text for qid, text in given.items() if qid in judged}
    if not queries:
        raise ValueError(f"no query of {args.queries} has a judgement in {args.qrels}")
    qrels = {qid: judged[qid] for qid in queries}
    for name, number in (
        ("without a judgement", len(given)),
        ("judged but not given", len(judged)),
    ):
        if number > len(queries):
            print(f"{number - len(queries)} queries {name}: left out", file=sys.stderr)
    retriever = Retriever.open(args.index, args.checkpoint)
    found = _search(retriever, queries, DEPTH, args, texts=False)
    values = evaluate_ranking({qid: [hit.id for hit in hits] for qid, hits in found.items()}, qrels)
    if args.json:
        about = {"index": str(args.index), "queries": len(queries), "mode": args.mode}
        print(json.dumps(about | values))
    else:
        print(f"{len(queries)} queries, mode: {args.mode}")
        for name, value in values.items():
            print(f"{name:<12}{value:.4f}")


def info(args: argparse.Namespace) -> None:
    opened = Index.open(args.index)
    if args.verify:
        opened.verify()
    if args.json:
        print(json.dumps(opened.metadata.to_json()))
        return
    print(_summary(opened))
    model = opened.metadata.model
    print(f"model        {model['load']['name_or_path'] if model else 'none: ready embeddings'}")
    print(f"format       {FORMAT_VERSION}")
    print(f"settings     {json.dumps(opened.metadata.settings)}")
    if args.verify:
        print("checksums    all files are whole")


def convert(args: argparse.Namespace) -> None:
    found, checkpoint = convert_checkpoint(
        args.source, args.folder, args.to, base=args.base, revision=args.revision
    )
    encoder = checkpoint.encoder
    print(
        f"{args.source}: {found}, {encoder.backbone.model_type}, {encoder.dim} dimensions\n"
        f"{args.folder}: {args.to}"
    )


def convert_index_(args: argparse.Namespace) -> None:
    if Path(args.folder).exists() and not args.overwrite:
        raise FileExistsError(f"{args.folder}: exists; pass --overwrite to replace an index there")
    model = None if args.checkpoint is None else ColBERT.from_pretrained(args.checkpoint)
    read = convert_index(
        args.source,
        args.folder,
        args.to,
        model=model,
        collection=None if args.collection is None else read_collection(args.collection),
        overwrite=args.overwrite,
    )
    print(
        f"{args.source}: {read.layout}, {len(read.lengths)} documents, {read.num_tokens} tokens, "
        f"{read.dim} dimensions at {read.codec.nbits} bits, {read.num_centroids} centroids\n"
        f"{args.folder}: {args.to}"
    )
    if args.to == "native" and model is None:
        made = f" (it was made with {read.checkpoint})" if read.checkpoint else ""
        print(f"its model is not remembered{made}: name it in searches with --checkpoint")


def train(args: argparse.Namespace) -> None:
    kind, run = RECIPES[args.recipe]
    settings = read_settings(args.settings) if args.settings else {}
    recipe = make(kind, merge(settings, given(args)), args.settings or "colbert-jax train")
    trained = run(recipe, overwrite=args.overwrite)
    print(f"{trained.model}: {trained.step} steps")
    for name, value in (trained.dev or {}).items():
        print(f"{name:<12}{value:.4f}")


def demo(args: argparse.Namespace) -> None:
    run_demo(Path(args.folder or cache_folder() / "demo"), args.checkpoint)


def _search(
    retriever: Retriever, queries: Mapping[str, str], k: int, args: argparse.Namespace, texts: bool
) -> dict[str, list[Hit]]:
    hits = retriever.search(
        list(queries.values()),
        k,
        mode=args.mode,
        ncells=args.ncells,
        centroid_score_threshold=args.centroid_score_threshold,
        ndocs=args.ndocs,
        texts=texts,
        progress=None,
    )
    return dict(zip(queries, hits, strict=True))


def _print_hits(hits: Sequence[Hit]) -> None:
    for place, hit in enumerate(hits, 1):
        print(f"{place:4}  {hit.score:8.4f}  {hit.id}  {_shortened(hit.text or '')}")


def _summary(opened: Index) -> str:
    m = opened.metadata
    size = sum(file.stat().st_size for file in opened.path.iterdir())
    return (
        f"{opened.path}\n"
        f"documents    {m.num_documents} ({m.num_empty_documents} without a token)\n"
        f"tokens       {m.num_tokens}\n"
        f"dimensions   {m.dim} at {m.nbits} bits\n"
        f"centroids    {m.num_centroids}\n"
        f"size         {size / 1e6:.1f} MB"
    )


def _shortened(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colbert-jax", description="Late-interaction retrieval: index documents, search them."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run, summary: str, resumes: str = "") -> argparse.ArgumentParser:
        name = run.__name__.strip("_").replace("_", "-")
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run, resumes=resumes)
        sub.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show where an error comes from",
        )
        return sub

    sub = command(
        index, "index a collection of documents", "; run again, the build goes on where it was"
    )
    sub.add_argument("collection", help="TSV (pid, text[, title]), JSONL, or one document per line")
    sub.add_argument("index", help="folder of the index to build")
    sub.add_argument("--checkpoint", required=True, help="folder or Hugging Face hub id")
    sub.add_argument("--nbits", type=int, help="1, 2, 4 or 8 (default: the checkpoint's, else 2)")
    sub.add_argument(
        "--dim", type=int, help="width of a new, untrained projection for a plain encoder"
    )
    sub.add_argument("--doc-maxlen", type=int, help="tokens kept of a document")
    sub.add_argument("--kmeans-niters", type=int, help="k-means iterations")
    sub.add_argument("--num-centroids", type=int, help="default: by the number of tokens")
    sub.add_argument("--no-texts", action="store_true", help="do not keep the documents' texts")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing index")

    sub = command(search, "search an index")
    sub.add_argument("index")
    sub.add_argument("query", nargs="*")
    sub.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    sub.add_argument("--queries", help="TSV of qid, text")
    sub.add_argument("--output", help="write a run file: qid, pid, rank, score")
    _search_settings(sub)

    sub = command(rank, "order the documents of a file for one query, without an index")
    sub.add_argument("query")
    sub.add_argument("file", help="TSV (pid, text[, title]), JSONL, or one document per line")
    sub.add_argument("--checkpoint", required=True, help="folder or Hugging Face hub id")
    sub.add_argument("-k", type=int, help="results (default: all)")

    sub = command(evaluate, "measure an index against relevance judgements")
    sub.add_argument("index")
    sub.add_argument("--queries", required=True, help="TSV of qid, text")
    sub.add_argument("--qrels", required=True, help="lines of qid, 0, pid, gain")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    _search_settings(sub)

    sub = command(info, "show what an index holds")
    sub.add_argument("index")
    sub.add_argument("--verify", action="store_true", help="read every file, compare checksums")
    sub.add_argument("--json", action="store_true", help="print the metadata as JSON")

    sub = command(convert, "write a checkpoint in another layout")
    sub.add_argument("source", help="folder, Hugging Face hub id, or ColBERTv1 .dnn file")
    sub.add_argument("folder", help="the folder to make")
    sub.add_argument("--to", required=True, choices=list(LAYOUTS), help="layout to write")
    sub.add_argument("--revision", help="revision of the hub repository")
    sub.add_argument("--base", help="the model that a .dnn file was trained from")

    sub = command(convert_index_, "write an index in another layout")
    sub.add_argument("source", help="index of this library, of Stanford ColBERT or of fast-plaid")
    sub.add_argument("folder", help="the folder to make")
    sub.add_argument("--to", required=True, choices=list(TARGETS), help="layout to write")
    sub.add_argument("--checkpoint", help="the model that made it, for the index to remember")
    sub.add_argument("--collection", help="its documents in order, to be kept with --to native")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing index")

    sub = command(
        train,
        "train a model, or go on where a run stopped",
        "; run again, training goes on from its last checkpoint",
    )
    recipes = sub.add_subparsers(title="recipes", required=True, metavar="RECIPE", dest="recipe")
    for name, (kind, run) in RECIPES.items():
        one = recipes.add_parser(name, help=run.__doc__, description=kind.__doc__)
        one.add_argument("--settings", help="JSON file with settings; flags override single ones")
        one.add_argument("--overwrite", action="store_true", help="remove an earlier run first")
        add_arguments(one, kind)

    sub = command(demo, "index the documentation of Python's standard library, ask five questions")
    sub.add_argument("--folder", help="where the index goes (default: the user's cache)")
    sub.add_argument("--checkpoint", help="default: the packaged all-MiniLM-L6-v2")
    return parser


def _search_settings(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", help="default: the one the index was built with")
    sub.add_argument(
        "--mode",
        choices=MODES,
        default="accurate",
        help="how hard to look (default: accurate); exact scores every document",
    )
    sub.add_argument("--ncells", type=int, help="centroids probed per query token")
    sub.add_argument("--centroid-score-threshold", type=float)
    sub.add_argument("--ndocs", type=int, help="candidates kept by the first ranking")


if __name__ == "__main__":
    sys.exit(main())
