"""Records: rows of CSV, TSV, parquet, JSON lines, or a data set, each a mapping by column name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from colbert_jax.data.streams import INSTALL, numbered_lines, unpacked_suffix

# What a column is to us -> its name in the file, or its place from 0 in a file without a header.
Columns = Mapping[str, str | int]
Record = dict[Any, Any]

TABLES = (".csv", ".parquet")
_JSON = (".jsonl", ".json", ".ndjson")
_FIELD = (1 << 31) - 1  # bytes of one field of CSV; by default it would be 128 KiB
_ROWS = 1024  # rows of parquet in memory at a time


def read_records(source: Any, *, header: bool = True) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of every row; where names file and line, for errors.

    Args:
      source: a file in .csv, .tsv, .jsonl or .parquet; a `datasets.Dataset`; mappings.
      header: whether the first line of CSV or TSV names the columns. Without, keys are places.

    Raises:
      ValueError: a row that can't be read, a damaged file; names the place.
      ImportError: parquet, and pyarrow is not installed.
    """
    if not isinstance(source, str | Path):
        return _mappings(source)
    path = Path(source)
    suffix = unpacked_suffix(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in _JSON:
        return _json(path)
    if suffix in (".csv", ".tsv"):
        return _rows(path, "," if suffix == ".csv" else "\t", header)
    raise ValueError(
        f"{path}: columns are known in .csv, .tsv, .jsonl and .parquet: give the file such a name"
    )


def pick(record: Record, columns: Columns, needed: Iterable[str]) -> dict[str, Any]:
    """The values that `columns` names, under our names for them.

    Raises ValueError, without the place, for a needed column that is not there.
    """
    found = {}
    for name, column in columns.items():
        if column in record:
            found[name] = record[column]
        elif name in needed:
            there = ", ".join(map(str, record)) or "none"
            raise ValueError(f"there is no column {column!r:.60}; there are {there[:200]}")
    return found


def parse_columns(text: str) -> dict[str, str | int]:
    """Columns as a command line has them: `id=docid,text=body`, or `id=0,text=3` by place.

    Raises:
      ValueError: a part of another form, names and places together.
    """
    columns: dict[str, str | int] = {}
    for part in text.split(","):
        name, equals, column = (side.strip() for side in part.partition("="))
        if not name or not equals or not column:
            raise ValueError(f"expected 'id=COLUMN,text=COLUMN', got {text!r:.80}")
        columns[name] = int(column) if re.fullmatch("[0-9]{1,4}", column) else column
    check_columns(columns)
    return columns


def check_columns(columns: Columns) -> bool:
    """Whether the columns are those of a header. Raises ValueError for names beside places."""
    kinds = {isinstance(column, str) for column in columns.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"columns {dict(columns)}: give the names in the header, or places from 0 where there "
            "is no header, for all of them"
        )
    return kinds != {False}


def _mappings(source: Any) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(source):
        if not isinstance(record, Mapping):
            raise ValueError(f"row {number}: expected a mapping, got {record!r:.80}")
        yield f"row {number}", dict(record)


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object")
        yield where, record


def _rows(path: Path, delimiter: str, header: bool) -> Iterator[tuple[str, Record]]:
    names: Sequence[Any] | None = None
    number = found = 0
    for number, row in _csv(path) if delimiter == "," else _tsv(path):
        where = f"{path}, line {number}"
        if names is None:
            names = [name.strip() for name in row] if header else range(len(row))
            twice = {name for name in names if list(names).count(name) > 1}
            if twice or "" in names:
                raise ValueError(f"{where}: a header with empty or doubled names: {row!r:.120}")
            if header:
                continue
        if len(row) != len(names):
            raise ValueError(f"{where}: {len(row)} fields, expected {len(names)}: {row!r:.80}")
        yield where, dict(zip(names, row, strict=True))
        found += 1
    if names is not None and not found:
        raise ValueError(
            f"{path}, line {number}: taken as a header, {', '.join(names)[:120]}, and there is "
            "nothing below it: a table begins with the names of its columns"
        )


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in numbered_lines(path):
        yield number, line.split("\t")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line that each begins on."""
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in numbered_lines(path, blank=True):
            last = number
            yield line + "\n"

    csv.field_size_limit(max(csv.field_size_limit(), _FIELD))
    begin = 1
    try:
        for row in csv.reader(lines(), strict=True):
            if row:
                yield begin, row
            begin = last + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet needs pyarrow: {INSTALL}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged, or not parquet: {error}") from None
