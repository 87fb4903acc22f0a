"""The columns of an index: the documents' ids and texts, as strings by position.

Their fields are written here too, in the same pass (`index.fields`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.index.fields import FIELDS, FieldsWriter, delete_fields
from colbert_jax.index.format import ArrayWriter, IndexFormatError, string_arrays

ID, TEXT = "pid", "text"  # the columns' names on disk
_BLOCK = 1024  # documents written at a time
_HASHED = 1 << 16  # ids hashed at a time

_Parts = tuple[Any, str, Mapping[str, Any] | None]  # id or None, text, fields


# --- Writing --------------------------------------------------------------------------------


class DuplicateIdError(ValueError):
    """Two documents have one id."""


class UnknownIdError(KeyError):
    """An id that no document of the index has."""

    def __str__(self) -> str:  # a KeyError's is its message in quotes
        return str(self.args[0])


class WrittenIds(NamedTuple):
    """The documents' own ids on disk: bytes (None: they are 0..N-1) and a hash of them."""

    num_bytes: int | None
    fingerprint: str | None


class WrittenDocuments(NamedTuple):
    """Documents on disk: how many, the bytes of their texts, a hash of texts and fields, their
    ids, and whether any has a field."""

    num_documents: int
    num_bytes: int
    fingerprint: str
    ids: WrittenIds
    has_fields: bool


def write_documents(
    folder: Path,
    documents: Iterable[Any],
    ids: Iterable[Any] | None = None,
    bar: Any = None,
    fields: Iterable[Mapping[str, Any] | None] | None = None,
    first: int | None = 0,
) -> WrittenDocuments:
    """Write texts, ids where they are not positions, and fields where there are any, reading the
    documents once.

    Args:
      documents: texts, pairs (id, text), or triples (id, text, fields); an id of None in a triple
        beside texts.
      ids: the ids of documents that have none. If None, 0..N-1.
      bar: a progress bar of documents.
      fields: the fields of documents that are not triples: a dict or None for each.
      first: the position of the first document; None: ids are written whatever they are.

    Raises:
      TypeError: a document that is none of these, or some with an id and some without; `ids` beside
        ids, `fields` beside triples; a field's value that cannot be.
      ValueError: text that is not valid Unicode, another number of ids or fields than documents, an
        id twice; a field that cannot be.
    """
    documents = iter(documents)
    head = list(itertools.islice(documents, 1))
    paired = bool(head) and _has_id(head[0])
    if paired and ids is not None:
        raise TypeError("the documents are pairs (id, text), so ids= must be left out")
    parts = _as_parts(itertools.chain(head, documents), paired)
    if fields is not None:
        parts = _with_fields(parts, fields)
    digest, count = hashlib.sha256(), 0
    delete_fields(folder / FIELDS)  # an interrupted run may have left one
    with contextlib.ExitStack() as stack:
        more = stack.enter_context(FieldsWriter(folder / FIELDS))
        texts = stack.enter_context(StringWriter(folder, TEXT))
        own = stack.enter_context(IdWriter(folder, first)) if paired else None
        for block in _blocks(parts, _BLOCK):
            encoded = [
                _encode(text, f"document {i}") for i, (_, text, _) in enumerate(block, count)
            ]
            for text in encoded:
                digest.update(len(text).to_bytes(8, "little") + text)
            texts.extend(encoded)
            identities = [identity for identity, _, _ in block]
            if own is not None:
                own.extend(identities)
            more.extend([one for _, _, one in block], identities)
            count += len(block)
            if bar is not None:
                bar.update(len(block))
    if more.fingerprint is not None:
        digest.update(more.fingerprint.encode())
    written = write_ids(folder, ids, count, first) if own is None else own.finish()
    return WrittenDocuments(count, texts.num_bytes, digest.hexdigest(), written, more.has_fields)


def write_fields(
    folder: Path, fields: Iterable[Mapping[str, Any] | None] | None, num_documents: int
) -> str | None:
    """Write the fields of documents that are not texts: a dict or None for each.

    Returns:
      A hash of them; None: no document has any, and there is no file.

    Raises:
      TypeError, ValueError: a field that cannot be; another number of fields than documents.
    """
    delete_fields(folder / FIELDS)
    with FieldsWriter(folder / FIELDS) as writer:
        if fields is not None:
            writer.extend(fields)
            if writer.num_documents != num_documents:
                raise ValueError(
                    f"fields= has {writer.num_documents} entries for {num_documents} documents"
                )
    return writer.fingerprint


def _with_fields(
    parts: Iterable[_Parts], fields: Iterable[Mapping[str, Any] | None]
) -> Iterator[_Parts]:
    end: Any = object()
    for i, (part, one) in enumerate(itertools.zip_longest(parts, fields, fillvalue=end)):
        if part is end or one is end:
            many = "more" if part is end else "fewer"
            raise ValueError(f"fields= has {many} entries than there are documents: {i} fit")
        if part[2]:
            raise TypeError("the documents bring their fields, so fields= must be left out")
        yield part[0], part[1], one


def write_ids(
    folder: Path, ids: Iterable[Any] | None, num_documents: int, first: int | None = 0
) -> WrittenIds:
    """Write the documents' own ids, unless they are positions from `first` on.

    Raises:
      ValueError: another number of ids than documents, or an id twice.
    """
    if ids is None:
        return WrittenIds(None, None)
    with IdWriter(folder, first) as writer:
        for block in _blocks(ids, _BLOCK):
            writer.extend(block)
    if writer.count != num_documents:
        raise ValueError(f"{writer.count} ids were given for {num_documents} documents")
    return writer.finish()


class IdWriter:
    """Ids of any type, as their strings. About 8 bytes of memory each, to find duplicates."""

    def __init__(self, folder: Path, first: int | None = 0):
        """`first`: the position of the first document; None: the ids count as no positions."""
        self.count = 0
        self._folder, self._writer = folder, StringWriter(folder, ID)
        self._first, self._are_positions = first or 0, first is not None
        self._hashes: list[np.ndarray] = []

    def extend(self, ids: Iterable[Any]) -> None:
        strings = [str(i) for i in ids]
        start = self._first + self.count
        positions = map(str, range(start, start + len(strings)))
        self._are_positions = self._are_positions and strings == list(positions)
        encoded = [_encode(s, f"the id of document {i}") for i, s in enumerate(strings, self.count)]
        digests = (hashlib.blake2b(e, digest_size=8).digest() for e in encoded)
        self._hashes.append(np.frombuffer(b"".join(digests), np.uint64))
        self._writer.extend(encoded)
        self.count += len(strings)

    def __enter__(self) -> IdWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def finish(self) -> WrittenIds:
        """What was written, once the files are closed. Raises ValueError for an id twice."""
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        self._refuse_duplicates(hashes)
        if self._are_positions:
            delete_strings(self._folder, ID)
            return WrittenIds(None, None)
        return WrittenIds(self._writer.num_bytes, hashlib.sha256(hashes.tobytes()).hexdigest())

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(same) == 0:
            return
        files = (np.load(self._folder / f"{name}.npy") for name in string_arrays(ID))
        ids = Strings(self._folder, ID, *files)
        for at in same:
            first, second = order[at], order[at + 1]
            if ids[first] == ids[second]:
                raise DuplicateIdError(
                    f"duplicate document id {ids[first]!r:.80}: documents {first + 1} and "
                    f"{second + 1} (counted from 1)"
                )


class StringWriter:
    """Strings of an index, in UTF-8, as one array of bytes and one of offsets."""

    def __init__(self, folder: Path, column: str):
        data, offsets = (folder / f"{name}.npy" for name in string_arrays(column))
        with contextlib.ExitStack() as stack:
            self._bytes = stack.enter_context(ArrayWriter(data, np.uint8))
            self._offsets = stack.enter_context(ArrayWriter(offsets, np.int64))
            self._offsets.append(np.zeros(1, np.int64))
            self._open = stack.pop_all()

    def extend(self, encoded: list[bytes]) -> None:
        ends = self._bytes.rows + np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._offsets.append(ends)

    @property
    def num_bytes(self) -> int:
        return self._bytes.rows

    def __enter__(self) -> StringWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def delete_strings(folder: Path, column: str) -> None:
    for name in string_arrays(column):
        (folder / f"{name}.npy").unlink(missing_ok=True)


def _is_tuple(document: Any) -> bool:
    """Whether it is a pair (id, text), or a triple with fields."""
    if not isinstance(document, tuple | list):
        return False
    return len(document) == 2 or (len(document) == 3 and isinstance(document[2], Mapping))


def _has_id(document: Any) -> bool:
    return _is_tuple(document) and not (len(document) == 3 and document[0] is None)


def _as_parts(documents: Iterable[Any], paired: bool) -> Iterator[_Parts]:
    """Id, text and fields of every document; id None where they have none."""
    for i, document in enumerate(documents):
        if not isinstance(document, str) and not _is_tuple(document):
            kind = type(document).__name__
            raise TypeError(
                f"document {i} must be a string or a pair (id, text), or a triple with a dict of "
                f"fields, got {kind}"
            )
        if _has_id(document) != paired:
            kinds = ("a pair (id, text)", "a string")
            raise TypeError(
                f"document {i} is {kinds[paired]}, but document 0 is {kinds[not paired]}: give all "
                "documents their ids, or none"
            )
        identity, text, *fields = (None, document) if isinstance(document, str) else document
        if not isinstance(text, str):
            raise TypeError(
                f"document {i} (id {str(identity)!r:.80}): its text must be a string, got "
                f"{type(text).__name__}"
            )
        yield identity, text, fields[0] if fields else {}


def _encode(string: str, what: str) -> bytes:
    try:
        return string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode: {error}") from None


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


# --- Reading --------------------------------------------------------------------------------


class Column:
    """A column of strings by position: `column[i]`; a list for a slice or an array of positions."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.one(j) for j in range(self._n)[i]]
        if np.ndim(i):
            return [self[j] for j in i]
        return self.one(range(self._n)[i])

    def __iter__(self) -> Iterator[str]:
        return map(self.one, range(self._n))

    def one(self, i: int) -> str:
        """The string at a position 0..N-1."""
        raise NotImplementedError

    def position(self, string: str, deleted: np.ndarray | None = None) -> int | None:
        """Where a string is; None if it is nowhere. Safe to call from several threads.

        Args:
          deleted: bool[N], positions that do not count.
        """
        raise NotImplementedError

    def find(self, pattern: re.Pattern[str]) -> int | None:
        """Where the first string is in which a pattern of one character, or of the empty string,
        is found; None if there is none."""
        raise NotImplementedError


class Positions(Column):
    """The ids of a collection without ids of its own: "0", "1", ..."""

    def one(self, i: int) -> str:
        return str(i)

    def position(self, string: str, deleted: np.ndarray | None = None) -> int | None:
        if not (string.isascii() and string.isdigit()) or len(string) > len(str(self._n)):
            return None
        i = int(string)
        if i >= self._n or str(i) != string or (deleted is not None and deleted[i]):
            return None
        return i

    def find(self, pattern: re.Pattern[str]) -> int | None:
        # Digits are in all of them that are long enough to have them.
        return next((i for i in range(min(self._n, 10)) if pattern.search(str(i))), None)


class Strings(Column):
    """Strings on disk: `data` holds their UTF-8 bytes, string i those from offsets[i] on.

    Args:
      folder, column: whose they are, for errors.
    """

    def __init__(self, folder: Path, column: str, data: np.ndarray, offsets: np.ndarray):
        super().__init__(len(offsets) - 1)
        self._data, self._offsets = data, offsets
        self._files = [folder / f"{name}.npy" for name in string_arrays(column)]
        self._lock = threading.Lock()
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def one(self, i: int) -> str:
        begin, end = self._offsets[i], self._offsets[i + 1]
        self._check_bounds(0 <= begin <= end <= len(self._data))
        try:
            return self._data[begin:end].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise IndexFormatError(
                f"{self._files[0]}: damaged: string {i} is not UTF-8: {error}"
            ) from None

    def _check_bounds(self, right: Any) -> None:
        # Checked where they are used: opening reads no column.
        if not right:
            raise IndexFormatError(f"{self._files[1]}: damaged: its offsets do not ascend")

    def position(self, string: str, deleted: np.ndarray | None = None) -> int | None:
        """The first call reads the column, and keeps 16 bytes a string."""
        with self._lock:
            if self._table is None:
                self._table = self._hash_table()
        hashes, order = self._table
        wanted = hash(string.encode("utf-8", "surrogatepass"))
        at = int(np.searchsorted(hashes, wanted))
        while at < len(hashes) and hashes[at] == wanted:
            i = int(order[at])
            if (deleted is None or not deleted[i]) and self.one(i) == string:
                return i
            at += 1
        return None

    def find(self, pattern: re.Pattern[str]) -> int | None:
        for start, offsets, block in self._blocks():
            text = block.decode("utf-8", "replace")
            # `one` names what is not UTF-8
            if pattern.search(text) or "\ufffd" in text or (np.diff(offsets) == 0).any():
                for i in range(start, start + len(offsets) - 1):
                    if pattern.search(self.one(i)):
                        return i
        return None

    def _blocks(self) -> Iterator[tuple[int, np.ndarray, bytes]]:
        """Strings start..start+n-1: their first, their n + 1 offsets, their bytes."""
        for start in range(0, self._n, _HASHED):
            offsets = self._offsets[start : start + _HASHED + 1]
            self._check_bounds(
                offsets[0] >= 0
                and offsets[-1] <= len(self._data)
                and (offsets[:-1] <= offsets[1:]).all()
            )
            yield start, offsets, self._data[offsets[0] : offsets[-1]].tobytes()

    def _hash_table(self) -> tuple[np.ndarray, np.ndarray]:
        """The strings' hashes, ascending, and where each is."""
        hashes = np.empty(self._n, np.int64)
        for start, offsets, block in self._blocks():
            ends = (offsets - offsets[0]).tolist()
            for i, (begin, end) in enumerate(itertools.pairwise(ends), start):
                hashes[i] = hash(block[begin:end])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def open_column(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> Strings | None:
    """A column of the index in a folder; None where the index does not have it."""
    data, offsets = string_arrays(name)
    return Strings(folder, name, arrays[data], arrays[offsets]) if data in arrays else None
