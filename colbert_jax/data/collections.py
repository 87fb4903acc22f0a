"""Readers of the field's files. Each streams, and names file and line of what it can't read.

Collections: TSV `pid, text[, title]` (Stanford ColBERT; a title is joined as "title | text") or
`id, url, title, body` (MS MARCO's documents), JSONL with an id and a text (BEIR's `_id`, `title`,
`text` among others), or plain text, a passage a line. Queries: TSV `qid, text`, or JSONL. A TSV's
first line may name its columns, in any order. Any file may be gzipped, its name then ending in .gz.

No column is dropped but the URL of a TSV without a header: a tab inside a text is an error, not its
end. What a JSON object has beyond id, text and title, and the URL that a header names, are fields
of the document (`read_documents`).
"""

from __future__ import annotations

import gzip
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_ID_KEYS = (
    *("_id", "id", "pid", "docid", "doc_id", "docno", "document_id", "passage_id", "corpus_id"),
)
_TEXT_KEYS = ("text", "contents", "passage", "body", "content", "document")
_QUERY_IDS = ("qid", "_id", "id", "query_id", "question_id", "topic_id")
_QUERY_TEXTS = ("question", "text", "query")
_TITLE, _URL, _METADATA = "title", "url", "metadata"
_SUFFIXES = (".tsv", ".jsonl", ".txt", "")
_GAIN = re.compile(r"[+-]?[0-9]{1,9}")


class Columns(NamedTuple):
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
    columns: Columns


PASSAGES = Kind(
    "document", _ID_KEYS, _TEXT_KEYS, Columns(("pid", "text", _TITLE), 0, 1, title=2, needed=2)
)
QUERIES = Kind("query", _QUERY_IDS, _QUERY_TEXTS, Columns(("qid", "text"), 0, 1, None, needed=2))
_DOCUMENTS = Columns(("docid", _URL, _TITLE, "body"), 0, 3, title=2, needed=4)  # MS MARCO's


def columns_of(first: str, kind: Kind) -> tuple[Columns, bool]:
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
            return Columns(tuple(fields), ids[0], texts[0], title, max(ids[0], texts[0]) + 1), True
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


def read_collection(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (pid, text) of every passage. The file's name tells the format: .tsv, .jsonl, or text.

    Passages of plain text are numbered from 0; a blank line is no passage and takes no number.

    Raises:
      ValueError: a line that can't be read, with its number; an empty collection.
    """
    return (document[:2] for document in _read_documents(path, False))


def read_documents(path: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (pid, text, fields) of every passage; else as `read_collection`.

    Fields are all that a JSON object has beside id, text and title, as it has them, and a column
    that a TSV's header names beside these.
    """
    return _read_documents(path, True)


def _read_documents(
    path: str | Path, with_fields: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    path = Path(path)
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


def passage_suffix(path: Path) -> str:
    """The end of a collection's name, which tells its format.

    Raises:
      ValueError: it does not.
    """
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: a collection's name ends in one of {', '.join(filter(None, _SUFFIXES))}"
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


def read_queries(path: str | Path) -> dict[str, str]:
    """Read queries by id from a TSV of `qid, text`, or JSONL with an id and a text.

    Raises:
      ValueError: a line that can't be read, an empty query, an id twice, an empty file.
    """
    queries: dict[str, str] = {}
    layout: Layout | None = None
    for number, line in numbered_lines(Path(path)):
        try:
            if layout is None:
                layout = query_layout(line)
                if layout.header:
                    continue
            assert layout.parse is not None
            qid, text = layout.parse(line)
            if not text.strip():
                raise ValueError(f"expected 'qid<TAB>text', but query {qid!r:.80} is empty")
            _check_unicode(qid, text)
            if qid in queries:
                raise ValueError(f"query id {qid!r:.80} appears twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        queries[qid] = text
    if not queries:
        raise ValueError(f"{path}: no queries")
    return queries


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read judgements, qid -> pid -> gain, from lines of `qid 0 pid gain`, tabs or spaces between.

    A header may name the columns; BEIR's `query-id corpus-id score` has three.

    Raises:
      ValueError: a line of another form, two gains of one document, an empty file.
    """
    qrels: dict[str, dict[str, int]] = {}
    form: list[str] | None = None
    for number, line in numbered_lines(Path(path)):
        if form is None:
            form, is_header = _qrels_form(line)
            if is_header:
                continue
        tabs = line.count("\t") == len(form) - 1  # then ids may have spaces
        fields = list(map(str.strip, line.split("\t"))) if tabs else line.split()
        if len(fields) != len(form) or not _GAIN.fullmatch(fields[-1]):
            raise ValueError(
                f"{path}, line {number}: expected '{' '.join(form)}', got {line[:80]!r}"
            )
        qid, pid, gain = fields[0], fields[-2], int(fields[-1])
        before = qrels.setdefault(qid, {}).setdefault(pid, gain)
        if before != gain:
            raise ValueError(
                f"{path}, line {number}: document {pid!r:.80} of query {qid!r:.80} has the gain "
                f"{gain} here and {before} above: keep one of the two"
            )
    if not qrels:
        raise ValueError(f"{path}: no judgements")
    return qrels


def _qrels_form(first: str) -> tuple[list[str], bool]:
    """The names of the columns, and whether the first line gives them."""
    names = first.split()
    plain = list(map(_column_name, names))
    if len(names) in (3, 4) and plain[0] in _QUERY_IDS and plain[-2] in _ID_KEYS:
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
    record = json_object(line)
    identity, text = _first_of(record, _QUERY_IDS), _first_of(record, _QUERY_TEXTS)
    if identity is None or not isinstance(text, str):
        raise _incomplete(record, QUERIES)
    return as_id(identity), text


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


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, strictly UTF-8, with or without a byte-order mark."""
    number = 0
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as stream:
        try:
            for number, raw in enumerate(stream, 1):
                try:
                    line = decode(raw, first=number == 1)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged after line {number}: {error}") from None


def decode(raw: bytes, *, first: bool = False) -> str:
    """A line's text without its end; `first`: without the byte-order mark too.

    Raises:
      ValueError: not UTF-8, a NUL byte, or several lines with the line ends of old Macs; without
        the place.
    """
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {error.start + 1} of the line, "
            f"0x{raw[error.start]:02x}); convert the file, for example with iconv"
        ) from None
    if "\0" in line:
        raise ValueError(
            f"a NUL byte, after {line.partition(chr(0))[0][-40:]!r}: the file is damaged, or "
            "UTF-16; copy it again, or convert it with iconv"
        )
    if "\r" in line:
        raise ValueError(
            f"a carriage return inside the line, after {line.partition(chr(13))[0][-40:]!r}: if it "
            "ends a line, convert the file with tr '\\r' '\\n'; else put a space for it"
        )
    return line
