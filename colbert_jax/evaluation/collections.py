"""Readers of the field's files. Each streams, and names file and line of what it can't read.

Collections: TSV `pid, text[, title]` (Stanford ColBERT; a title is joined as "title | text"), JSONL
with an id and a text (BEIR's `_id`, `title`, `text` among others), or plain text, a passage a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_ID_KEYS = ("_id", "id", "pid", "docid", "doc_id")
_TEXT_KEYS = ("text", "contents", "passage", "body")
_HEADERS = ("id", "pid", "docid", "doc_id", "_id")


def read_collection(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (pid, text) of every passage. The file's name tells the format: .tsv, .jsonl, or text.

    Raises:
      ValueError: a line that can't be read, with its number; an empty collection.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: a collection's name ends in one of {', '.join(filter(None, _READERS))}"
        )
    empty = True
    for passage in reader(path):
        empty = False
        yield passage
    if empty:
        raise ValueError(f"{path}: the collection is empty")


def read_queries(path: str | Path) -> dict[str, str]:
    """Queries by id, from a TSV of `qid, text`.

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
    """Judgements: qid -> pid -> gain, from lines of `qid 0 pid gain`, tabs or spaces between.

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


def _tsv(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number}: expected 'pid<TAB>text', got {line[:80]!r}")
        if number == 1 and fields[0].lower() in _HEADERS:
            continue
        pid, text, *rest = fields
        yield pid, _join(rest[0] if rest else "", text)


def _jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        text = next((record[key] for key in _TEXT_KEYS if key in record), None)
        pid = next((record[key] for key in _ID_KEYS if key in record), None)
        if not isinstance(text, str) or pid is None:
            raise ValueError(
                f"{path}, line {number}: expected an id ({', '.join(_ID_KEYS)}) and a text "
                f"({', '.join(_TEXT_KEYS)}), got the fields {', '.join(record) or 'none'}"
            )
        yield str(pid), _join(str(record.get("title") or ""), text)


def _plain(path: Path) -> Iterator[tuple[str, str]]:
    for number, (_, line) in enumerate(_lines(path)):
        yield str(number), line


_READERS = {".tsv": _tsv, ".jsonl": _jsonl, ".txt": _plain, "": _plain}


def _join(title: str, text: str) -> str:
    return f"{title} | {text}" if title.strip() else text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, strictly UTF-8, with or without a byte-order mark."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line, "
                    f"0x{raw[error.start]:02x}); convert the file, for example with iconv"
                ) from None
            if line.strip():
                yield number, line
