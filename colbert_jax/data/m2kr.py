"""M2KR's files (Lin et al., 2024): questions about images, and the passages that answer them.

Two tables. Of questions: `question_id`, `question`, `instruction`, `img_path`, `pos_item_ids`,
`answers`; all but the first two and `pos_item_ids` may be left out. Of passages: `passage_id`,
`passage_content`. Further columns are not looked at.

A table is one of these:

* a file, or a folder of files whose names begin with the split, or a folder of that name with files
  in it: .parquet, or JSON lines in .jsonl, .json or .jsonl.gz;
* a folder that `datasets` saved, or a `datasets.Dataset` or `DatasetDict`;
* `owner/name/config` on the Hugging Face hub, such as `BByrneLab/.../OKVQA_data`, by `datasets`.

JSON lines and saved data sets stay on disk and are read row by row; of parquet the columns above
are held in memory, packed. Everything is checked when it is opened.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from colbert_jax.data.collections import json_object
from colbert_jax.data.lines import Lines
from colbert_jax.files import checksum, present
from colbert_jax.progress import progress_bar

_QUESTIONS = ("question_id", "question", "instruction", "img_path", "pos_item_ids", "answers")
_PASSAGES = ("passage_id", "passage_content")
_REQUIRED = ("question_id", "question", "pos_item_ids", *_PASSAGES)
_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_FILES = (".parquet", *_JSON)
_INSTALL = 'pip install "colbert-jax[train]"'
_NAMED = 10  # images that an error names


class Question(NamedTuple):
    """A question, perhaps about an image.

    text: instruction and question, as the query encoder takes them.
    image: path of the image; None for a question of text alone.
    positives: ids of the passages that answer it, as they are written.
    """

    id: str
    text: str
    image: Path | None
    positives: tuple[str, ...]
    answers: tuple[str, ...]


def question_text(question: str, instruction: str | None, end: str = ":") -> str:
    """Put the instruction before a question, as FLMR's scripts do.

    Args:
      end: what ends an instruction, the model's `mask_instruction_token`. A ":" is appended where
        none ends the instruction, and `end` stands in place of every ":" of it.
    """
    instruction = (instruction or "").strip()
    if not instruction:
        return question
    if not instruction.endswith(":"):
        instruction += ":"
    return f"{instruction.replace(':', end)} {question}"


def read_m2kr(
    data: Any,
    passages: Any,
    *,
    split: str = "test",
    images: str | Path | None = None,
    progress: bool | None = None,
) -> M2KR:
    """Open questions and their passages.

    Args:
      data, passages: two tables, see the top of this file.
      split: of both; the passages' is called `{split}_passages` or as the questions' is. A single
        file is taken whatever it is called.
      images: folder that `img_path` begins in. If None, the working folder.
      progress: whether to show a bar while checking; if None, on a terminal.

    Raises:
      FileNotFoundError, ImportError: a table that is not there, or what reads it is not.
      ValueError: naming file, row and column of what cannot be used: a missing column, another
        type, a question id that is there twice; no positive of any question is a passage.

    Warns of positives that the passages lack, and of passage ids that are there twice.
    """
    questions = _open(data, (split,), _QUESTIONS)
    table = _open(passages, (f"{split}_passages", split), _PASSAGES)
    known = _by_id(table, progress)
    return M2KR(questions, Passages(table), known, images, progress)


class M2KR(Sequence[Question]):
    """N questions by number, and their passages; see `read_m2kr`.

    passages: all of them.
    fingerprint: of questions and passages, not of images.
    has_answers: whether some question has an answer.
    """

    def __init__(
        self,
        table: _Table,
        passages: Passages,
        known: Mapping[str, Sequence[int]],
        images: str | Path | None,
        progress: bool | None,
    ):
        self._table, self.passages = table, passages
        self._images, self._end = Path(images or ""), ":"
        self.has_answers = False
        self.fingerprint = _digest(table.fingerprint, passages.fingerprint)
        seen: dict[str, int] = {}
        rows, ends = array("q"), array("q", [0])
        lacking: list[tuple[str, str]] = []
        with progress_bar(len(table), "checking questions", "question", progress) as bar:
            for i in range(len(table)):
                question = self[i]
                self.has_answers |= bool(question.answers)
                before = seen.setdefault(question.id, i)
                if before != i:
                    raise ValueError(
                        f"{table.where(i)}: column 'question_id': {question.id!r:.80} appears "
                        f"twice, first at {table.where(before)}"
                    )
                for pid in question.positives:
                    found = known.get(pid, ())
                    rows.extend(found)
                    if not found:
                        lacking.append((question.id, pid))
                ends.append(len(rows))
                bar.update(1)
        self._rows = np.array(rows, np.int64)
        self._ends = np.array(ends, np.int64)
        self._say_lacking(lacking)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: Any) -> Any:
        """Read a question. Raises ValueError naming file, row and column of what can't be read."""
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        record, where = self._table.read(i), self._table.where(i)
        instruction = _text(record, "instruction", where, optional=True)
        image = _text(record, "img_path", where, optional=True)
        if image is not None and "\0" in image:
            raise ValueError(f"{where}: column 'img_path' has a NUL byte in it: {image!r:.80}")
        return Question(
            _id(record, "question_id", where),
            question_text(_text(record, "question", where) or "", instruction, self._end),
            None if image is None else self._images / image,
            _ids(record, "pos_item_ids", where),
            _ids(record, "answers", where),
        )

    def with_instruction_end(self, end: str | None) -> M2KR:
        """The same questions for a model with another token that ends instructions, see
        `question_text`; None for ":"."""
        other = copy.copy(self)
        other._end = end or ":"
        return other

    def where(self, i: int) -> str:
        """File and row of a question."""
        return self._table.where(i)

    def positives(self, i: int) -> np.ndarray:
        """int64[P]: the numbers of question i's positives among the passages."""
        return self._rows[self._ends[i] : self._ends[i + 1]]

    def answered(self) -> np.ndarray:
        """int64: the questions that have a positive among the passages."""
        return np.flatnonzero(np.diff(self._ends))

    def missing_images(self, numbers: Sequence[int] | None = None) -> dict[int, Path]:
        """The images that are not there, by the number of their question.

        Args:
          numbers: of the questions to look at. If None, all.
        """
        chosen = range(len(self)) if numbers is None else numbers

        def missing(i: int) -> Path | None:
            image = self[i].image
            return None if image is None or image.is_file() else image

        found: dict[int, Path] = {}
        with ThreadPoolExecutor(16) as host:
            rest = iter(chosen)
            while window := list(itertools.islice(rest, 1024)):
                for i, image in zip(window, host.map(missing, window), strict=True):
                    if image is not None:
                        found[int(i)] = image
        return found

    def name_missing(self, missing: Mapping[int, Path]) -> str:
        """One message of all missing images: the first few by name."""
        lines = [
            f"{path} (question {self[i].id!r:.80})"
            for i, path in itertools.islice(missing.items(), _NAMED)
        ]
        if len(missing) > _NAMED:
            lines.append(f"and {len(missing) - _NAMED} more")
        some = "1 image is" if len(missing) == 1 else f"{len(missing)} images are"
        return f"{some} missing of {len(self)} questions:\n  " + "\n  ".join(lines)

    def _say_lacking(self, lacking: Sequence[tuple[str, str]]) -> None:
        if not lacking:
            return
        total = len(lacking) + len(self._rows)
        qid, pid = lacking[0]
        message = (
            f"{len(lacking)} of {total} positives are not among the passages: {pid!r:.80} of "
            f"question {qid!r:.80}, for example, and there is {self.passages.id(0)!r:.80}"
        )
        if not len(self._rows):
            raise ValueError(f"{message}; give the passages of these questions, of the same split")
        warnings.warn(f"{message}; they count as not found", stacklevel=4)


class Passages(Sequence[str]):
    """The texts of N passages by number.

    fingerprint: of all of them.
    """

    def __init__(self, table: _Table):
        self._table, self.fingerprint = table, table.fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        return _text(self._table.read(i), "passage_content", self._table.where(i), blank=True)

    def id(self, i: int) -> str:
        """The id of a passage."""
        return _id(self._table.read(i), "passage_id", self._table.where(i))

    @cached_property
    def keys(self) -> np.ndarray:
        """int64[N]: equal for passages of the same text."""

        def digests() -> Iterator[bytes]:
            for text in self:
                yield hashlib.blake2b(text.encode(), digest_size=8).digest()

        return np.frombuffer(b"".join(digests()), "<i8").astype(np.int64)


def _by_id(table: _Table, progress: bool | None) -> dict[str, tuple[int, ...]]:
    """Check passages; give the numbers of those with an id: one, unless an id is there twice."""
    known: dict[str, tuple[int, ...]] = {}
    twice = ""
    with progress_bar(len(table), "checking passages", "passage", progress) as bar:
        for i in range(len(table)):
            record, where = table.read(i), table.where(i)
            _text(record, "passage_content", where, blank=True)
            pid = _id(record, "passage_id", where)
            rows = known.setdefault(pid, (i,))
            if rows[0] != i:
                known[pid] = (*rows, i)
                twice = twice or (
                    f"{where}: column 'passage_id': {pid!r:.80} appears twice, first at "
                    f"{table.where(rows[0])}: both count as that passage"
                )
            bar.update(1)
    if twice:
        warnings.warn(twice, stacklevel=3)
    return known


# --- Values ---------------------------------------------------------------------------------


def _text(
    record: Mapping[str, Any], column: str, where: str, *, optional: bool = False, blank=False
) -> str | None:
    """A text; with `optional`, None where there is none or a blank one."""
    value = record.get(column)
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} must be a text, got {value!r:.80}")
    if not blank and not value.strip():
        raise ValueError(f"{where}: column {column!r} is blank: give it a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: column {column!r} is not valid Unicode: character {error.start} is a "
                "lone surrogate"
            ) from None
    return value


def _id(record: Mapping[str, Any], column: str, where: str) -> str:
    """An id: a text or a whole number; the number 7 and the text "7" are one."""
    value = record.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, column, where) or ""


def _ids(record: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    """A list of texts or whole numbers; a single one is a list of one, None is none."""
    value = record.get(column)
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for item in items:
        if type(item) is not str and type(item) is not int:
            raise ValueError(
                f"{where}: column {column!r} must be a list of texts, got {value!r:.80}"
            )
    return tuple(map(str, items))


# --- Tables ---------------------------------------------------------------------------------


class _Table(Protocol):
    """Rows by number.

    columns: their names. fingerprint: of the content.
    """

    columns: list[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, i: int) -> Mapping[str, Any]: ...

    def where(self, i: int) -> str: ...


def _open(source: Any, splits: tuple[str, ...], columns: tuple[str, ...]) -> _Table:
    """A table, whose name for the split is the first of `splits` that is there."""
    if not isinstance(source, str | os.PathLike):
        return _Rows(_split(source, splits, "the data set"), columns, "the data set")
    place, name = Path(source), str(source)
    if not place.exists():
        parts = name.split("/")
        if len(parts) != 3 or not all(parts):
            raise FileNotFoundError(
                f"{name}: no such file or folder, nor owner/name/config on the Hugging Face hub"
            )
        opened = _datasets().load_dataset("/".join(parts[:2]), parts[2])
        return _Rows(_split(opened, splits, name), columns, name)
    if place.is_dir() and (present(place / "dataset_dict.json") or present(place / "state.json")):
        opened = _datasets().load_from_disk(name)
        return _Rows(_split(opened, splits, name), columns, name)
    files = [place] if place.is_file() else _files_of(place, splits)
    tables: list[_Table] = [
        _ParquetFile(file, columns) if file.suffix == ".parquet" else _JsonFile(file, columns)
        for file in files
    ]
    return tables[0] if len(tables) == 1 else _Joined(tables)


def _files_of(folder: Path, splits: tuple[str, ...]) -> list[Path]:
    """The files of a split, in order."""

    def tables(place: Path) -> list[Path]:
        files = sorted(place.iterdir()) if place.is_dir() else []
        return [f for f in files if f.name.endswith(_FILES) and f.is_file()]

    for split in splits:
        own = [f for f in tables(folder) if f.name.startswith((f"{split}.", f"{split}-"))]
        if own := own + tables(folder / split):
            return own
    there = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder}: no parquet or JSONL file whose name begins with {' or '.join(splits)}: there "
        f"are {', '.join(there[:8]) or 'no files'}. Name another split, or the file itself"
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data sets need `datasets`: {_INSTALL}") from error
    return datasets


def _split(opened: Any, splits: tuple[str, ...], name: str) -> Any:
    """A `datasets.Dataset`, of a `DatasetDict` the split."""
    datasets = _datasets()
    if isinstance(opened, datasets.DatasetDict):
        found = [split for split in splits if split in opened]
        if not found:
            raise ValueError(
                f"{name}: no split {' or '.join(map(repr, splits))}, it has "
                f"{', '.join(opened) or 'none'}"
            )
        opened = opened[found[0]]
    if not isinstance(opened, datasets.Dataset):
        raise ValueError(
            f"{name} must be a path or a datasets.Dataset, got {type(opened).__name__}: streamed "
            "data have no row numbers, so load them without streaming=True"
        )
    return opened


def _require(name: str, columns: Sequence[str], wanted: Sequence[str], rows: int) -> None:
    missing = [column for column in wanted if column in _REQUIRED and column not in columns]
    if missing:
        raise ValueError(
            f"{name}: no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, columns))[:300] or 'none'}"
        )
    if not rows:
        raise ValueError(f"{name}: the table is empty")


class _Rows:
    """A `datasets.Dataset`."""

    def __init__(self, dataset: Any, columns: Sequence[str], name: str):
        _require(name, dataset.column_names, columns, len(dataset))
        self.columns = [column for column in columns if column in dataset.column_names]
        self._dataset = dataset.with_format(None).select_columns(self.columns)
        self._name = name
        ends = json.dumps([self.read(0), self.read(len(self) - 1)], default=str)
        self.fingerprint = f"{len(self)}:{hashlib.sha256(ends.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> Mapping[str, Any]:
        return self._dataset[int(i)]

    def where(self, i: int) -> str:
        return f"{self._name}, row {i}"


class _ParquetFile:
    def __init__(self, path: Path, columns: Sequence[str]):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"{path}: parquet needs pyarrow: {_INSTALL}") from error
        self._path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                _require(str(path), names, columns, file.metadata.num_rows)
                self.columns = [column for column in columns if column in names]
                table = file.read(columns=self.columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged, or not parquet: {error}") from None
        self._values = [table.column(column) for column in self.columns]
        self.fingerprint = f"{path.stat().st_size}:{checksum(path):08x}"

    def __len__(self) -> int:
        return len(self._values[0])

    def read(self, i: int) -> Mapping[str, Any]:
        return {
            column: values[int(i)].as_py()
            for column, values in zip(self.columns, self._values, strict=True)
        }

    def where(self, i: int) -> str:
        return f"{self._path}, row {i}"


class _JsonFile:
    def __init__(self, path: Path, columns: Sequence[str]):
        if not path.name.endswith(_JSON):
            raise ValueError(f"{path}: the file's name must end in one of {', '.join(_FILES)}")
        self._lines = Lines(path)
        self.columns = list(self._lines.read(0, json_object))
        _require(self._lines.where(0), self.columns, columns, 1)
        self.fingerprint = self._lines.fingerprint

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, i: int) -> Mapping[str, Any]:
        return self._lines.read(i, json_object)

    def where(self, i: int) -> str:
        return self._lines.where(i)


class _Joined:
    """Tables one after the other."""

    def __init__(self, tables: Sequence[_Table]):
        self._tables = tables
        self._ends = list(itertools.accumulate(map(len, tables)))
        self.columns = tables[0].columns
        self.fingerprint = _digest(*(table.fingerprint for table in tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, i: int) -> Mapping[str, Any]:
        table, place = self._at(i)
        return table.read(place)

    def where(self, i: int) -> str:
        table, place = self._at(i)
        return table.where(place)

    def _at(self, i: int) -> tuple[_Table, int]:
        part = bisect.bisect_right(self._ends, i)
        return self._tables[part], i - (self._ends[part - 1] if part else 0)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
