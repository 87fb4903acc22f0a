"""Readers of the field's files. Each streams, and names file and line of what it can't read.

Collections: TSV `pid, text[, title]` (Stanford ColBERT; a title is joined as "title | text") or
`id, url, title, body` (MS MARCO's documents), JSONL with an id and a text (BEIR's `_id`, `title`,
`text` among others), or plain text, a passage a line. Queries: TSV `qid, text`, JSONL, or TREC's
topics. A TSV's first line may name its columns, in any order; that of CSV must. Parquet has the
same names. Where names are others, `columns=` says which column is what. Any file but parquet may
be packed, its name then ending in .gz or .zst.

No column is dropped but the URL of a TSV without a header: a tab inside a text is an error, not its
end. What a JSON object has beyond id, text and title, and the URL that a header names, are fields
of the document (`read_documents`).
"""

from __future__ import annotations

import html
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from colbert_jax.data.streams import numbered_lines, unpacked_suffix
from colbert_jax.data.tables import (
    TABLES,
    Columns,
    check_columns,
    pick,
    read_records,
)

_ID_KEYS = (
    *("_id", "id", "pid", "docid", "doc_id", "docno", "document_id", "passage_id", "corpus_id"),
)
_TEXT_KEYS = ("text", "contents", "passage", "body", "content", "document")
_QUERY_IDS = ("qid", "_id", "id", "query_id", "question_id", "topic_id")
_QUERY_TEXTS = ("question", "text", "query")
_ANSWERS = "answer_pids"  # LoTTE's
_GAINS = ("score", "relevance", "gain", "label", "rel", "rating")
_TOPIC_TEXTS = ("title", "query", "question", "text")
_TOPICS = re.compile(r"<(\?xml|!--|top\b|topics?\b)", re.I)
_RECORDS = (".csv", ".parquet", ".jsonl", ".json", ".ndjson")
_TITLE, _URL, _METADATA = "title", "url", "metadata"
_DOCUMENT_KEYS = {*_ID_KEYS, *_TEXT_KEYS, _TITLE}
_SUFFIXES = (".tsv", ".jsonl", ".txt", "")
_GAIN = re.compile(r"[+-]?[0-9]{1,9}")
_WHOLE = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")


class TsvColumns(NamedTuple):
    """Which field of a TSV's line is what.

    names: of the fields, from the left. id, text, title: their places; title None where there is
    none. needed: how many fields a line has at least.
    """

    names: tuple[str, ...]
    id: int
    text: int
    title: int | None
    needed: int

    def parse(self, line: str) -> tuple[str, str]:
        """Id and text of a line. Raises ValueError, without the place."""
        fields = self._split(line)
        return fields[self.id], self._text(fields)

    def parse_all(self, line: str) -> tuple[str, str, dict[str, str]]:
        """Id, text and the document's fields. Raises ValueError, without the place."""
        fields, used = self._split(line), (self.id, self.text, self.title)
        named = zip(self.names, fields, strict=False)
        more = {name: field for i, (name, field) in enumerate(named) if i not in used and field}
        return fields[self.id], self._text(fields), more

    def _text(self, fields: list[str]) -> str:
        title = "" if self.title is None or self.title >= len(fields) else fields[self.title]
        return _join(title, fields[self.text])

    def _split(self, line: str) -> list[str]:
        fields = line.split("\t")
        count, most = len(fields), len(self.names)
        if tuple(fields) == self.names:
            raise ValueError("a header below the first line: take it out")
        if count < self.needed:
            needed = "<TAB>".join(self.names[: self.needed])
            raise ValueError(f"expected '{needed}', got {line[:80]!r}")
        if count > most and any(map(str.strip, fields[most:])):
            raise ValueError(
                f"{count} fields, expected {self._expected()}: put a space for a tab inside a "
                "text, or name the columns on the first line, as in 'id<TAB>title<TAB>text'"
            )
        if not fields[self.id].strip():
            raise ValueError(f"the id is empty: {line[:80]!r}")
        return fields

    def _expected(self) -> str:
        more = "".join(f"[, {name}]" for name in self.names[self.needed :])
        return ", ".join(self.names[: self.needed]) + more


class Layout(NamedTuple):
    """How a file is read.

    parse: gives id and text of a line; raises ValueError, without the place. None where the line is
      the text and its number the id.
    tabbed: the id comes first on the line, then a tab. header: the first line names the columns.
    parse_all: gives the document's fields too; None where it has none.
    """

    parse: Callable[[str], tuple[str, str]] | None
    tabbed: bool = False
    header: bool = False
    parse_all: Callable[[str], tuple[str, str, dict[str, Any]]] | None = None


class Kind(NamedTuple):
    """What a file holds: its word in errors, the names of its columns, how they lie unnamed."""

    word: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    columns: TsvColumns


PASSAGES = Kind(
    "document", _ID_KEYS, _TEXT_KEYS, TsvColumns(("pid", "text", _TITLE), 0, 1, title=2, needed=2)
)
QUERIES = Kind("query", _QUERY_IDS, _QUERY_TEXTS, TsvColumns(("qid", "text"), 0, 1, None, 2))
_DOCUMENTS = TsvColumns(("docid", _URL, _TITLE, "body"), 0, 3, title=2, needed=4)  # MS MARCO's


def columns_of(first: str, kind: Kind) -> tuple[TsvColumns, bool]:
    """The columns of a TSV by its first line, and whether that line is a header.

    Raises ValueError, without the place, for a line that may be a header and may be none.
    """
    fields = [field.strip() for field in first.split("\t")]
    names = [_column_name(field) for field in fields]
    ids = [at for at, name in enumerate(names) if name in kind.ids]
    texts = [at for at, name in enumerate(names) if name in kind.texts]
    titles = [at for at, name in enumerate(names) if name == _TITLE and kind is PASSAGES]
    known = len(ids) + len(texts) + len(titles) + names.count(_URL)
    if len(ids) == len(texts) == 1 and len(titles) <= 1 and known == len(fields):
        if '"' not in first:
            title = titles[0] if titles else None
            needed = max(ids[0], texts[0]) + 1
            return TsvColumns(tuple(fields), ids[0], texts[0], title, needed), True
    elif len(fields) == 1 or not (
        0 in ids or (ids and texts) or (any(texts) and not any(map(str.isdigit, fields[0])))
    ):
        is_url = len(fields) == 4 and re.fullmatch(r"https?://\S+", fields[1])
        return (_DOCUMENTS if is_url and kind is PASSAGES else kind.columns), False
    raise ValueError(
        f"this looks like a header with the columns {', '.join(fields)[:80]}, but a header names, "
        f"without quotes, one id ({', '.join(kind.ids)}), one text ({', '.join(kind.texts)})"
        + (", perhaps a title, perhaps a url" if kind is PASSAGES else "")
        + f", and nothing else: rename or cut the columns; if it is a {kind.word}, put the header "
        f"'{kind.columns.names[0]}<TAB>text' above it"
    )


def _column_name(field: str) -> str:
    return re.sub(r"[-\s]+", "_", field.strip(' "').lower())


def read_collection(source: Any, *, columns: Columns | None = None) -> Iterator[tuple[str, str]]:
    """Yield (pid, text) of every passage. A file's name tells the format: .tsv, .jsonl, .csv,
    .parquet, or text.

    Passages of plain text are numbered from 0; a blank line is no passage and takes no number.

    Args:
      source: a file, or a `datasets.Dataset`.
      columns: see `read_documents`.

    Raises:
      ValueError: a line that can't be read, with its number; an empty collection.
    """
    return (document[:2] for document in _read_documents(source, columns, False))


def read_documents(
    source: Any, *, columns: Columns | None = None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (pid, text, fields) of every passage; else as `read_collection`.

    Fields are all that a JSON object, or a row of a table, has beside id, text and title, as it has
    them, and a column that a TSV's header names beside these.

    Args:
      columns: which column is the id, which the text, which, if any, the title, for columns of
        other names: `{"id": "docid", "text": "body"}`; or their places from 0, in CSV and TSV
        without a header. Fields then are the columns left, and those named here, by our names.
    """
    return _read_documents(source, columns, True)


def _read_documents(
    source: Any, columns: Columns | None, with_fields: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    is_file = isinstance(source, str | Path)
    if columns is None and is_file and passage_suffix(Path(source), TABLES) not in TABLES:
        yield from _document_lines(Path(source), with_fields)
        return
    parse, count = _record_parser(columns, PASSAGES), 0
    for where, record in read_records(source, header=check_columns(columns or {})):
        try:
            pid, text, fields = parse(record)
            _check_unicode(pid, text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield pid, text, fields if with_fields else {}
        count += 1
    if not count:
        raise ValueError(f"{source if is_file else 'the data set'}: the collection is empty")


def _record_parser(
    columns: Columns | None, kind: Kind
) -> Callable[[dict[Any, Any]], tuple[str, str, dict[str, Any]]]:
    """Gives id, text and fields of a record; raises ValueError, without the place."""
    if columns is None:
        if kind is QUERIES:
            return _parse_query
        return _parse_row
    missing = {"id", "text"} - columns.keys()
    if missing:
        raise ValueError(f"columns {dict(columns)}: say which column is {' and '.join(missing)}")

    def parse(record: dict[Any, Any]) -> tuple[str, str, dict[str, Any]]:
        named = pick(record, columns, ("id", "text", _TITLE))
        used = set(columns.values())
        left = {f"column {k}" if isinstance(k, int) else k: record[k] for k in record.keys() - used}
        more = {name: named[name] for name in named if name not in ("id", "text", _TITLE)}
        text, title = named["text"], named.get(_TITLE)
        if not isinstance(text, str):
            raise ValueError(f"the text must be a string, got {text!r:.60}")
        return as_id(named["id"]), _join(str(title or ""), text), left | more

    return parse


def _parse_row(row: dict[Any, Any]) -> tuple[str, str, dict[str, Any]]:
    """Id, text and fields of a table's row, whose columns may be spelt `corpus-id`."""
    plain = {name: _column_name(str(name)) for name in row}
    record = {plain[n] if plain[n] in _DOCUMENT_KEYS else n: value for n, value in row.items()}
    return *_parse_json(record), record_fields(record)


def _document_lines(path: Path, with_fields: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    suffix, layout, warned, count = passage_suffix(path), None, False, 0
    for number, line in numbered_lines(path):
        try:
            if layout is None:
                layout = passage_layout(suffix, line)
                if layout.header:
                    continue
            parse = layout.parse
            fields: dict[str, Any] = {}
            if parse is None:
                pid, text = str(count), line
            elif with_fields and layout.parse_all is not None:
                pid, text, fields = layout.parse_all(line)
            else:
                pid, text = parse(line)
            _check_unicode(pid, text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if parse is None and number != count + 1 and not warned:
            warned = True
            warn_of_gap(path)
        yield pid, text, fields
        count += 1
    if not count:
        raise ValueError(f"{path}: the collection is empty")


def passage_suffix(path: Path, more: tuple[str, ...] = ()) -> str:
    """The end of a collection's name, which tells its format.

    Args:
      more: ends beside those of files of lines.

    Raises:
      ValueError: it does not.
    """
    suffix, known = unpacked_suffix(path), (*_SUFFIXES, *more)
    if suffix not in known:
        raise ValueError(
            f"{path}: a collection's name ends in one of {', '.join(filter(None, known))}"
        )
    return suffix


def passage_layout(suffix: str, first: str) -> Layout:
    """How a collection is read, by the end of its name and its first line.

    Raises ValueError, without the place, for a line that contradicts the name.
    """
    if suffix == ".jsonl":
        return Layout(parse_json, parse_all=parse_json_document)
    if suffix == ".tsv":
        return _tsv_layout(first, PASSAGES)
    if not suffix and ("\t" in first or first.lstrip().startswith("{")):
        raise ValueError(
            "the file's name tells no format, and this is not plain text: give the file a name "
            "that ends in .tsv or .jsonl, or in .txt if every line is a document"
        )
    return Layout(None)


def warn_of_gap(path: Path) -> None:
    """Say that positions in a file of plain text are not its lines' numbers."""
    warnings.warn(
        f"{path}: has blank lines, which are no documents: a document's id is its number among "
        "the documents, from 0, and not that of its line",
        stacklevel=3,
    )


def query_layout(first: str) -> Layout:
    """How a file of queries is read, by its first line. Raises ValueError, without the place."""
    if first.lstrip().startswith("{"):
        return Layout(parse_json_query)
    return _tsv_layout(first, QUERIES)


def _tsv_layout(first: str, kind: Kind) -> Layout:
    columns, header = columns_of(first, kind)
    parse_all = columns.parse_all if header else None
    return Layout(columns.parse, tabbed=columns.id == 0, header=header, parse_all=parse_all)


def read_queries(
    source: Any, *, columns: Columns | None = None, notes: list[str] | None = None
) -> dict[str, str]:
    """Read queries by id from a TSV of `qid, text`, JSONL, CSV or parquet with an id and a text, or
    TREC's topics.

    Args:
      source: a file, or a `datasets.Dataset`.
      columns: which column is the id and which the text, see `read_documents`. Of topics, which
        field is the text: `{"text": "desc"}`; by default the title, or else the query.
      notes: gets a line for columns that are not read.

    Raises:
      ValueError: a line that can't be read, an empty query, an id twice, an empty file.
    """
    queries: dict[str, str] = {}
    unread: dict[str, None] = {}
    place = source if isinstance(source, str | Path) else "the data set"
    for where, parse in _query_sources(source, columns):
        try:
            qid, text, fields = parse()
            if not text.strip():
                raise ValueError(f"expected 'qid<TAB>text', but query {qid!r:.80} is empty")
            _check_unicode(qid, text)
            if qid in queries:
                raise ValueError(f"query id {qid!r:.80} appears twice")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        queries[qid] = text
        unread |= dict.fromkeys(name for name, value in fields.items() if value not in (None, ""))
    if not queries:
        raise ValueError(f"{place}: no queries")
    if unread and notes is not None:
        notes.append(f"{place}: of queries only id and text are used, not {', '.join(unread)}")
    return queries


_ParsedQuery = tuple[str, str, Mapping[str, Any]]


def _query_sources(
    source: Any, columns: Columns | None
) -> Iterator[tuple[str, Callable[[], _ParsedQuery]]]:
    """Where each query is, and what gives its id, text and other fields."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and unpacked_suffix(path) not in (".parquet", ".jsonl"):
        # Read once, for it may be a pipe.
        lines = numbered_lines(path, blank=True)
        head = list(itertools.islice(lines, 1))
        while head and not head[-1][1].strip() and (more := next(lines, None)):
            head.append(more)
        if head and _TOPICS.match(head[-1][1].lstrip()):
            for where, fields in _topics(path, itertools.chain(head, lines)):
                yield where, partial(_parse_topic, fields, (columns or {}).get("text"))
            return
        if columns is None and unpacked_suffix(path) != ".csv":
            yield from _query_lines(path, itertools.chain(head, lines))
            return
    elif path is not None and columns is None and unpacked_suffix(path) == ".jsonl":
        yield from _query_lines(path, numbered_lines(path))
        return
    parse_record = _record_parser(columns, QUERIES)
    for where, record in read_records(source, header=check_columns(columns or {})):
        yield where, partial(parse_record, record)


def _query_lines(
    path: Path, lines: Iterable[tuple[int, str]]
) -> Iterator[tuple[str, Callable[[], _ParsedQuery]]]:
    layout: Layout | None = None
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if layout is None:
            try:
                layout = query_layout(line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if layout.header:
                continue
        yield where, partial(_parse_query_line, layout, line)


def _parse_query_line(layout: Layout, line: str) -> _ParsedQuery:
    if layout.parse is parse_json_query:
        return _parse_query(json_object(line))
    assert layout.parse is not None
    return *layout.parse(line), {}


def _topics(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each topic begins, and its fields by name. Tags may be left open, as TREC's are."""
    text = "\n".join(line for _, line in lines)
    found = 0
    for match in re.finditer(r"<(top|topic)\b([^>]*)>(.*?)</\1>", text, re.I | re.S):
        found += 1
        _, attributes, body = match.groups()
        where = f"{path}, line {text.count(chr(10), 0, match.start()) + 1}"
        parts = re.findall(r"<([A-Za-z]\w*)[^>]*>([^<]*)", body)
        fields: dict[str, str] = {}
        for name, value in parts:
            plain = html.unescape(re.sub(r"^\s*(Number|Topic|Description|Narrative):", "", value))
            fields.setdefault(name.lower(), " ".join(plain.split()))
        number = re.search(r"""\b(?:number|id|num)\s*=\s*["']?([^"'\s>]+)""", attributes)
        if number is not None:
            fields["num"] = number.group(1)
        yield where, fields
    if not found:
        raise ValueError(
            f"{path}: begins with {text.strip()[:40]!r}, as TREC's topics do, but has no "
            "<top>...</top>"
        )


def _parse_topic(fields: dict[str, str], wanted: str | int | None) -> _ParsedQuery:
    """Number, text and other fields of a topic. Raises ValueError, without the place."""
    number = fields.get("num", fields.get("number"))
    if not number:
        raise ValueError("a topic without a number: expected <num>")
    names = _TOPIC_TEXTS if wanted is None else (str(wanted),)
    name = next((name for name in names if fields.get(name)), None)
    if name is None:
        raise ValueError(
            f"topic {number!r:.60} has no {' or '.join(names)}; it has {', '.join(fields)[:120]}"
        )
    used = ("num", "number", name)
    return number, fields[name], {k: value for k, value in fields.items() if k not in used}


def read_qrels(
    source: Any, *, columns: Columns | None = None, notes: list[str] | None = None
) -> dict[str, dict[str, int]]:
    """Read judgements, qid -> pid -> gain, from lines of `qid 0 pid gain`, tabs or spaces between.

    A header may name the columns; BEIR's `query-id corpus-id score` has three, NanoBEIR's only the
    ids, for gains of 1. JSONL, CSV and parquet have them by the same names, or LoTTE's
    `qid`, `answer_pids`.

    Args:
      source: a file, or a `datasets.Dataset`.
      columns: which column is `query`, which `document`, which, if any, `gain`.
      notes: gets a line for judgements that are there twice.

    Raises:
      ValueError: a line of another form, two gains of one document, an empty file.
    """
    qrels: dict[str, dict[str, int]] = {}
    twice: list[str] = []
    for where, qid, pid, gain in _judgements(source, columns):
        before = qrels.setdefault(qid, {}).get(pid)
        if before not in (None, gain):
            raise ValueError(
                f"{where}: document {pid!r:.80} of query {qid!r:.80} has the gain "
                f"{gain} here and {before} above: keep one of the two"
            )
        if before is not None:
            twice.append(where)
        qrels[qid][pid] = gain
    if not qrels:
        place = source if isinstance(source, str | Path) else "the data set"
        raise ValueError(f"{place}: no judgements")
    if twice and notes is not None:
        notes.append(f"{len(twice)} judgements are there twice with one gain, first at {twice[0]}")
    return qrels


def _judgements(source: Any, columns: Columns | None) -> Iterator[tuple[str, str, str, int]]:
    """Place, query, document and gain of each judgement."""
    is_file = isinstance(source, str | Path)
    if columns is not None or not is_file or unpacked_suffix(Path(source)) in _RECORDS:
        header = check_columns(columns or {})
        for where, record in read_records(source, header=header):
            try:
                rows = _parse_judgements(record, columns)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            for qid, pid, gain in rows:
                yield where, qid, pid, gain
        return
    form: list[str] | None = None
    for number, line in numbered_lines(Path(source)):
        if form is None:
            form, is_header = _qrels_form(line)
            if is_header:
                continue
        tabs = line.count("\t") == len(form) - 1  # then ids may have spaces
        fields = list(map(str.strip, line.split("\t"))) if tabs else line.split()
        where = f"{source}, line {number}"
        if len(form) == 2:  # ids alone
            fields.append("1")
        if len(fields) != max(len(form), 3) or not _GAIN.fullmatch(fields[-1]):
            raise ValueError(f"{where}: expected '{' '.join(form)}', got {line[:80]!r}")
        yield where, fields[0], fields[-2], int(fields[-1])


def _parse_judgements(
    record: dict[Any, Any], columns: Columns | None
) -> list[tuple[str, str, int]]:
    """Query, document and gain of what a row judges. Raises ValueError, without the place."""
    if columns is not None:
        named = pick(record, columns, ("query", "document", "gain"))
        query, document = named.get("query"), named.get("document")
        gain = named.get("gain", 1)
    else:
        plain = {_column_name(str(name)): value for name, value in record.items()}
        query = _first_of(plain, _QUERY_IDS)
        pids = plain.get(_ANSWERS)
        if isinstance(pids, list):
            return [(as_id(query), as_id(pid), 1) for pid in pids]
        document = _first_of(plain, tuple(key for key in _ID_KEYS if key not in _QUERY_IDS))
        gain = plain.get(_first_key(plain, _GAINS) or "", 1)
    if query is None or document is None:
        raise ValueError(
            "expected the ids of a query and a document, and perhaps a gain; there are the columns "
            f"{', '.join(map(str, record))[:200]}: say with columns= which is which"
        )
    number = float(gain) if isinstance(gain, str | float) and _is_number(gain) else gain
    if isinstance(number, bool) or not isinstance(number, int | float) or number % 1:
        raise ValueError(f"a gain must be a whole number, got {gain!r:.40}")
    return [(as_id(query), as_id(document), int(number))]


def _is_number(value: str | float) -> bool:
    return isinstance(value, float) or _WHOLE.fullmatch(value.strip()) is not None


def _qrels_form(first: str) -> tuple[list[str], bool]:
    """The names of the columns, and whether the first line gives them."""
    names = first.split()
    plain = list(map(_column_name, names))
    if len(names) in (3, 4) and plain[0] in _QUERY_IDS and plain[-2] in _ID_KEYS:
        return names, True
    if len(names) == 2 and plain[0] in _QUERY_IDS and plain[1] in _ID_KEYS:
        return names, True
    return ["qid", "0", "pid", "gain"], False


def parse_json(line: str) -> tuple[str, str]:
    """pid and text of a JSON object. Raises ValueError, without the place."""
    return _parse_json(json_object(line))


def parse_json_document(line: str) -> tuple[str, str, dict[str, Any]]:
    """pid, text and fields of a JSON object. Raises ValueError, without the place."""
    record = json_object(line)
    return *_parse_json(record), record_fields(record)


def _parse_json(record: dict[str, Any]) -> tuple[str, str]:
    pid, text = parse_record(record)
    if pid is None:
        raise _incomplete(record, PASSAGES)
    return pid, text


def parse_json_query(line: str) -> tuple[str, str]:
    """Id and text of a query, a JSON object. Raises ValueError, without the place."""
    return _parse_query(json_object(line))[:2]


def _parse_query(record: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Id, text and other fields of a query. Raises ValueError, without the place."""
    keys = {_column_name(str(key)): key for key in record}
    names = _first_key(keys, _QUERY_IDS), _first_key(keys, _QUERY_TEXTS)
    identity, text = (None if name is None else record[keys[name]] for name in names)
    if identity is None or not isinstance(text, str):
        raise _incomplete(record, QUERIES)
    used = {keys[name] for name in names if name is not None}
    return as_id(identity), text, {k: value for k, value in record.items() if k not in used}


def parse_record(record: Mapping[str, Any]) -> tuple[str | None, str]:
    """Id (None where there is none) and text, with the title before it, of a mapping.

    Raises ValueError, without the place.
    """
    text, title = _first_of(record, _TEXT_KEYS), record.get(_TITLE)
    if not isinstance(text, str):
        raise _incomplete(record, PASSAGES)
    if title is not None and not isinstance(title, str | int | float):
        raise ValueError(f"a title must be a string, got {title!r:.60}")
    identity = _first_of(record, _ID_KEYS)
    return None if identity is None else as_id(identity), _join(str(title or ""), text)


def record_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping has beside the id, text and title that `parse_record` finds.

    What BEIR's `metadata` holds lies beside the other fields. Where two have one name, the one
    inside is `metadata.` and the name.
    """
    used = {_TITLE, *(_first_key(record, keys) for keys in (_ID_KEYS, _TEXT_KEYS))}
    inner = record.get(_METADATA)
    if not isinstance(inner, Mapping):
        return {key: value for key, value in record.items() if key not in used}
    fields = {key: record[key] for key in record if key not in used and key != _METADATA}
    return fields | {f"{_METADATA}.{k}" if k in fields else k: v for k, v in inner.items()}


def as_id(identity: Any) -> str:
    """An id as a string. Raises ValueError for one that is empty, or no id."""
    if isinstance(identity, bool | float | bytes | list | tuple | dict):
        raise ValueError(f"an id must be a string or a whole number, got {identity!r:.60}")
    if not str(identity).strip():
        raise ValueError("the id is empty")
    return str(identity)


def _first_of(record: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    key = _first_key(record, keys)
    return None if key is None else record[key]


def _first_key(record: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in record), None)


def _incomplete(record: Mapping[str, Any], kind: Kind) -> ValueError:
    return ValueError(
        f"expected an id ({', '.join(kind.ids)}) and a text "
        f"({', '.join(kind.texts)}), got the fields {', '.join(map(str, record))[:200] or 'none'}"
    )


def json_object(line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError, without the place."""
    record = json_value(line)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    return record


def json_value(line: str) -> Any:
    """What a line of JSON holds. Raises ValueError, without the place."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _join(title: str, text: str) -> str:
    if not title.strip():
        return text
    return f"{title} | {text}" if text.strip() else title


def _check_unicode(identity: str, text: str) -> None:
    """Raises ValueError for a lone surrogate, which only an escape in JSON can be."""
    for what, string in (("id", identity), ("text", text)):
        if not string.isascii():
            try:
                string.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the {what} is not valid Unicode: character {error.start} is a lone "
                    "surrogate, one half of a \\u escape; write the file anew"
                ) from None
