"""Queries and passages by their ids, read from a file's lines when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.data.collections import (
    is_header,
    json_object,
    parse_json,
    parse_tsv,
    passage_parser,
)
from colbert_jax.data.lines import Lines

_QUERY_IDS, _QUERY_TEXTS = ("qid", "_id", "id", "query_id"), ("question", "text", "query")
_MARK = "\ufeff".encode()
_ROWS = 1 << 18  # lines whose ids are compared with their numbers at a time


class _Format(NamedTuple):
    """How a line is read: its id, its text, or both at once.

    id: None where it is the line's position. tabbed: the id comes first, then a tab.
    """

    id: Callable[[str], str] | None
    text: Callable[[str], str]
    both: Callable[[str], tuple[str, str]] | None
    tabbed: bool


class Texts:
    """N texts by id, one a line: `Texts.queries` and `Texts.passages`.

    Ids that are consecutive numbers, as MS MARCO's passages have, take no memory; others take 16
    bytes each.
    """

    def __init__(self, lines: Lines, form: _Format, kind: str):
        """
        Args:
          kind: what the texts are, for errors.

        Raises:
          ValueError: an empty file, a line without an id, an id twice; names file and line.
        """
        self._lines, self._form, self._kind = lines, form, kind
        self.path, self.fingerprint = lines.path, lines.fingerprint
        # The id of row 0, where ids are consecutive numbers.
        self._first = 0 if form.id is None else _first_number(lines) if form.tabbed else None
        if self._first is None:
            hashes = np.fromiter((hash(self._id(i)) for i in range(len(lines))), np.int64)
            self._order = np.argsort(hashes, kind="stable")
            self._hashes = hashes[self._order]
            self._refuse_duplicates()

    @classmethod
    def queries(cls, path: str | Path) -> Texts:
        """Open a TSV of `qid, text`, or JSONL with an id and a text (`qid` and `question`)."""
        lines = Lines(path)
        is_json = lines.raw(0).removeprefix(_MARK).lstrip().startswith(b"{")
        return cls(lines, _QUERIES_JSON if is_json else _QUERIES_TSV, "query")

    @classmethod
    def passages(cls, path: str | Path) -> Texts:
        """Open a file that `read_collection` reads."""
        form = _PASSAGES[passage_parser(Path(path))]
        lines = Lines(path)
        if form.tabbed and is_header(lines[0]):
            lines.drop_first()
        return cls(lines, form, "passage")

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, key: int | str) -> int:
        """The row with an id; the number 7 and the text "7" are one id. Raises KeyError."""
        if self._first is not None:
            number = whole_number(key) if isinstance(key, str) else key
            if number is None or not 0 <= number - self._first < len(self):
                raise KeyError(key)
            return number - self._first
        wanted = str(key)
        digest = hash(wanted)
        at = int(np.searchsorted(self._hashes, digest))
        while at < len(self) and self._hashes[at] == digest:
            row = int(self._order[at])
            if self._id(row) == wanted:
                return row
            at += 1
        raise KeyError(key)

    def rows(self, keys: Sequence[Any]) -> list[int]:
        """The rows with ids. Raises ValueError for ids that are unknown or of another type."""
        first = self._first
        if first is not None and set(map(type, keys)) == {int}:  # quickly, for large files
            rows = [key - first for key in keys]
            if min(rows) >= 0 and max(rows) < len(self):
                return rows
        rows = []
        for key in keys:
            if type(key) is not int and type(key) is not str:
                raise ValueError(
                    f"{self._kind} id must be a number or a string, got {json.dumps(key)}"
                )
            try:
                rows.append(self.row(key))
            except KeyError:
                raise ValueError(
                    f"{self._kind} id {key!r} is not in {self.path}: give the file that the "
                    "examples were made for"
                ) from None
        return rows

    def text(self, row: int) -> str:
        """The text of a row. Raises ValueError for a line that can't be read or has no text."""
        return self._lines.read(row, self._checked)

    def items(self, *, checked: bool = False) -> Iterator[tuple[str, str]]:
        """Yield id and text of every row.

        Args:
          checked: refuse empty texts, as `text` does.

        Raises:
          ValueError: a line that can't be read; names file and line.
        """
        both = self._form.both

        def parse(line: str) -> tuple[str, str]:
            key, text = (str(row), line) if both is None else both(line)
            return key, checked_text(text, f"{self._kind} {key!r}") if checked else text

        for row in range(len(self)):
            yield self._lines.read(row, parse)

    def line_bytes(self) -> np.ndarray:
        """int64[N]: the size of each row's line."""
        return np.diff(self._lines.starts, append=self._lines.num_bytes)

    def _checked(self, line: str) -> str:
        name = "" if self._form.id is None else f" {self._form.id(line)!r}"
        return checked_text(self._form.text(line), self._kind + name)

    def _id(self, row: int) -> str:
        return str(row) if self._form.id is None else self._lines.read(row, self._form.id)

    def _refuse_duplicates(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = (int(row) for row in self._order[at : at + 2])
            if self._id(first) == self._id(second):
                raise ValueError(
                    f"{self._lines.where(second)}: {self._kind} id {self._id(second)!r} appears "
                    f"twice, first at {self._lines.where(first)}"
                )


def checked_text(text: str, name: str) -> str:
    """Give the text itself. Raises ValueError where it is empty or not valid Unicode."""
    if not text or text.isspace():
        raise ValueError(f"{name} is empty: give it a text, or take out the examples that have it")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is not valid Unicode: character {error.start} is a lone surrogate"
            ) from None
    return text


def _tsv_id(line: str) -> str:
    key, tab, _ = line.partition("\t")
    if not tab:
        raise ValueError(f"expected an id, a tab and a text, got {line[:80]!r}")
    return key


def _tsv_query(line: str) -> str:
    return line.split("\t", 2)[1]


def _json_query(line: str) -> tuple[str, str]:
    record = json_object(line)
    key = next((record[name] for name in _QUERY_IDS if name in record), None)
    text = next((record[name] for name in _QUERY_TEXTS if name in record), None)
    if key is None or not isinstance(text, str):
        raise ValueError(
            f"expected an id ({', '.join(_QUERY_IDS)}) and a text ({', '.join(_QUERY_TEXTS)}), "
            f"got the fields {', '.join(record) or 'none'}"
        )
    return str(key), text


_QUERIES_TSV = _Format(_tsv_id, _tsv_query, lambda s: (_tsv_id(s), _tsv_query(s)), True)
_QUERIES_JSON = _Format(
    lambda s: _json_query(s)[0], lambda s: _json_query(s)[1], _json_query, False
)
_PASSAGES: dict[Callable[[str], tuple[str, str]] | None, _Format] = {
    parse_tsv: _Format(_tsv_id, lambda s: parse_tsv(s)[1], parse_tsv, True),
    parse_json: _Format(lambda s: parse_json(s)[0], lambda s: parse_json(s)[1], parse_json, False),
    None: _Format(None, lambda s: s, None, False),
}


def whole_number(text: str) -> int | None:
    """The number whose usual spelling is the text; None for any other text."""
    plain = text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
    return int(text) if plain and len(text) < 19 else None


def _first_number(lines: Lines) -> int | None:
    """n where the lines begin with n, n + 1, n + 2, ... and a tab each; else None."""
    data, starts, count = lines.data, lines.starts, len(lines)
    head, tab, _ = lines.raw(0).removeprefix(_MARK).partition(b"\t")
    first = whole_number(head.decode("latin-1")) if tab else None
    if first is None:
        return None
    row = 1
    while row < count:
        digits = len(str(first + row))
        stop = min(row + _ROWS, count, 10**digits - first)
        numbers = np.arange(first + row, first + stop)
        expected = numbers[:, None] // 10 ** np.arange(digits - 1, -1, -1) % 10 + ord("0")
        places = starts[row:stop, None] + np.arange(digits + 1)
        found = data[np.minimum(places, len(data) - 1)]
        if (found[:, :-1] != expected).any() or (found[:, -1] != ord("\t")).any():
            return None
        row = stop
    return first
