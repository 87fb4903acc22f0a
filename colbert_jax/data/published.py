"""Test collections as they are published: documents, queries and judgements from one place.

A place is one of these; what is found is told (`TestCollection.describe`), never guessed twice:

* a folder of BEIR (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`), of NanoBEIR and other data
  sets (`corpus/`, `queries/` and `qrels/`, each of parquet or JSONL), of LoTTE (`collection.tsv`,
  `questions.search.tsv`, `qas.search.jsonl`), of MS MARCO (`collection.tsv`, `queries.dev.tsv`,
  `qrels.dev.tsv`; `msmarco-docs.tsv`, `msmarco-docdev-queries.tsv`, `msmarco-docdev-qrels.tsv`),
  or one with `collection`, `queries` (or `topics`) and `qrels` in any format. Files may be packed
  (.gz, .zst);
* three files, or three data sets of the library `datasets`, named one by one;
* `ir_datasets:ID`, an id of ir_datasets;
* `datasets:NAME`, a data set of the hub whose configurations are corpus, queries and qrels.
"""

from __future__ import annotations

import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.data.collections import (
    parse_record,
    read_documents,
    read_qrels,
    read_queries,
    record_fields,
)
from colbert_jax.data.tables import Columns

_IR_DATASETS, _DATASETS = "ir_datasets:", "datasets:"
_DATA_FILE = re.compile(r"(.+?)(\.(tsv|jsonl|ndjson|json|csv|parquet|txt|xml))?(\.(gz|zst))?")

Triple = tuple[str, str, dict[str, Any]]


class _Form(NamedTuple):
    """Where a published folder has its parts, without the ends of names; one split of many."""

    name: str
    documents: str
    queries: str
    qrels: str
    many: bool = False  # a part may be several files


_FORMS = (
    _Form("BEIR folder", "corpus", "queries", r"qrels/(?P<split>.+)"),
    _Form(
        "data set folder",
        r"corpus/[^/]+",
        r"queries/[^/]+",
        r"qrels/(?P<split>.+?)(-\d+-of-\d+)?",
        many=True,
    ),
    _Form("LoTTE folder", "collection", r"questions\.(?P<split>\w+)", r"qas\.(?P<split>\w+)"),
    _Form("MS MARCO folder", "collection", r"queries\.(?P<split>.+)", r"qrels\.(?P<split>.+)"),
    _Form(
        "MS MARCO documents",
        "msmarco-docs",
        r"msmarco-doc(?P<split>\w+)-queries",
        r"msmarco-doc(?P<split>\w+)-qrels",
    ),
    _Form("folder", "collection|corpus|documents|passages", "queries|topics", "qrels"),
)


@dataclass(frozen=True)
class TestCollection:
    """Documents, queries and judgements.

    name: for reports. form: what kind of place it is. split: of the queries; empty where there is
      one only.
    queries: the judged queries by id. qrels: of these queries, qid -> pid -> gain.
    num_documents: how many there are.
    notes: what was left out, is missing, or looks odd: one sentence each.
    """

    __test__ = False  # pytest takes the name for its own

    name: str
    form: str
    split: str
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    num_documents: int
    notes: tuple[str, ...]
    _open: Callable[[], Iterator[Triple]] = field(repr=False)

    def documents(self) -> Iterator[Triple]:
        """Read id, text and fields of every document, anew with every call."""
        return self._open()

    def describe(self) -> str:
        """One line: form, documents, queries."""
        split = f"{self.split} " if self.split else ""
        return (
            f"{self.form}, {self.num_documents:,} documents, {len(self.queries):,} {split}queries"
        )


def read_test_collection(
    source: Any,
    *,
    queries: Any = None,
    qrels: Any = None,
    split: str | None = None,
    name: str | None = None,
    columns: Columns | None = None,
    query_columns: Columns | None = None,
    qrel_columns: Columns | None = None,
) -> TestCollection:
    """Open a test collection; all is read once, and counted.

    Args:
      source: a place, docs/evaluate.md lists them; with `queries` and `qrels` the documents, a file
        or a `datasets.Dataset`.
      queries, qrels: a file, or a `datasets.Dataset`.
      split: which of a folder's queries: "test", "dev", LoTTE's "search" or "forum". If None,
        "test", or the only one.
      name: for reports; if None, that of the place.
      columns, query_columns, qrel_columns: which columns of documents, queries and judgements are
        what, see `read_documents`, `read_queries`, `read_qrels`.

    Raises:
      FileNotFoundError: no such place.
      ValueError: not a collection of a known form, a line that can't be read, a document's id that
        is there twice, no judged query, no judged document; names the place.
      ImportError: what a place needs is not installed.

    Warns of judged documents and judged queries that are not there: they count as not found.
    """
    if (queries is None) != (qrels is None):
        raise TypeError("queries and qrels go together: give both, or a place that has all")
    notes: list[str] = []
    read = _Reading(columns, query_columns, qrel_columns, notes)
    text = str(source) if isinstance(source, str | Path) else ""
    if queries is not None:
        found = read.parts("files" if text else "data sets", split or "", source, queries, qrels)
    elif text.startswith(_IR_DATASETS):
        found = _ir_dataset(text.removeprefix(_IR_DATASETS), read)
    elif text.startswith(_DATASETS):
        found = _hub_dataset(text.removeprefix(_DATASETS), split, read)
    elif text:
        found = _folder(Path(text).expanduser(), split, read)
    else:
        raise TypeError(
            f"expected a place or documents with queries= and qrels=, got {type(source).__name__}"
        )
    name = name or re.sub(r".*[/:]", "", text.rstrip("/")) or "collection"
    return _checked(name, text or "the data set", found, notes)


class _Found(NamedTuple):
    form: str
    split: str
    open: Callable[[], Iterator[Triple]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


class _Reading(NamedTuple):
    """How the parts are read; notes gets what is not used."""

    columns: Columns | None
    query_columns: Columns | None
    qrel_columns: Columns | None
    notes: list[str]

    def parts(self, form: str, split: str, documents: Any, queries: Any, qrels: Any) -> _Found:
        """Read queries and judgements; each a source, or a list of files that belong together."""
        asked: dict[str, str] = {}
        for one in _listed(queries):
            more = read_queries(one, columns=self.query_columns, notes=self.notes)
            twice = next(iter(asked.keys() & more.keys()), None)
            if twice is not None:
                raise ValueError(f"{one}: query id {twice!r:.80} is in another file too")
            asked |= more
        judged: dict[str, dict[str, int]] = {}
        for one in _listed(qrels):
            for qid, gains in read_qrels(one, columns=self.qrel_columns, notes=self.notes).items():
                judged.setdefault(qid, {}).update(gains)
        listed = _listed(documents)

        def opened() -> Iterator[Triple]:
            return chain.from_iterable(read_documents(one, columns=self.columns) for one in listed)

        return _Found(form, split, opened, asked, judged)


def _listed(source: Any) -> Sequence[Any]:
    return source if isinstance(source, list) else [source]


# --- Folders ----------------------------------------------------------------------------------


def _folder(folder: Path, split: str | None, read: _Reading) -> _Found:
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: there is no such folder; a collection of ir_datasets is named "
            f"{_IR_DATASETS}ID, one of the hub {_DATASETS}OWNER/NAME"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: a file; name its queries and judgements beside it")
    files: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        match = _DATA_FILE.fullmatch(file.relative_to(folder).as_posix())
        if match is not None and file.is_file() and not file.name.startswith("."):
            files.setdefault(match.group(1), []).append(file)
    for form in _FORMS:
        documents = [f for key, f in files.items() if re.fullmatch(form.documents, key)]
        if not documents:
            continue
        queries, qrels = _by_split(form.queries, files), _by_split(form.qrels, files)
        splits = [name for name in qrels if name in queries or "" in queries]
        if not splits:
            continue
        chosen = _choose(splits, split, folder)
        parts = [
            list(chain.from_iterable(documents)),
            queries.get(chosen, queries.get("", [])),
            qrels[chosen],
        ]
        if not form.many:
            for part in parts:
                if len(part) > 1:
                    raise ValueError(
                        f"{folder}: {' and '.join(file.name for file in part)} may both be meant: "
                        "keep one"
                    )
        said = "" if len(splits) == 1 and chosen == "train" else chosen
        return read.parts(form.name, said, *parts)
    raise ValueError(_unknown(folder, files))


def _by_split(pattern: str, files: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Files whose names a pattern matches, by the split in the name."""
    found: dict[str, list[Path]] = {}
    for key, listed in files.items():
        match = re.fullmatch(pattern, key)
        if match is not None:
            found.setdefault(match.groupdict().get("split") or "", []).extend(listed)
    return found


def _choose(splits: Sequence[str], wanted: str | None, place: Any) -> str:
    if wanted is not None and wanted in splits:
        return wanted
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted is None and "test" in splits:
        return "test"
    there = ", ".join(filter(None, splits)) or "one without a name"
    asked = "choose one" if wanted is None else f"there is no split {wanted!r:.60}"
    raise ValueError(f"{place}: {asked}: queries are there for {there}")


def _unknown(folder: Path, files: Mapping[str, list[Path]]) -> str:
    inside = [name for name in ("test", "dev") if (folder / name).is_dir()]
    if inside and not files.keys() & {"corpus", "collection"}:
        there = " or ".join(f"{folder}/{name}" for name in inside)
        return f"{folder}: has no collection itself; is {there} meant?"
    there = ", ".join(sorted(path.name for path in folder.iterdir()))[:300] or "nothing"
    return (
        f"{folder}: no collection of a known form, which are {', '.join(f.name for f in _FORMS)}: "
        f"expected corpus.jsonl, queries.jsonl and qrels/test.tsv, for example; there is {there}. "
        "Or name the three files one by one"
    )


# --- Libraries --------------------------------------------------------------------------------


def _ir_dataset(name: str, read: _Reading) -> _Found:
    try:
        import ir_datasets
    except ImportError as error:
        raise ImportError(
            f'{name}: needs ir_datasets: pip install "colbert-jax[ir-datasets]"'
        ) from error
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise ValueError(f"{name!r:.80}: no id of ir_datasets") from None
    lacking = [
        part for part in ("docs", "queries", "qrels") if not getattr(dataset, f"has_{part}")()
    ]
    if lacking:
        raise ValueError(f"{_IR_DATASETS}{name}: has no {' and no '.join(lacking)}: name a split")

    def documents() -> Iterator[Triple]:
        for doc in dataset.docs_iter():
            record = doc._asdict()
            try:
                pid, text = parse_record(record)
                fields = record_fields(record)
            except ValueError:  # no text under a name that is known
                pid, text, fields = record["doc_id"], doc.default_text(), {}
            yield str(pid), text, fields

    queries = {str(query.query_id): query.default_text() for query in dataset.queries_iter()}
    qrels: dict[str, dict[str, int]] = {}
    twice = 0
    for one in dataset.qrels_iter():
        gains = qrels.setdefault(str(one.query_id), {})
        twice += one.doc_id in gains
        gains[str(one.doc_id)] = int(one.relevance)
    if twice:
        read.notes.append(f"{twice} judgements are there twice: the last of each counts")
    return _Found("collection of ir_datasets", "", documents, queries, qrels)


def _hub_dataset(name: str, split: str | None, read: _Reading) -> _Found:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{name}: needs datasets: pip install "colbert-jax[train]"') from error

    def only(part: str) -> Any:
        return next(iter(datasets.load_dataset(name, part).values()))

    try:
        judged = datasets.load_dataset(name, "qrels")
    except ValueError:  # BEIR has them beside, without configurations
        judged = datasets.load_dataset(f"{name}-qrels")
    chosen = _choose(list(judged), split, name)
    said = "" if len(judged) == 1 and chosen == "train" else chosen
    return read.parts("data set", said, only("corpus"), only("queries"), judged[chosen])


# --- Checks -----------------------------------------------------------------------------------


def _checked(name: str, place: str, found: _Found, notes: list[str]) -> TestCollection:
    """Count the documents, compare the three parts, say what does not fit."""
    loud = []
    queries = {qid: text for qid, text in found.queries.items() if qid in found.qrels}
    if not queries:
        raise ValueError(
            f"{place}: no query has a judgement: a query's id is "
            f"{next(iter(found.queries))!r:.60}, for example, and a judged one is "
            f"{next(iter(found.qrels))!r:.60}"
        )
    if len(queries) < len(found.queries):
        notes.append(f"{len(found.queries) - len(queries)} queries without a judgement: left out")
    absent = [qid for qid in found.qrels if qid not in queries]
    if absent:
        loud.append(
            f"{len(absent)} judged queries are not among the queries, {absent[0]!r:.60} for "
            "example: left out"
        )
    qrels = {qid: found.qrels[qid] for qid in queries}
    wanted = {pid for gains in qrels.values() for pid in gains}
    judged = len(wanted)
    hashes, empty, first_empty, first, fields = array("q"), 0, "", "", set[str]()
    for pid, text, more in found.open():
        first = first or pid
        hashes.append(hash(pid))
        wanted.discard(pid)
        if not text.strip():
            empty, first_empty = empty + 1, first_empty or pid
        fields.update(more)
    _refuse_twice(place, found.open, hashes)
    if fields:
        notes.append(f"fields of documents: {', '.join(sorted(map(str, fields)))[:200]}")
    if empty:
        notes.append(
            f"{empty} documents have an empty text, {first_empty!r:.60} first: they cannot be found"
        )
    if wanted:
        message = (
            f"{len(wanted)} of {judged} judged documents are not in the collection: judged is "
            f"{min(wanted)!r:.60}, for example, and there is {first!r:.60}"
        )
        if len(wanted) == judged:
            raise ValueError(f"{place}: {message}; give the judgements of these documents")
        loud.append(f"{message}; they count as not found")
    blank = [qid for qid, gains in qrels.items() if max(gains.values()) <= 0]
    if blank:
        notes.append(
            f"{len(blank)} queries have no relevant document, {blank[0]!r:.60} for example: they "
            "count as 0"
        )
    for message in loud:
        warnings.warn(f"{place}: {message}", stacklevel=3)
    return TestCollection(
        name,
        found.form,
        found.split,
        queries,
        qrels,
        len(hashes),
        tuple([*loud, *notes]),
        partial(found.open),
    )


def _refuse_twice(place: str, opened: Callable[[], Iterator[Triple]], hashes: array) -> None:
    """Raises ValueError for an id that two documents have."""
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    seen: dict[str, int] = {}
    for number, (pid, _, _) in enumerate(opened() if suspects else ()):
        if hash(pid) in suspects and seen.setdefault(pid, number) != number:
            raise ValueError(
                f"{place}: documents {seen[pid]} and {number}, counted from 0, both have the id "
                f"{pid!r:.80}: remove one"
            )
