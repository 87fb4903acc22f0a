"""Queries and passages by their ids, read from a file's lines when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.data.collections import (
    Layout,
    passage_layout,
    passage_suffix,
    query_layout,
    warn_of_gap,
)
from colbert_jax.data.lines import Lines
from colbert_jax.files import short_json

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
        return cls(lines, _opened(lines, lines.read(0, query_layout)), "query")

    @classmethod
    def passages(cls, path: str | Path) -> Texts:
        """Open a file that `read_collection` reads."""
        suffix = passage_suffix(Path(path))
        lines = Lines(path)
        layout = lines.read(0, lambda line: passage_layout(suffix, line))
        return cls(lines, _opened(lines, layout), "passage")

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
                    f"{self._kind} id must be a number or a string, got {short_json(key, 80)}"
                )
            try:
                rows.append(self.row(key))
            except KeyError:
                raise ValueError(
                    f"{self._kind} id {key!r:.80} is not in {self.path}: give the file that the "
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
            return key, checked_text(text, f"{self._kind} {key!r:.80}") if checked else text

        for row in range(len(self)):
            yield self._lines.read(row, parse)

    def line_bytes(self) -> np.ndarray:
        """int64[N]: the size of each row's line."""
        return np.diff(self._lines.starts, append=self._lines.num_bytes)

    def _checked(self, line: str) -> str:
        name = "" if self._form.id is None else f" {self._form.id(line)!r:.80}"
        return checked_text(self._form.text(line), self._kind + name)

    def _id(self, row: int) -> str:
        return str(row) if self._form.id is None else self._lines.read(row, self._form.id)

    def _refuse_duplicates(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = (int(row) for row in self._order[at : at + 2])
            if self._id(first) == self._id(second):
                raise ValueError(
                    f"{self._lines.where(second)}: {self._kind} id {self._id(second)!r:.80} "
                    f"appears twice, first at {self._lines.where(first)}"
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


def _opened(lines: Lines, layout: Layout) -> _Format:
    """The format of lines that are read as `layout` says, their header left out."""
    if layout.header:
        lines.drop_first()
    parse = layout.parse
    if parse is None:
        if lines.number(len(lines) - 1) != len(lines):
            warn_of_gap(lines.path)
        return _Format(None, lambda s: s, None, False)
    key = _tsv_id if layout.tabbed else lambda s: parse(s)[0]
    return _Format(key, lambda s: parse(s)[1], parse, layout.tabbed)


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
