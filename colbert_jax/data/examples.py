"""Training examples by position: Stanford's files, pairs in tables, Hugging Face data sets.

Of lines nothing is read into memory but their offsets, and which query has which positives
(`Labels`): a line is parsed when its example is asked for. Of CSV and parquet the columns that are
asked for are held in memory.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from colbert_jax.data.collections import json_object, json_value
from colbert_jax.data.lines import Lines
from colbert_jax.data.streams import unpacked_suffix
from colbert_jax.data.tables import TABLES, read_records
from colbert_jax.data.texts import Texts, checked_text
from colbert_jax.files import present, short_json
from colbert_jax.progress import LOGGER, progress_bar

_SHORT = 64  # bytes of a line that may have no text; longer ones are not looked at beforehand
_MOST_POSITIVES = 16  # of a query that are looked for in a batch
_PACK = 3 << 20  # numbers, three for each example, that are kept before repeats are dropped
_LARGEST_SCORE = float(np.finfo(np.float32).max)
_INSTALL = 'pip install "colbert-jax[train]"'
# What the fields of pairs are called in the field's data sets, in small letters; the first counts.
QUERIES = ("query", "question", "anchor", "sentence1")
POSITIVES = ("positive", "answer", "document", "passage", "response", "sentence2", "text")


class Check(NamedTuple):
    """How much of the examples is read and checked before training.

    whole: bytes of the largest file that is checked whole.
    first: examples that are checked of a larger file, or of a data set.
    """

    whole: int = 1 << 30
    first: int = 10_000


CHECK = Check()


class Example(NamedTuple):
    """A query and W documents, the first of them the positive.

    scores: the teacher's, W, if there are any.
    """

    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...] | None


class ExampleSource(Protocol):
    """Examples by position, to be read from any thread.

    nway: documents of every example.
    scored: whether examples have scores.
    fingerprint: of the content; a resumed run compares it.

    A source may know all positives of a query besides, as those of this module do: see
    `most_positives` and `positives_of`. None of them is then a negative of that query.
    """

    nway: int
    scored: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Read an example. Raises ValueError naming file and line of what can't be read."""
        ...


def most_positives(source: ExampleSource) -> int:
    """The number of positives that `positives_of` gives for a query at most."""
    return getattr(source, "most_positives", 1)


def positives_of(source: ExampleSource, query: str) -> tuple[str, ...]:
    """The texts of a query's positives where the source knows of several; else none."""
    find = getattr(source, "positives", None)
    return () if find is None else find(query)


def stanford_examples(
    examples: str | Path,
    queries: str | Path | Texts,
    collection: str | Path | Texts,
    *,
    nway: int | None = None,
    scores: bool = True,
    check: Check = CHECK,
    progress: bool | None = None,
) -> ExampleSource:
    """Read Stanford ColBERT's training files.

    Every line's form, ids and scores are checked here, and that the texts are not empty; of an
    examples file beyond 1 GB the first 10,000 lines (`check`), the others when they are read.

    Args:
      examples: JSONL of `[qid, pid+, pid-, ...]` or `[qid, [pid, score], ...]`, the positive first,
        or v1's TSV of `qid, pid+, pid-`.
      queries: TSV of `qid, text` (further columns are ignored), or JSONL with `qid` and `question`;
        or `Texts.queries` of it.
      collection: what `read_collection` reads, or `Texts.passages` of it, for several examples
        files to share.
      nway: how many passages of each line to take, from the left. If None, as many as the
        first line has.
      scores: if False, leave scores out.
      progress: whether to show a bar while checking; if None, on a terminal.

    Raises:
      ValueError: naming file and line: not JSON, a missing or non-finite score, scores on some
        lines only, an id that is unknown or there twice, fewer passages than `nway`, an empty text.

    Warns, naming file and line, of a positive that is a negative of its example too.
    """
    lines = Lines(examples)
    queries = queries if isinstance(queries, Texts) else Texts.queries(queries)
    passages = collection if isinstance(collection, Texts) else Texts.passages(collection)
    source = _StanfordExamples(lines, queries, passages, nway, scores)
    _check(source, _number_to_check(lines, check), progress)
    return source


def pair_examples(
    path: str | Path,
    *,
    query: str | None = None,
    positive: str | None = None,
    negatives: str | Sequence[str] | None = None,
    scores: str | None = None,
    nway: int | None = None,
    check: Check = CHECK,
    progress: bool | None = None,
) -> ExampleSource:
    """Read texts from JSONL, CSV, TSV or parquet, by the names of fields or columns.

    Every line is checked here; of a file beyond 1 GB the first 10,000 (`check`), the others when
    they are read. The log says which fields are taken, and which are not.

    Args:
      path: a name in .csv, .tsv or .parquet; any other is JSONL. With .gz or .zst at its end the
        file is unpacked into memory. A TSV whose first line has no names of fields is query,
        positive and negatives with tabs between, as ColBERTv1's triples of texts are.
      query, positive: fields of a text each. If None, the first that is there of `QUERIES` and of
        `POSITIVES`, whatever the case.
      negatives: a field of a text or a list of texts, or several such fields.
      scores: a field of a list of numbers, the positive's first.
      nway: how many documents to take, the positive and the first negatives. If None, as many as
        the first line has.
      progress: whether to show a bar while checking; if None, on a terminal.

    Raises:
      ValueError: naming file and line: a line that cannot be read, a missing field or empty text,
        fewer documents than `nway`, another number of scores than documents, a score that is not
        finite; and fields that have none of the known names.
      ImportError: parquet, and pyarrow is not installed.

    Warns, naming file and line, of a positive that is a negative of its example too.
    """
    names = _Wanted(query, positive, _names(negatives), scores)
    if unpacked_suffix(Path(path)) in TABLES:
        table = _Table(Path(path), names)
        columns, where, fingerprint = table.columns, table.where, table.fingerprint
        count = number = len(table.rows)

        def read(i: int) -> Mapping[str, Any]:
            return table.rows[i]
    else:
        lines = Lines(path)
        columns, parse = _of_lines(lines, names)
        where, fingerprint = lines.where, lines.fingerprint
        count, number = len(lines), _number_to_check(lines, check)

        def read(i: int) -> Mapping[str, Any]:
            return lines.read(i, parse)

    source = _Records(count, read, where, columns, fingerprint, nway)
    _check(source, number, progress)
    return source


def dataset_examples(
    dataset: Any,
    *,
    query: str | None = None,
    positive: str | None = None,
    negatives: str | Sequence[str] | None = None,
    documents: str | Sequence[str] | None = None,
    scores: str | None = None,
    nway: int | None = None,
    split: str = "train",
    check: Check = CHECK,
    progress: bool | None = None,
    **load: Any,
) -> ExampleSource:
    """Read a Hugging Face data set by column names.

    The first 10,000 rows are checked here (`check`), the others when they are read.

    Args:
      dataset: a `datasets.Dataset` or `DatasetDict`, the folder of one (`save_to_disk`), or what
        `datasets.load_dataset` takes.
      query: column of texts. If None, it and `positive` are found as in `pair_examples`.
      positive, negatives: see `pair_examples`.
      documents: instead of these two, a column of lists of texts, or several columns; the positive
        comes first.
      scores: column of lists of numbers, one a document.
      nway: how many documents to take. If None, as many as the first row has.
      split: of a name, a folder or a `DatasetDict`.
      progress: whether to show a bar while checking; if None, on a terminal.
      load: passed to `load_dataset` (`name`, `revision`, ...).

    Raises:
      ImportError: `datasets` is not installed.
      ValueError: a column that is not there, streamed data, and what `pair_examples` raises.
    """
    nothing = query is not None and documents is None and positive is None
    if nothing or (documents is not None and (positive is not None or negatives)):
        raise ValueError(
            "name either the column of `documents` (the positive first in each list) or those of "
            "`positive` and `negatives`"
        )
    table, name = _open_dataset(dataset, split, load)
    wanted = _Wanted(query, positive, _names(negatives), scores)
    columns = wanted.found(table.column_names, name, _names(documents))
    missing = [column for column in columns.all() if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{name}: no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, table.column_names))}"
        )
    if not len(table):
        raise ValueError(f"{name}: the data set is empty")
    table = table.with_format(None).select_columns(columns.all())
    ends = json.dumps([table[0], table[len(table) - 1]], default=str)
    source = _Records(
        len(table),
        lambda i: table[int(i)],
        lambda i: f"{name}, row {i}",
        columns,
        f"{len(table)}:{hashlib.sha256(ends.encode()).hexdigest()}",
        nway,
    )
    _check(source, min(len(table), check.first), progress)
    return source


def concatenate(sources: Sequence[ExampleSource]) -> ExampleSource:
    """Join sources into one, with the examples of one after those of the other.

    Raises:
      ValueError: no source; another number of documents, or scores in some only.
    """
    if not sources:
        raise ValueError("no source to concatenate")
    for name, hint in (("nway", "give each the same `nway`"), ("scored", "leave scores out")):
        values = [getattr(source, name) for source in sources]
        if len(set(values)) > 1:
            raise ValueError(f"sources of one run need the same {name}, got {values}: {hint}")
    return _Concatenated(sources)


def subset(source: ExampleSource, numbers: np.ndarray) -> ExampleSource:
    """Some of a source's examples, in the order of their numbers; the positives of a query are
    those of the whole source.

    Args:
      numbers: int64[N].

    Raises:
      ValueError: no number.
    """
    if not len(numbers):
        raise ValueError("no example is left to train on")
    return _Subset(source, np.asarray(numbers, np.int64))


class _Labelled:
    """What sources share: the positives of their queries, as far as they were checked.

    A source has `positive(i)`, the text of example i's positive.
    """

    positive: Callable[[int], str]

    def __init__(self) -> None:
        self.labels = _Labels()

    @property
    def most_positives(self) -> int:
        return self.labels.most

    def positives(self, query: str) -> tuple[str, ...]:
        return tuple(map(self.positive, self.labels.examples(hash(query))))


class _StanfordExamples(_Labelled):
    """Lines of ids over two tables of texts."""

    def __init__(
        self, lines: Lines, queries: Texts, passages: Texts, nway: int | None, scores: bool
    ):
        super().__init__()
        self._lines, self._queries, self._passages = lines, queries, passages
        self._short = passages.line_bytes() < _SHORT
        self.repeats = _Repeats(lines.where)
        self._ignore_scores = not scores
        self._parse = _json_ids if lines[0].lstrip().startswith(("[", "{")) else _tsv_ids
        _, *first = lines.read(0, self._parse)
        self.scored = scores and any(isinstance(item, list) for item in first)
        self.nway = _checked_nway(nway, lambda: len(first))
        content = (texts.fingerprint for texts in (lines, queries, passages))
        self.fingerprint = _digest(*content, self.nway, self.scored)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Example:
        i = range(len(self))[i]
        query, passages, scores = self._lines.read(i, self._rows)
        try:
            texts = tuple(map(self._passages.text, passages))
            example = Example(self._queries.text(query), texts, scores)
        except ValueError as error:
            raise ValueError(f"{self._lines.where(i)}: {error}") from None
        # A teacher has scored its passages: one that is there under two ids does no harm.
        self.repeats.read(i, passages if self.scored else texts)
        return example

    def positive(self, i: int) -> str:
        return self._passages.text(self._lines.read(i, self._rows)[1][0])

    def check(self, i: int) -> None:
        """Read example i, and its texts that may be empty."""
        query, passages, _ = self._lines.read(i, self._rows)
        try:
            text = self._queries.text(query)
            self.labels.add(hash(text), hash((self._passages.fingerprint, passages[0])), i)
            self.repeats.check(i, passages)
            rows = np.array(passages)
            for row in rows[self._short[rows]]:
                self._passages.text(int(row))
                self._short[row] = False
        except ValueError as error:
            raise ValueError(f"{self._lines.where(i)}: {error}") from None

    def _rows(self, line: str) -> tuple[int, list[int], tuple[float, ...] | None]:
        """Rows of the query and the passages, and the scores."""
        qid, *items = self._parse(line)
        if len(items) < self.nway:
            raise ValueError(
                f"{len(items)} passages, but nway is {self.nway}: lower nway or take the line out"
            )
        items = items[: self.nway]
        scores = None
        if self.scored:
            items, scores = _scored(items)
        elif any(isinstance(item, list) for item in items):
            if not self._ignore_scores:
                raise ValueError(
                    "scores here, but none on the first line: score every line or pass scores=False"
                )
            items = [item[0] if isinstance(item, list) and item else item for item in items]
        return self._queries.rows([qid])[0], self._passages.rows(items), scores


def _json_ids(line: str) -> list[Any]:
    items = json_value(line)
    if not isinstance(items, list) or len(items) < 2:
        raise ValueError(
            f"expected [qid, pid, ...] or [qid, [pid, score], ...], got {line[:80]!r}; "
            "JSON objects with texts are for pair_examples"
        )
    return items


def _tsv_ids(line: str) -> list[Any]:
    items = line.split("\t")
    if len(items) < 2:
        raise ValueError(
            "expected JSON, [qid, pid, ...], or qid, positive and negative pid with tabs between, "
            f"got {line[:80]!r}"
        )
    return items


def _tsv_record(line: str) -> dict[str, Any]:
    query, *documents = line.split("\t")
    if not documents:
        raise ValueError(f"expected query, positive, ... with tabs between, got {line[:80]!r}")
    return {"query": query, "documents": documents}


def _scored(items: list[Any]) -> tuple[list[Any], tuple[float, ...]]:
    """pids and scores of [pid, score] pairs."""
    for place, item in enumerate(items, 1):
        if type(item) is not list or len(item) < 2:
            raise ValueError(
                f"passage {place}, {short_json(item, 80)}, has no score: write [pid, score], or "
                "pass scores=False to train without"
            )
        if len(item) > 2:
            raise ValueError(f"passage {place}: expected [pid, score], got {short_json(item, 80)}")
    pids, scores = zip(*items, strict=True)
    return list(pids), _finite(scores)


def _finite(scores: Sequence[Any]) -> tuple[float, ...]:
    for place, score in enumerate(scores, 1):
        number = type(score) is float or type(score) is int
        if not number or not -_LARGEST_SCORE <= score <= _LARGEST_SCORE:
            raise ValueError(
                f"the score of document {place} is {score!r:.40}, not a finite number: score the "
                "example again or take it out"
            )
    return tuple(map(float, scores))


class _Columns(NamedTuple):
    """Names of fields. positive: of a text; documents: of texts or lists of them, which follow."""

    query: str
    positive: str | None
    documents: tuple[str, ...]
    scores: str | None

    def all(self) -> list[str]:
        names = (self.query, self.positive, *self.documents, self.scores)
        return list(dict.fromkeys(name for name in names if name is not None))

    def example(self, record: Mapping[str, Any], nway: int | None) -> Example:
        """A record's example with `nway` documents or all. Raises ValueError, without the place."""
        documents = []
        if self.positive is not None:
            documents.append((self.positive, _field(record, self.positive)))
        for name in self.documents:
            value = _field(record, name)
            values = value if isinstance(value, (list, tuple)) else [value]
            documents += [(name, item) for item in values]
        scores = None if self.scores is None else _field(record, self.scores)
        if self.scores is not None:
            if not isinstance(scores, (list, tuple)):
                raise ValueError(
                    f"field {self.scores!r} must be a list of scores, got {scores!r:.80}"
                )
            if len(scores) != len(documents):
                raise ValueError(
                    f"{len(scores)} scores for {len(documents)} documents: give each one"
                )
            scores = _finite(scores[:nway])
        if len(documents) < (nway or 1):
            raise ValueError(
                f"{len(documents)} documents, but nway is {nway or 'at least 1'}: lower nway or "
                "take the example out"
            )
        return Example(
            _text(_field(record, self.query), self.query),
            tuple(_text(item, name) for name, item in documents[:nway]),
            scores,
        )


class _Wanted(NamedTuple):
    """Names of fields as they were asked for; None is looked for by `QUERIES`, `POSITIVES`."""

    query: str | None
    positive: str | None
    negatives: tuple[str, ...]
    scores: str | None

    def found(self, there: Sequence[str], where: str, documents: tuple[str, ...] = ()) -> _Columns:
        """The columns among those that are there; says what is taken.

        Args:
          where: the place, for messages.
          documents: columns of all documents, in place of a positive and negatives.

        Raises ValueError where a name is to be found, and none is known.
        """
        low = {name.lower(): name for name in reversed(there)}
        query = self.query or next((low[n] for n in QUERIES if n in low), None)
        positive = None if documents else self.positive
        if positive is None and not documents:
            positive = next((low[n] for n in POSITIVES if n in low and low[n] != query), None)
        unknown = {} if query else {"query": "the query"}
        if not (positive or documents):
            unknown["positive"] = "the document that answers it"
        if unknown:
            raise ValueError(
                f"{where}: no field {' and no field '.join(map(repr, unknown))}, it has "
                f"{', '.join(map(repr, there))[:200] or 'none'}: name the one with "
                + " and the one with ".join(f"{what} ({name}=)" for name, what in unknown.items())
            )
        assert query is not None
        columns = _Columns(query, positive, self.negatives + documents, self.scores)
        left = [name for name in there if name not in columns.all()]
        taken = "" if positive is None else f", the document {positive!r}"
        taken += f", further documents {', '.join(columns.documents)}" if columns.documents else ""
        unread = f"; not read: {', '.join(left)[:200]}" if left else ""
        LOGGER.info("%s: the query is %r%s%s", where, query, taken, unread)
        return columns


def _of_lines(lines: Lines, names: _Wanted) -> tuple[_Columns, Callable[[str], dict[str, Any]]]:
    """The columns of JSONL or of a TSV, and how a line becomes a record. A header is left out."""
    where = str(lines.path)
    if unpacked_suffix(lines.path) != ".tsv":
        return names.found(list(lines.read(0, json_object)), lines.where(0)), json_object
    header = [cell.strip() for cell in lines[0].split("\t")]
    low = {cell.lower() for cell in header}
    asked = [name for name in (names.query, names.positive, *names.negatives) if name is not None]
    if not (set(asked) & set(header) or (low & set(QUERIES) and low & set(POSITIVES))):
        if names.query is not None or names.positive is not None:
            raise ValueError(
                f"{lines.where(0)}: no header with {', '.join(map(repr, asked))}: there is "
                f"{lines[0][:80]!r}. Without a header leave the names out: query, positive and "
                "negatives come in this order"
            )
        LOGGER.info("%s: no header; query, document, further documents with tabs between", where)
        return _Columns("query", None, ("documents",), None), _tsv_record
    lines.drop_first()

    def parse(line: str) -> dict[str, Any]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"{len(cells)} fields with tabs between, and the header has {len(header)}"
            )
        return dict(zip(header, cells, strict=True))

    return names.found(header, where), parse


class _Table:
    """The columns of CSV or parquet that are asked for, in memory."""

    def __init__(self, path: Path, names: _Wanted):
        self.rows: list[dict[str, Any]] = []
        self._places: list[str] = []
        content = hashlib.sha256()
        columns = None
        for where, record in read_records(path):
            if columns is None:
                columns = names.found(list(record), str(path))
            row = {name: record[name] for name in columns.all() if name in record}
            content.update(json.dumps(row, default=str).encode())
            self.rows.append(row)
            self._places.append(where)
        if columns is None:
            raise ValueError(f"{path}: the file is empty")
        self.columns, self.fingerprint = columns, f"{len(self.rows)}:{content.hexdigest()}"

    def where(self, i: int) -> str:
        return self._places[i]


class _Records(_Labelled):
    """Examples from records with named fields."""

    def __init__(
        self,
        count: int,
        read: Callable[[int], Mapping[str, Any]],
        where: Callable[[int], str],
        columns: _Columns,
        fingerprint: str,
        nway: int | None,
    ):
        super().__init__()
        self._count, self._read, self._where, self._columns = count, read, where, columns
        self.scored, self.repeats = columns.scores is not None, _Repeats(where)
        self.nway = _checked_nway(nway, lambda: len(self._example(0, None).documents))
        self.fingerprint = _digest(fingerprint, columns, self.nway)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Example:
        i = range(self._count)[i]
        example = self._example(i, self.nway)
        self.repeats.read(i, example.documents)
        return example

    def positive(self, i: int) -> str:
        return self._example(i, 1).documents[0]

    def check(self, i: int) -> None:
        """Read example i."""
        query, documents, _ = self._example(i, self.nway)
        self.labels.add(hash(query), hash(documents[0]), i)
        self.repeats.check(i, documents)

    def _example(self, i: int, nway: int | None) -> Example:
        record = self._read(i)
        try:
            return self._columns.example(record, nway)
        except ValueError as error:
            raise ValueError(f"{self._where(i)}: {error}") from None


class _Concatenated(_Labelled):
    def __init__(self, sources: Sequence[ExampleSource]):
        super().__init__()
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        self.nway, self.scored = sources[0].nway, sources[0].scored
        self.fingerprint = _digest(*(source.fingerprint for source in sources))
        for source, end in zip(sources, self._ends, strict=True):
            if hasattr(source, "labels"):
                self.labels.take(source.labels, end - len(source))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        source, place = self._at(range(len(self))[i])
        return source[place]

    def positive(self, i: int) -> str:
        source, place = self._at(i)
        return source.positive(place)

    def _at(self, i: int) -> tuple[Any, int]:
        """The source of an example, and its position there."""
        part = bisect.bisect_right(self._ends, i)
        return self._sources[part], i - (self._ends[part - 1] if part else 0)


class _Subset:
    def __init__(self, source: ExampleSource, numbers: np.ndarray):
        self._source, self._numbers = source, numbers
        self.nway, self.scored = source.nway, source.scored
        self.most_positives = most_positives(source)
        content = hashlib.sha256(numbers.tobytes()).hexdigest()
        self.fingerprint = _digest(source.fingerprint, content)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Example:
        return self._source[int(self._numbers[i])]

    def positives(self, query: str) -> tuple[str, ...]:
        return positives_of(self._source, query)


class _Labels:
    """Which examples have which positive of which query, as far as they were checked.

    Queries and positives are 64-bit hashes; of examples with the same two only the first counts.
    """

    def __init__(self) -> None:
        self._new = array("q")
        self._rows = np.empty((0, 3), np.int64)  # query, positive, example; sorted
        self._most = 1

    def add(self, query: int, positive: int, example: int) -> None:
        self._new.extend((query, positive, example))
        if len(self._new) >= _PACK:
            self._pack()

    def take(self, other: _Labels, first: int) -> None:
        """Add those of another source, whose example 0 is number `first` here."""
        other._pack()
        self._pack()
        self._rows = np.concatenate([self._rows, other._rows + [0, 0, first]])
        self._sort()

    @property
    def most(self) -> int:
        """The largest number of `examples` of a query, at least 1."""
        self._pack()
        return self._most

    def examples(self, query: int) -> list[int]:
        """Where the query has several positives: the first example with each of them, the first
        `_MOST_POSITIVES` of these."""
        self._pack()
        column = self._rows[:, 0]
        first, last = np.searchsorted(column, query), np.searchsorted(column, query, "right")
        if last - first < 2:
            return []
        return sorted(self._rows[first:last, 2].tolist())[:_MOST_POSITIVES]

    def _pack(self) -> None:
        if not self._new:
            return
        added = np.frombuffer(self._new, np.int64).reshape(-1, 3)
        self._rows = np.concatenate([self._rows, added])
        self._new = array("q")
        self._sort()

    def _sort(self) -> None:
        rows = self._rows[np.lexsort(self._rows.T[::-1])]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
        self._rows = rows[is_new]
        _, counts = np.unique(self._rows[:, 0], return_counts=True)
        self._most = min(int(counts.max(initial=1)), _MOST_POSITIVES)


class _Repeats:
    """Names the examples whose positive is among their negatives too."""

    def __init__(self, where: Callable[[int], str]):
        self._where = where
        self._named: set[int] = set()
        self._first, self._last = "", False

    def check(self, i: int, documents: Sequence[Any]) -> None:
        """Note it of example i."""
        if documents[0] in documents[1:]:
            self._first = self._first or self._text(i, documents)
            self._named.add(i)

    def say(self) -> None:
        """Warn of what was noted; called by a reader of examples that a user calls."""
        others = len(self._named) - 1
        if others >= 0:
            more = f" So it is in {others} more of the examples." if others else ""
            warnings.warn(self._first + more, stacklevel=4)

    def read(self, i: int, documents: Sequence[Any]) -> None:
        """Warn of it once more, for the first example of which it was not known."""
        if not self._last and documents[0] in documents[1:] and i not in self._named:
            self._last = True
            warnings.warn(f"{self._text(i, documents)} Later ones are not named.", stacklevel=3)

    def _text(self, i: int, documents: Sequence[Any]) -> str:
        return (
            f"{self._where(i)}: negative {documents.index(documents[0], 1)} is the positive again: "
            "contrast leaves it out, so take it out of the example or put another in its place."
        )


def _open_dataset(dataset: Any, split: str, load: dict[str, Any]) -> tuple[Any, str]:
    """The `datasets.Dataset`, and a name for errors."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data sets need `datasets`: {_INSTALL}") from error
    name = "the data set"
    if isinstance(dataset, (str, os.PathLike)):
        name, folder = str(dataset), Path(dataset)
        if present(folder / "dataset_dict.json") or present(folder / "state.json"):
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, split=split, **load)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{name}: no split {split!r}, it has {', '.join(dataset) or 'none'}")
        dataset = dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}: streamed data can "
            "be neither shuffled nor resumed, so load it without streaming=True"
        )
    return dataset, name


def _check(source: _StanfordExamples | _Records, count: int, progress: bool | None) -> None:
    """Read the first `count` examples."""
    with progress_bar(count, "checking examples", "line", progress) as bar:
        for i in range(count):
            source.check(i)
            bar.update(1)
    source.repeats.say()


def _number_to_check(lines: Lines, check: Check) -> int:
    return len(lines) if lines.num_bytes <= check.whole else min(len(lines), check.first)


def _checked_nway(nway: int | None, count_first: Callable[[], int]) -> int:
    if nway is None:
        return count_first()
    if nway < 1:
        raise ValueError(f"nway must be at least 1, got {nway}")
    return nway


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(
            f"no field {name!r}, it has {', '.join(map(repr, record))[:200] or 'none'}"
        )
    return record[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must hold texts, got {value!r:.80}")
    return checked_text(value, f"field {name!r}")


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
