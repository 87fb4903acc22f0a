"""`colbert-jax`: the library from the command line; every command is a few library calls."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colbert_jax import __version__
from colbert_jax.checkpoints import LAYOUTS, convert_checkpoint
from colbert_jax.colbert import ColBERT
from colbert_jax.commands.common import (
    add_checkpoint_settings,
    add_search_settings,
    checkpoint_settings,
    refuse_checkpoint_settings,
    search_queries,
    warn,
)
from colbert_jax.commands.evaluate import add_evaluate, evaluate
from colbert_jax.commands.rerank import add_rerank, rerank
from colbert_jax.data.documents import Documents
from colbert_jax.data.m2kr import read_m2kr
from colbert_jax.data.streams import numbered_lines
from colbert_jax.demo import run_demo
from colbert_jax.evaluation import (
    m2kr,
    read_collection,
    read_queries,
    write_run,
)
from colbert_jax.evaluation.runs import FORMATS, check_run_ids
from colbert_jax.files import NO_ROOM, output_place
from colbert_jax.flmr import FLMRModelForRetrieval
from colbert_jax.index import Index
from colbert_jax.index.columns import UnknownIdError
from colbert_jax.index.format import CHANGED_VERSION, FORMAT_VERSION
from colbert_jax.index.layouts.convert import TARGETS, convert_index
from colbert_jax.multimodal import Query
from colbert_jax.progress import log_to_stderr
from colbert_jax.retriever import Hit, Retriever, rank_documents, remembered_model
from colbert_jax.runtime import cache_folder, enable_compilation_cache
from colbert_jax.serving.indexes import open_indexes
from colbert_jax.serving.limits import Limits
from colbert_jax.settings import (
    add_arguments,
    flag_names,
    given,
    make,
    merge,
    read_settings,
    required_flags,
)
from colbert_jax.training.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
      the exit status: 0; 2 for an error, named on stderr; 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    log_to_stderr(logging.WARNING if args.quiet else logging.INFO)
    _print_anything()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                enable_compilation_cache()
            except OSError as error:
                warn(f"compiled programs are not kept: {error}")
            args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except KeyboardInterrupt:
        print(f"colbert-jax: interrupted{args.resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback:
            raise
        print(f"colbert-jax: error: {_as_typed(_message(error, args), args)}", file=sys.stderr)
        return 2
    return 0


# What is raised for what a person gave, and says so; all else is named with its type.
_EXPLAINED: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, ImportError)
_EXPLAINED += (RuntimeError, FloatingPointError, UnknownIdError, UserWarning)
_ELSE = "if nothing explains it, --traceback shows where it came from"


def _message(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong, on what, and what to do."""
    kind, text = type(error).__name__, str(error)
    written = [getattr(args, name, None) for name in ("output", "index", "folder")]
    if isinstance(error, MemoryError):
        text = (
            f"not enough memory{f' ({text})' if text else ''}: ask for less at a time, or free some"
        )
    elif isinstance(error, RecursionError):
        text = f"nested too deeply ({text}): is a JSON file damaged? {_ELSE}"
    elif isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
        place = next(filter(None, written), None)
        text = f"{text}{f': {place}' if place else ''}; make room, and run the command again"
    elif not isinstance(error, _EXPLAINED) or isinstance(error, UnicodeError) or not text:
        text = f"{kind}: {text}; {_ELSE}"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def _as_typed(message: str, args: argparse.Namespace) -> str:
    """A message that names arguments of Python, with the flags to type in their place."""
    flags = set(vars(args))
    if "recipe" in flags:
        flags |= flag_names(RECIPES[args.recipe][0])

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if (name, value) == ("store_texts", "False"):
            return "--no-texts"
        if name not in flags or value == "False":
            return match.group()
        value = "" if value == "True" else value.strip("\"'")
        return f"--{name.replace('_', '-')} {value}".strip()

    return re.sub(
        r"(?<![\w/.='\"-])([a-z_]+)=(True|False|\"\w*\"|'\w*'|(?![^\s,;:)]))", flag, message
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In place of `warnings.showwarning`."""
    warn(str(message))


def _print_anything() -> None:
    """Let texts and names be printed that the terminal's encoding does not have, escaped."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # not of a notebook's
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def index(args: argparse.Namespace) -> None:
    settings = checkpoint_settings(args)
    if args.doc_maxlen is not None:
        settings["doc_maxlen"] = args.doc_maxlen
    retriever = Retriever.build(
        args.index,
        args.checkpoint,
        Path(args.collection),
        images=args.images,
        nbits=args.nbits,
        kmeans_niters=args.kmeans_niters,
        num_centroids=args.num_centroids,
        learned_dim=args.learned_dim,
        store_texts=not args.no_texts,
        bm25=args.bm25,
        overwrite=args.overwrite,
        dim=args.dim,
        **settings,
    )
    print(_summary(retriever.index))


def add(args: argparse.Namespace) -> None:
    _grow(args, "add")


def update(args: argparse.Namespace) -> None:
    _grow(args, "update")


def upsert(args: argparse.Namespace) -> None:
    _grow(args, "upsert")


def _grow(args: argparse.Namespace, kind: str) -> None:
    # A bad file is named before the model is loaded.
    documents = Documents(args.collection, images=args.images)
    retriever = Retriever.open(args.index, args.checkpoint)
    getattr(retriever, kind)(documents)
    print(_summary(retriever.index))


def delete(args: argparse.Namespace) -> None:
    if bool(args.id) == bool(args.ids):
        raise ValueError("give ids on the command line or --ids FILE, one of the two")
    ids = args.id or [id for _, id in numbered_lines(Path(args.ids))]
    before = Index.open(args.index)
    after = before.delete(ids)
    print(f"{len(before) - len(after)} documents deleted")
    print(_summary(after))


def compact(args: argparse.Namespace) -> None:
    opened = Index.open(args.index)
    if args.retrain:
        retriever = Retriever.open(opened, args.checkpoint)
        retriever.compact(retrain=True)
        opened = retriever.index
    else:
        opened = opened.compact()
    print(_summary(opened))


def bm25(args: argparse.Namespace) -> None:
    opened = Index.open(args.index).keep_bm25()
    print(_summary(opened))


def search(args: argparse.Namespace) -> None:
    if bool(args.query) == bool(args.queries):
        raise ValueError("give queries on the command line or --queries FILE, one of the two")
    if args.image and len(args.query) != 1:
        raise ValueError("--image goes with one query on the command line")
    queries: dict[str, Query]
    if args.queries:
        queries = dict(read_queries(args.queries))
    else:
        queries = {f"q{n}": text for n, text in enumerate(args.query, 1)}
        if args.image:
            queries = {"q1": (args.query[0], args.image)}
    if args.output:
        output_place(args.output)
        check_run_ids(queries, "query", args.format)
    place: str | Index = args.index
    if args.output:
        place = Index.open(args.index)
        check_run_ids(place.ids, "document", args.format)
    retriever = Retriever.open(place, args.checkpoint)
    if not args.output:
        for qid, hits in search_queries(retriever, queries, args.k, args, texts=True):
            query = queries[qid]
            print(query if isinstance(query, str) else f"{query[0]} ({args.image})")
            _print_hits(hits)
        return
    found = search_queries(retriever, queries, args.k, args, texts=False)
    results = write_run(args.output, found, args.format)
    whole = output_place(args.output) is not None  # not a pipe, which may be our own output
    print(
        f"{len(queries)} queries, {results} results: {args.output}",
        file=sys.stdout if whole else sys.stderr,
    )


def rank(args: argparse.Namespace) -> None:
    documents = Documents(args.file, fields=False)  # a bad file is named before the model is loaded
    model = ColBERT.from_pretrained(args.checkpoint, **checkpoint_settings(args))
    _print_hits(rank_documents(model, args.query, documents, args.k, weights=args.weights))


def evaluate_m2kr(args: argparse.Namespace) -> None:
    if args.report:
        output_place(args.report)
    # A bad file is named before the model is loaded.
    data = read_m2kr(args.data, args.passages, split=args.split, images=args.images)
    report = m2kr.evaluate_m2kr(
        FLMRModelForRetrieval.from_pretrained(args.checkpoint),
        data,
        ks=args.ks,
        index_root_path=args.index_root_path,
        index_experiment_name=args.experiment_name,
        index_name=args.index_name,
        nbits=args.nbits,
        doc_maxlen=args.doc_maxlen,
        overwrite=args.overwrite,
        batch_size=args.batch_size,
        black_images=args.black_images,
    )
    if args.report:
        report.save(args.report)
    failed = len(report.failed)
    print(f"{len(data)} questions" + (f", {failed} without their image" if failed else ""))
    for name, value in report.measures.items():
        print(f"{name:<20}{value:.4f}")


def info(args: argparse.Namespace) -> None:
    opened = Index.open(args.index)
    if args.verify:
        opened.verify()
    if args.json:
        print(json.dumps(opened.metadata.to_json()))
        return
    model = remembered_model(opened)
    print(_summary(opened))
    print(f"model        {model['load']['name_or_path'] if model else 'none: ready embeddings'}")
    change = opened.metadata.change
    print(f"format       {FORMAT_VERSION if change is None else CHANGED_VERSION}")
    print(f"settings     {json.dumps(opened.metadata.settings)}")
    if opened.metadata.learned is not None:
        print(f"learned      vectors of {opened.metadata.learned['width']} bytes")
    if change is not None:
        print(f"changes      {change.generation}")
    for name, kinds in opened.field_names().items():
        print(f"field        {name}: {', '.join(kinds)}")
    for advice in opened.advice():
        print(f"advice       {advice}")
    if args.verify:
        print("checksums    all files are whole")


def convert(args: argparse.Namespace) -> None:
    found, checkpoint = convert_checkpoint(
        args.source,
        args.folder,
        args.to,
        base=args.base,
        revision=args.revision,
        **checkpoint_settings(args),
    )
    encoder = checkpoint.encoder
    print(
        f"{args.source}: {found}, {encoder.backbone.model_type}, {encoder.dim} dimensions\n"
        f"{args.folder}: {args.to}"
    )


def convert_index_(args: argparse.Namespace) -> None:
    if Path(args.folder).exists() and not args.overwrite:
        raise FileExistsError(f"{args.folder}: exists; pass --overwrite to replace an index there")
    if args.checkpoint is None:
        refuse_checkpoint_settings(args, "an index without --checkpoint")
        model = None
    else:
        model = ColBERT.from_pretrained(args.checkpoint, **checkpoint_settings(args))
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
    measured = trained.dev or {}
    width = max((len(name) + 2 for name in measured), default=0)
    width = max(width, 12)
    if trained.before is not None:
        print(f"{'':<{width}}before    best")
    for name, value in measured.items():
        before = "" if trained.before is None else f"{trained.before[name]:.4f}  "
        print(f"{name:<{width}}{before}{value:.4f}")


def serve(args: argparse.Namespace) -> None:
    try:
        from colbert_jax.serving.server import serve as serve_indexes
    except ImportError as error:
        raise ImportError(f'{error}: serve needs pip install "colbert-jax[serve]"') from None
    limits = Limits(**{name: getattr(args, name) for name in vars(Limits())})
    serve_indexes(
        open_indexes(args.index, args.checkpoint),
        host=args.host,
        port=args.port,
        warm_up=not args.no_warm_up,
        limits=limits,
        cors=args.cors or (),
        refresh_seconds=args.refresh_seconds,
        api_key=os.environ.get("COLBERT_JAX_API_KEY"),
        write_key=os.environ.get("COLBERT_JAX_WRITE_KEY"),
    )


def mcp(args: argparse.Namespace) -> None:
    try:
        from colbert_jax.adapters.mcp import make_server
    except ImportError as error:
        raise ImportError(f'{error}: mcp needs pip install "colbert-jax[mcp]"') from None
    served = open_indexes(args.index, args.checkpoint)
    make_server({name: one.now for name, one in served.items()}).run()


def demo(args: argparse.Namespace) -> None:
    run_demo(Path(args.folder or cache_folder() / "demo"), args.checkpoint)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


_numbers.__name__ = "list of numbers"  # argparse says "invalid list of numbers value"


def _print_hits(hits: Sequence[Hit]) -> None:
    for place, hit in enumerate(hits, 1):
        print(f"{place:4}  {hit.score:8.4f}  {hit.id}  {_shortened(hit.text or '')}")


def _summary(opened: Index) -> str:
    m = opened.metadata
    size = sum(file.stat().st_size for file in opened.path.rglob("*") if file.is_file())
    return (
        f"{opened.path}\n"
        f"documents    {len(opened)} ({m.num_empty_documents} without a token)\n"
        + (f"deleted      {m.num_deleted}, still in their place\n" if m.num_deleted else "")
        + f"tokens       {m.num_tokens}\n"
        f"dimensions   {m.dim} at {m.nbits} bits\n"
        f"centroids    {m.num_centroids}\n"
        + ("BM25         kept\n" if opened.keeps_bm25 else "")
        + f"size         {size / 1e6:.1f} MB"
    )


def _shortened(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


_IMAGES = "name of the field that has the path of a document's image, for a model with images"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colbert-jax", description="Late-interaction retrieval: index documents, search them."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _general(parser, default=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run, summary: str, resumes: str = "") -> argparse.ArgumentParser:
        name = run.__name__.strip("_").replace("_", "-")
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run, resumes=resumes)
        _general(sub)
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
    add_checkpoint_settings(sub)
    sub.add_argument("--kmeans-niters", type=int, help="k-means iterations")
    sub.add_argument("--num-centroids", type=int, help="default: by the number of tokens")
    sub.add_argument(
        "--learned-dim",
        type=int,
        help="keep learned vectors of so many bytes, for search --candidates learned",
    )
    sub.add_argument("--images", help=_IMAGES)
    sub.add_argument("--no-texts", action="store_true", help="do not keep the documents' texts")
    sub.add_argument("--bm25", action="store_true", help="keep BM25 too, for searches --hybrid")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing index")

    for run, summary in (
        (add, "add documents to an index"),
        (update, "replace documents of an index by new ones of the same ids"),
        (upsert, "add documents to an index, replacing those of the same ids"),
    ):
        sub = command(run, summary, "; run again, it goes on where it was")
        sub.add_argument("index")
        sub.add_argument("collection", help="TSV (pid, text[, title]), JSONL, or one per line")
        sub.add_argument("--images", help=_IMAGES)
        sub.add_argument("--checkpoint", help="default: the one the index was built with")

    sub = command(delete, "delete documents of an index by their ids")
    sub.add_argument("index")
    sub.add_argument("id", nargs="*")
    sub.add_argument("--ids", help="file of ids, one a line")

    sub = command(compact, "free the room of an index's deleted documents")
    sub.add_argument("index")
    sub.add_argument(
        "--retrain", action="store_true", help="encode all texts and train the centroids again"
    )
    sub.add_argument("--checkpoint", help="for --retrain; default: the one it was built with")

    sub = command(bm25, "keep BM25 of an index's texts with it, for searches --hybrid")
    sub.add_argument("index")

    sub = command(search, "search an index")
    sub.add_argument("index")
    sub.add_argument("query", nargs="*")
    sub.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    sub.add_argument("--queries", help="TSV of qid, text, or JSONL")
    sub.add_argument("--image", help="file of the query's picture, for a model with images")
    sub.add_argument("--output", help="write a run file, into a file or a pipe")
    sub.add_argument(
        "--format",
        choices=FORMATS,
        default="trec",
        help="of the run file: qid Q0 pid rank score tag (trec, the default), or qid, pid, rank, "
        "score with tabs between (stanford)",
    )
    add_search_settings(sub)

    sub = command(rank, "order the documents of a file for one query, without an index")
    sub.add_argument("query")
    sub.add_argument("file", help="TSV (pid, text[, title]), JSONL, or one document per line")
    sub.add_argument("--checkpoint", required=True, help="folder or Hugging Face hub id")
    sub.add_argument("-k", type=int, help="results (default: all)")
    sub.add_argument(
        "--weights",
        type=_numbers,
        metavar="DENSE,LEXICAL,MULTI",
        help="mix bge-m3's three scores, 1,0.3,1 for example (default: MaxSim alone)",
    )
    add_checkpoint_settings(sub)

    add_evaluate(command(evaluate, "measure an index, or systems on published collections"))
    add_rerank(command(rerank, "order the candidates of a run file by their exact scores"))

    sub = command(evaluate_m2kr, "measure a model of images on questions of M2KR")
    sub.add_argument("data", help="questions: parquet, JSONL, a folder, or owner/name/config")
    sub.add_argument("passages", help="their passages, in the same forms")
    sub.add_argument("--checkpoint", required=True, help="of PreFLMR or FLMR: folder or hub id")
    sub.add_argument("--images", help="folder that img_path begins in")
    sub.add_argument("--split", default="test", help="default: test")
    sub.add_argument("--report", help="JSON file to write: what each question found")
    sub.add_argument("--ks", type=int, nargs="+", default=m2kr.KS, help="default: 1 to 100")
    sub.add_argument("--index-root-path", default=".", help="where the passages' index goes")
    sub.add_argument("--experiment-name", default="default_experiment", help="folder in it")
    sub.add_argument("--index-name", default="index", help="name of the index in that")
    sub.add_argument("--nbits", type=int, default=8, help="1, 2, 4 or 8 (default: 8)")
    sub.add_argument("--doc-maxlen", type=int, default=512, help="default: 512")
    sub.add_argument("--overwrite", action="store_true", help="replace an index of another model")
    sub.add_argument("--batch-size", type=int, default=32, help="questions encoded at a time")
    sub.add_argument(
        "--black-images",
        action="store_true",
        help="give questions without an image a black one, as FLMR's script does",
    )

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
    add_checkpoint_settings(sub)

    sub = command(convert_index_, "write an index in another layout")
    sub.add_argument("source", help="index of this library, of Stanford ColBERT or of fast-plaid")
    sub.add_argument("folder", help="the folder to make")
    sub.add_argument("--to", required=True, choices=list(TARGETS), help="layout to write")
    sub.add_argument("--checkpoint", help="the model that made it, for the index to remember")
    add_checkpoint_settings(sub)
    sub.add_argument("--collection", help="its documents in order, to be kept with --to native")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing index")

    sub = command(
        train,
        "train a model, or go on where a run stopped",
        "; run again, training goes on from its last checkpoint",
    )
    recipes = sub.add_subparsers(title="recipes", required=True, metavar="RECIPE", dest="recipe")
    for name, (kind, run) in RECIPES.items():
        about = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
        needed = " ".join(required_flags(kind))
        usage = f"colbert-jax train {name} {needed} [settings]"
        one = recipes.add_parser(name, help=run.__doc__, description=about, usage=usage)
        one.add_argument("--settings", help="JSON file with settings; flags override single ones")
        one.add_argument("--overwrite", action="store_true", help="remove an earlier run first")
        _general(one)
        add_arguments(one, kind)

    sub = command(serve, "answer searches over HTTP; keys: docs/serving.md")
    sub.add_argument("index", nargs="+", help="folder of an index, or NAME=FOLDER")
    sub.add_argument("--checkpoint", help="default: the one that each index was built with")
    sub.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine)")
    sub.add_argument("--port", type=int, default=8000)
    sub.add_argument("--cors", action="append", metavar="ORIGIN", help="origin that may ask")
    sub.add_argument(
        "--refresh-seconds", type=float, default=1.0, help="between looks for changes (default: 1)"
    )
    sub.add_argument("--no-warm-up", action="store_true", help="compile when requests come")
    for name, about in (
        ("wait_ms", "milliseconds that a request waits for others"),
        ("batch", "most queries computed together"),
        ("queue", "most requests that may wait; one more is answered 429"),
        ("timeout", "most seconds for an answer"),
        ("body", "most bytes of a request"),
        ("k", "most results of a query"),
        ("queries", "most queries of a request"),
        ("query_chars", "most characters of a query"),
        ("document_chars", "most characters of a document"),
        ("documents", "most documents of a request"),
        ("connections", "most connections; one more is answered 503"),
    ):
        default = getattr(Limits, name)
        sub.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{about} (default: {default})",
        )

    sub = command(mcp, "answer searches of an assistant, by the Model Context Protocol on stdio")
    sub.add_argument("index", nargs="+", help="folder of an index, or NAME=FOLDER")
    sub.add_argument("--checkpoint", help="default: the one that each index was built with")

    sub = command(demo, "index the documentation of Python's standard library, ask five questions")
    sub.add_argument("--folder", help="where the index goes (default: the user's cache)")
    sub.add_argument("--checkpoint", help="default: the packaged all-MiniLM-L6-v2")
    return parser


def _general(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Flags that may stand before a command's name and behind it, where a default would undo the
    one before."""
    for flag, help in (
        ("--traceback", "show where an error comes from"),
        ("--quiet", "no progress bars and no log lines, only warnings and errors"),
    ):
        parser.add_argument(flag, action="store_true", default=default, help=help)


if __name__ == "__main__":
    sys.exit(main())
