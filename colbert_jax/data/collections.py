"""Readers of the field's files. Each streams, and names file and line of what it can't read.

Collections: TSV `pid, text[, title]` (Stanford ColBERT; a title is joined as "title | text"), JSONL
with an id and a text (BEIR's `_id`, `title`, `text` among others), or plain text, a passage a line.
Any file may be gzipped, its name then ending in .gz.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_ID_KEYS = ("_id", "id", "pid", "docid", "doc_id")
_TEXT_KEYS = ("text", "contents", "passage", "body")
_HEADERS = ("id", "pid", "docid", "doc_id", "_id")


def read_collection(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (pid, text) of every passage. The file's name tells the format: .tsv, .jsonl, or text.

    Raises:
      ValueError: a line that can't be read, with its number; an empty collection.
    """
    path = Path(path)
    parse = passage_parser(path)
    count = 0
    for number, line in _lines(path):
        if number == 1 and parse is parse_tsv and is_header(line):
            continue
        if parse is None:
            yield str(count), line
        else:
            try:
                passage = parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield passage
        count += 1
    if not count:
        raise ValueError(f"{path}: the collection is empty")


def passage_parser(path: Path) -> Callable[[str], tuple[str, str]] | None:
    """The function that reads (pid, text) from a line of a collection; None where the line is the
    text.

    Raises:
      ValueError: the file's name does not tell the format.
    """
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if suffix not in _PARSERS:
        raise ValueError(
            f"{path}: a collection's name ends in one of {', '.join(filter(None, _PARSERS))}"
        )
    return _PARSERS[suffix]


def read_queries(path: str | Path) -> dict[str, str]:
    """Read queries by id from a TSV of `qid, text`.

    Raises:
      ValueError: a line without a tab, an empty query, an id twice, an empty file.
    """
    queries: dict[str, str] = {}
    for number, line in _lines(Path(path)):
        qid, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(f"{path}, line {number}: expected 'qid<TAB>text', got {line[:80]!r}")
        if qid in queries:
            raise ValueError(f"{path}, line {number}: query id {qid!r} appears twice")
        queries[qid] = text.split("\t")[0]
    if not queries:
        raise ValueError(f"{path}: no queries")
    return queries


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read judgements, qid -> pid -> gain, from lines of `qid 0 pid gain`, tabs or spaces between.

    Raises:
      ValueError: a line of another form, an empty file.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(Path(path)):
        fields = line.split()
        try:
            qid, _, pid, gain = fields
            qrels.setdefault(qid, {})[pid] = int(gain)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected 'qid 0 pid gain', got {line[:80]!r}"
            ) from None
    if not qrels:
        raise ValueError(f"{path}: no judgements")
    return qrels


def is_header(line: str) -> bool:
    """Whether the first line of a TSV collection names its columns."""
    pid, tab, _ = line.partition("\t")
    return bool(tab) and pid.lower() in _HEADERS


def parse_tsv(line: str) -> tuple[str, str]:
    """pid and text of `pid, text[, title]`. Raises ValueError, without the place."""
    fields = line.split("\t", 3)
    if len(fields) < 2:
        raise ValueError(f"expected 'pid<TAB>text', got {line[:80]!r}")
    pid, text, *rest = fields
    return pid, _join(rest[0] if rest else "", text)


def parse_json(line: str) -> tuple[str, str]:
    """pid and text of a JSON object. Raises ValueError, without the place."""
    record = json_object(line)
    pid, text = parse_record(record)
    if pid is None:
        raise _incomplete(record)
    return pid, text


def parse_record(record: Mapping[str, Any]) -> tuple[str | None, str]:
    """Id (None where there is none) and text, with the title before it, of a mapping.

    Raises ValueError, without the place.
    """
    text = next((record[key] for key in _TEXT_KEYS if key in record), None)
    pid = next((record[key] for key in _ID_KEYS if key in record), None)
    if not isinstance(text, str):
        raise _incomplete(record)
    return None if pid is None else str(pid), _join(str(record.get("title") or ""), text)


def _incomplete(record: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"expected an id ({', '.join(_ID_KEYS)}) and a text "
        f"({', '.join(_TEXT_KEYS)}), got the fields {', '.join(map(str, record)) or 'none'}"
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


_PARSERS = {".tsv": parse_tsv, ".jsonl": parse_json, ".txt": None, "": None}


def _join(title: str, text: str) -> str:
    return f"{title} | {text}" if title.strip() else text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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
      ValueError: not UTF-8; without the place.
    """
    try:
        return raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {error.start + 1} of the line, "
            f"0x{raw[error.start]:02x}); convert the file, for example with iconv"
        ) from None
