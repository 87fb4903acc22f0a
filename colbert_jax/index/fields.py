"""The fields of an index's documents, in a SQLite file beside its arrays.

    documents   position, the fields as JSON, and a checksum of both; no row for one without fields
    search      a row for every value, in the order in which filters look for them

Documents never change, so a reader of the first N documents ignores all rows from N on: those that
a writer has added since, or that a killed one has left. Searchable rows lie in blocks of documents,
so that adding writes only to the end of the file, and a reader never meets the newer blocks.

The file is in WAL mode. Only SQLite may open it: closing any other handle would let go of the locks
that SQLite holds on it in this process. On a network file system, only one machine may use it while
it is written.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import sqlite3
import stat
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from colbert_jax.data.fields import Value, check_fields
from colbert_jax.files import sync_folder
from colbert_jax.index.filters import (
    BOOLEAN,
    ELEMENT,
    EMPTY,
    NUMBER,
    STRING,
    All,
    Expression,
    FilterError,
    Lookup,
    Not,
    parse_filter,
    stored,
)
from colbert_jax.index.format import IndexFormatError

FIELDS = "fields.sqlite"  # the file's name in a new index
_MARK, _VERSION = 0x434A4658, 1  # application_id, user_version
_BLOCK_BITS = 14  # documents of a block
_WRITTEN = 1024  # documents written at a time
_SOUGHT = 500  # values that are sought; of more, all rows are read. SQLite takes 999 parameters
_PATIENCE = 30.0  # seconds to wait for a lock that others hold for a moment
_CHECKPOINT_PATIENCE = 0.5
_SETTLED = 0.05  # seconds after which another change gives a file another time
_TRIES = 100
_TABLES = {
    "documents": "CREATE TABLE documents (position INTEGER PRIMARY KEY, "
    "checksum INTEGER NOT NULL, fields TEXT NOT NULL)",
    "search": "CREATE TABLE search (block INTEGER NOT NULL, name TEXT NOT NULL, "
    "kind INTEGER NOT NULL, value NOT NULL, position INTEGER NOT NULL, "
    "PRIMARY KEY (block, name, kind, value, position)) WITHOUT ROWID",
}
_WORDS = {NUMBER: "number", STRING: "string", BOOLEAN: "bool", ELEMENT: "list", EMPTY: "list"}

_INHERITED: list[sqlite3.Connection] = []  # from a parent process

_Row = tuple[int, str, int, Any, int]
_T = TypeVar("_T")


# --- Writing --------------------------------------------------------------------------------


class FieldsWriter:
    """Adds the fields of documents from position `first` on, all or none.

    A context manager: what was given is there when its block ends well. Rows from `first` on that
    a killed writer has left go. A file is made when the first document with a field comes.

    Attributes:
      num_documents: the position that comes next.
      has_fields: once the block has ended, whether any document in the file has a field.
      fingerprint: of the fields given, and of whose they are; None: there were none.
      checksum: of the rows of all documents (`fields_checksum`).
    """

    def __init__(self, file: Path, first: int = 0, checksum: int = 0):
        """`checksum`: of the documents before `first`."""
        self.num_documents, self.has_fields, self.checksum = first, False, checksum
        self._file, self._first = file, first
        self._digest: Any = None
        self._connection: sqlite3.Connection | None = None
        self._is_new = not file.exists()
        if not self._is_new:
            with _naming(file):
                self._open()

    @property
    def fingerprint(self) -> str | None:
        return None if self._digest is None else self._digest.hexdigest()

    def extend(
        self, fields: Iterable[Mapping[str, Any] | None], ids: Iterable[Any] | None = None
    ) -> None:
        """Give the fields of the next documents.

        Args:
          ids: the documents' ids, for errors.

        Raises:
          TypeError, ValueError: a field that cannot be, naming document and field.
        """
        pairs = zip(fields, itertools.repeat(None) if ids is None else ids, strict=False)
        while block := list(itertools.islice(pairs, _WRITTEN)):
            documents: list[tuple[int, int, str]] = []
            rows: list[_Row] = []
            for position, (given, identity) in enumerate(block, self.num_documents):
                if given is None:
                    continue
                name = f"document {position}"
                name = name if identity is None else f"{name} (id {str(identity)!r:.60})"
                checked = check_fields(given, name)
                if checked:
                    text = _to_json(checked)
                    documents.append((position, _checksum(position, text), text))
                    rows.extend(_rows(position, checked))
            self.num_documents += len(block)
            if documents:
                self._write(documents, rows)

    def _write(self, documents: list[tuple[int, int, str]], rows: list[_Row]) -> None:
        self._digest = hashlib.sha256() if self._digest is None else self._digest
        for position, _, text in documents:
            encoded = text.encode()
            self._digest.update(b"%d %d " % (position, len(encoded)) + encoded)
        rows.sort()
        self.checksum = _chained((checksum for _, checksum, _ in documents), self.checksum)
        with _naming(self._file):
            if self._connection is None:
                delete_fields(self._file)  # a log without its file would be taken for the new one's
                self._open()
            assert self._connection is not None
            self._connection.executemany("INSERT INTO documents VALUES (?, ?, ?)", documents)
            self._connection.executemany("INSERT INTO search VALUES (?, ?, ?, ?, ?)", rows)

    def _open(self) -> None:
        connection = sqlite3.connect(
            self._file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            _set_up(connection, cache=32)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            # An empty file is no file of documents that have fields.
            if not count and (self._is_new or not self._first):
                for statement in _TABLES.values():
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_MARK}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            _check_tables(connection, self._file)
            first, block = self._first, self._first >> _BLOCK_BITS
            connection.execute("DELETE FROM documents WHERE position >= ?", [first])
            connection.execute("DELETE FROM search WHERE block > ?", [block])
            connection.execute(
                "DELETE FROM search WHERE block = ? AND position >= ?", [block, first]
            )
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def __enter__(self) -> FieldsWriter:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._connection is None:
            return
        is_whole = False
        try:
            if kind is None:
                with _naming(self._file):
                    self._commit(self._connection)
                is_whole = True
        finally:
            self._close(is_whole)
        if self._is_new:
            sync_folder(self._file.parent)

    def _commit(self, connection: sqlite3.Connection) -> None:
        self.has_fields = bool(connection.execute("SELECT 1 FROM documents LIMIT 1").fetchall())
        connection.execute("COMMIT")
        # Empties the log, unless a reader is just reading: then the next writer does.
        connection.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_PATIENCE * 1000:.0f}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _close(self, is_whole: bool) -> None:
        assert self._connection is not None
        with contextlib.ExitStack() as stack:
            if not is_whole:
                # An error of cleaning up must not hide the one that led here.
                stack.enter_context(contextlib.suppress(sqlite3.Error, OSError))
                if self._is_new:
                    stack.callback(delete_fields, self._file)
            stack.callback(self._connection.close)
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


def delete_fields(file: Path) -> None:
    """Delete a file of fields and what SQLite keeps beside it, the file last."""
    for each in companions(file):
        each.unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def companions(file: Path) -> list[Path]:
    """The files that SQLite keeps beside a file that is open, or whose writer was killed."""
    return [file.with_name(f"{file.name}-{end}") for end in ("wal", "shm", "journal")]


def copy_fields(source: Path, target: Path, positions: np.ndarray) -> int | None:
    """Write the fields of documents at ascending `positions`, which become 0, 1, ...

    Returns:
      Their checksum; None if none of them has a field: then there is no target.
    """
    delete_fields(target)
    if len(positions) == 0:
        return None
    store = FieldStore(source, int(positions[-1]) + 1)
    with contextlib.closing(store), FieldsWriter(target) as writer:
        for start in range(0, len(positions), _WRITTEN):
            wanted = positions[start : start + _WRITTEN].tolist()
            writer.extend(store.several(wanted))
    return writer.checksum if writer.has_fields else None


def _to_json(fields: Mapping[str, Value]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=_date_to_json)


def _date_to_json(value: Any) -> dict[str, str]:
    is_time = isinstance(value, datetime.datetime)
    return {"datetime" if is_time else "date": value.isoformat()}


def _from_json(text: str) -> dict[str, Value]:
    fields = json.loads(text)
    for name, value in fields.items():
        if isinstance(value, dict):  # no field holds one
            ((kind, iso),) = value.items()
            is_time = kind == "datetime"
            fields[name] = (datetime.datetime if is_time else datetime.date).fromisoformat(iso)
    return fields


def _checksum(position: int, text: str) -> int:
    return zlib.crc32(text.encode(), position & 0xFFFFFFFF)


def _chained(checksums: Iterable[int], crc: int) -> int:
    """CRC-32 of the checksums of rows, after those of which it is `crc`."""
    return zlib.crc32(np.fromiter(checksums, "<u4").tobytes(), crc)


def _rows(position: int, fields: Mapping[str, Value]) -> Iterator[_Row]:
    block = position >> _BLOCK_BITS
    for name, value in fields.items():
        for kind, one in stored(value):
            yield block, name, kind, one, position


# --- Reading --------------------------------------------------------------------------------


class FieldStore:
    """The fields of an index's first documents, as they were when it was opened.

    Safe for several threads. What is read stays the same whatever a writer does meanwhile, and
    after the file was deleted; only after a fork is it opened anew, and must still be there.
    """

    def __init__(self, file: Path, num_documents: int):
        """Raises FileNotFoundError or IndexFormatError, naming the file."""
        self._file, self._n = file, num_documents
        self._names: dict[str, list[str]] | None = None
        self._stamp: tuple[int, ...] | None = None  # of a file that is read without locks
        self._descriptor: int | None = None
        self._open()

    def __len__(self) -> int:
        return self._n

    def fields(self, position: int) -> dict[str, Value]:
        """A document's fields, in the order in which they were given."""
        return self.several([range(self._n)[position]])[0]

    def several(self, positions: list[int]) -> list[dict[str, Value]]:
        """The fields of documents at positions 0..N-1."""
        found: dict[int, dict[str, Value]] = {}
        for start in range(0, len(positions), _SOUGHT):
            part = positions[start : start + _SOUGHT]
            marks = ", ".join("?" * len(part))
            rows = self._read(f"SELECT * FROM documents WHERE position IN ({marks})", part)
            found |= {row[0]: _checked(self._file, *row) for row in rows}
        return [found.get(position, {}) for position in positions]

    def matching(self, where: Mapping[str, Any]) -> np.ndarray:
        """Positions of the documents that a filter lets through, int64 [n], ascending.

        Raises:
          FilterError: see `parse_filter`; or a field that no document has, unless for `exists`.
        """
        return np.flatnonzero(self.allowed(where))

    def allowed(self, where: Mapping[str, Any]) -> np.ndarray:
        """Which documents a filter lets through, bool [N]; see `matching`."""
        return self._evaluate(parse_filter(where))

    def names(self) -> dict[str, list[str]]:
        """The fields that documents have, and what they hold: number, string, bool, list."""
        if self._names is None:
            self._names = {name: words for name, words in sorted(self._find_names().items())}
        return {name: list(words) for name, words in self._names.items()}

    def close(self) -> None:
        """Let go of the file. Nothing can be read afterwards."""
        with self._lock:
            self._connection.close()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __del__(self, getpid: Any = os.getpid, close: Any = os.close) -> None:
        # Modules may be gone by now.
        if not hasattr(self, "_connection"):
            return
        if self._pid != getpid():
            _INHERITED.append(self._connection)
            return
        self._connection.close()
        if self._descriptor is not None:
            close(self._descriptor)

    def verify(self) -> None:
        """Raises IndexFormatError; see `verify_fields`."""
        self._run(lambda connection: _verify(connection, self._file))

    def checksum(self) -> int:
        """See `fields_checksum`."""
        rows = self._read(
            "SELECT checksum FROM documents WHERE position < ? ORDER BY position", [self._n]
        )
        if not all(type(sum_) is int and 0 <= sum_ < 1 << 32 for (sum_,) in rows):
            raise IndexFormatError(f"{self._file}: damaged: a row without a checksum")
        return _chained((sum_ for (sum_,) in rows), 0)

    # --- Filters

    def _evaluate(self, expression: Expression) -> np.ndarray:
        if isinstance(expression, Lookup):
            return self._look_up(expression)
        if isinstance(expression, Not):
            return ~self._evaluate(expression.part)
        is_all = isinstance(expression, All)
        found = np.full(self._n, is_all)
        for part in expression.parts:
            if is_all:
                found &= self._evaluate(part)
            else:
                found |= self._evaluate(part)
        return found

    def _look_up(self, lookup: Lookup) -> np.ndarray:
        found = np.zeros(self._n, bool)
        for block, positions in self._positions(lookup):
            first = block << _BLOCK_BITS
            last = min(first + (1 << _BLOCK_BITS), self._n)
            if len(positions) and not (first <= positions.min() and positions.max() < last):
                raise IndexFormatError(f"{self._file}: damaged: a value belongs to no document")
            found[positions] = True
        if lookup.kind is not None and not found.any() and not self._has(lookup.name):
            known = [f"{name} ({', '.join(words)})" for name, words in self.names().items()]
            raise FilterError(
                f"{lookup.path}: no document has a field {lookup.name!r:.60}; there are "
                f"{', '.join(known) or 'none'} ({self._file})"
            )
        return found

    def _positions(self, lookup: Lookup) -> Iterator[tuple[int, np.ndarray]]:
        among = lookup.among
        if among is not None and len(among) > _SOUGHT:
            terms, parameters = lookup._replace(among=None).sql()
            for block in self._blocks():
                rows = self._read(
                    f"SELECT value, position FROM search WHERE block = ? AND {terms} "
                    "AND position < ?",
                    [block, *parameters, self._n],
                )
                yield block, _integers(self._file, [at for value, at in rows if value in among])
            return
        terms, parameters = lookup.sql()
        for block in self._blocks():
            ((joined,),) = self._read(
                f"SELECT group_concat(position) FROM search WHERE block = ? AND {terms} "
                "AND position < ?",
                [block, *parameters, self._n],
            )
            yield block, _parse_positions(self._file, joined)

    def _blocks(self) -> range:
        return range((self._n + (1 << _BLOCK_BITS) - 1) >> _BLOCK_BITS)

    def _has(self, name: str) -> bool:
        return any(
            self._read(
                "SELECT 1 FROM search WHERE block = ? AND name = ? AND position < ? LIMIT 1",
                [block, name, self._n],
            )
            for block in self._blocks()
        )

    def _find_names(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for block in self._blocks():
            name: Any = ""
            while rows := self._read(
                "SELECT name FROM search WHERE block = ? AND name > ? ORDER BY name LIMIT 1",
                [block, name],
            ):
                ((name,),) = rows
                if not isinstance(name, str):
                    raise IndexFormatError(f"{self._file}: damaged: a field without a name")
                for kind, word in _WORDS.items():
                    if word not in found.get(name, []) and self._read(
                        "SELECT 1 FROM search WHERE block = ? AND name = ? AND kind = ? "
                        "AND position < ? LIMIT 1",
                        [block, name, kind, self._n],
                    ):
                        found[name] = [*found.get(name, []), word]
        return found

    # --- The file

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._connect()
        self._pid = os.getpid()  # last: until then the connection is another process's

    def _connect(self) -> None:
        with _naming(self._file):
            try:
                self._stamp = None
                self._connection = _reading(self._file, "mode=ro")
            except sqlite3.OperationalError as error:
                # Where SQLite cannot make the files beside it that its locks need, it reads without
                # locks, and changes are noticed by the file's time. Not beside a log that counts.
                if _code(error) not in _NO_LOCKS or _size(companions(self._file)[0]):
                    raise
                if self._descriptor is None:
                    self._descriptor = os.open(self._file, os.O_RDONLY)
                self._stamp = self._state()
                self._connection = _reading(self._file, "mode=ro&immutable=1")

    def _state(self) -> tuple[int, ...]:
        """What changes when somebody writes to the file."""
        assert self._descriptor is not None
        while True:
            state = os.fstat(self._descriptor)
            if abs(time.time() - state.st_mtime) > _SETTLED:
                return state.st_mtime_ns, state.st_size
            time.sleep(_SETTLED)

    def _read(self, statement: str, parameters: list[Any]) -> list[Any]:
        return self._run(lambda connection: connection.execute(statement, parameters).fetchall())

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._pid != os.getpid():
            # SQLite's connections do not survive a fork, nor may the child close them.
            inherited = self._connection
            try:
                self._open()
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self._file}: gone since this process was forked, for the index was "
                    "compacted; refresh() it, or open it again"
                ) from None
            _INHERITED.append(inherited)
        with self._lock, _naming(self._file):
            for _ in range(_TRIES):
                try:
                    result = work(self._connection)
                    if self._stamp is None or self._stamp == self._state():
                        return result
                except (sqlite3.DatabaseError, IndexFormatError):
                    if self._stamp is None or self._stamp == self._state():
                        raise
                self._connection.close()
                self._connect()
            raise TimeoutError(f"{self._file}: written without pause, so it cannot be read")


def _reading(file: Path, options: str) -> sqlite3.Connection:
    uri = f"file:{urllib.parse.quote(os.fsencode(file.absolute()))}?{options}"
    kind = os.stat(file).st_mode
    if not stat.S_ISREG(kind):
        raise IndexFormatError(f"{file}: is no file")
    connection = sqlite3.connect(
        uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
    )
    try:
        _set_up(connection, cache=8)
        connection.execute("PRAGMA query_only = ON")
        _check_tables(connection, file)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: sqlite3.Connection, cache: int) -> None:
    """Args: cache: MiB of memory."""
    connection.execute(f"PRAGMA cache_size = {-cache * 1024}")
    connection.execute("PRAGMA mmap_size = 0")  # a file cut short would end the process
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")


def _check_tables(connection: sqlite3.Connection, file: Path) -> None:
    mark, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if mark != _MARK:
        raise IndexFormatError(f"{file}: damaged, or no file of an index's fields")
    if version != _VERSION:
        raise IndexFormatError(
            f"{file}: version {version} of the fields' format; this colbert_jax reads {_VERSION}"
        )
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql NOTNULL").fetchall()
    if dict(found) != _TABLES or len(found) != len(_TABLES):
        raise IndexFormatError(f"{file}: damaged: its tables are not those of an index's fields")


def _checked(file: Path, position: Any, checksum: Any, text: Any) -> dict[str, Value]:
    if not isinstance(text, str) or checksum != _checksum(position, text):
        raise IndexFormatError(f"{file}: damaged: the fields of document {position}")
    return _from_json(text)


def _parse_positions(file: Path, joined: Any) -> np.ndarray:
    if joined is None:
        return np.zeros(0, np.int64)
    if not isinstance(joined, str) or joined.encode().translate(None, b"0123456789,"):
        raise IndexFormatError(f"{file}: damaged: a value belongs to no document")
    return np.fromstring(joined, np.int64, sep=",")


def _integers(file: Path, positions: list[Any]) -> np.ndarray:
    if not all(type(position) is int for position in positions):
        raise IndexFormatError(f"{file}: damaged: a value belongs to no document")
    return np.array(positions, np.int64)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


# --- Checking -------------------------------------------------------------------------------


def fields_checksum(file: Path, num_documents: int) -> int:
    """CRC-32 of the checksums of the rows of an index's documents, by position.

    It tells a file whose log was lost, or that is another state's: each is whole in itself.
    """
    with contextlib.closing(FieldStore(file, num_documents)) as store:
        return store.checksum()


def verify_fields(file: Path, num_documents: int, checksum: int | None = None) -> None:
    """Read all of a file, and compare what filters look up with what the documents have.

    Args:
      checksum: that `fields_checksum` must find.

    Raises:
      FileNotFoundError, IndexFormatError: naming the file.
    """
    with contextlib.closing(FieldStore(file, num_documents)) as store:
        store.verify()
        if checksum not in (None, store.checksum()):
            raise IndexFormatError(
                f"{file}: damaged: its checksum differs: it is another state's, or its log "
                f"({companions(file)[0].name}) was lost"
            )


def _verify(connection: sqlite3.Connection, file: Path) -> None:
    connection.execute("BEGIN")  # both tables as they are at one moment
    try:
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise IndexFormatError(f"{file}: damaged: {' '.join(str(found).split())}")
        documents = connection.execute("SELECT * FROM documents ORDER BY position")
        search = connection.execute("SELECT * FROM search ORDER BY block, name, kind, value")
        blocks = itertools.groupby(documents, lambda row: row[0] >> _BLOCK_BITS)
        lookups = itertools.groupby(search, lambda row: row[0])
        for one, other in itertools.zip_longest(blocks, lookups):
            expected = [
                row
                for position, checksum, text in (() if one is None else one[1])
                for row in _rows(position, _checked(file, position, checksum, text))
            ]
            if sorted(expected) != list(() if other is None else other[1]) or expected[0][0] < 0:
                raise IndexFormatError(f"{file}: damaged: filters and documents do not agree")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


# --- Errors ---------------------------------------------------------------------------------


# No locks can be had: what SQLite keeps beside the file cannot be made or used.
_NO_LOCKS = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
)
_NO_ROOM = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Raise errors of SQLite as ours, naming the file."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise  # ours
    except sqlite3.Error as error:
        raise _ours(error, file) from None


def _ours(error: sqlite3.Error, file: Path) -> Exception:
    extended, code = getattr(error, "sqlite_errorcode", 0), _code(error)
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    if extended in _NO_ROOM:  # SQLite tells a quota, or a limit on files, from no other error
        return OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)} ({error})", str(file))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RuntimeError(f"{file}: another process is writing to it")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY):
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as full:  # out of handles
            return OSError(full.errno, full.strerror, str(file))
        why = "cannot be opened or written"
        if _size(companions(file)[0]):
            why += ": a writer was killed, and the next one, or a reader that may write, mends it"
        return PermissionError(errno.EACCES, f"{why} ({error})", str(file))
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL):
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({error})", str(file))
    if code == sqlite3.SQLITE_TOOBIG:
        return ValueError(f"{file}: a document's fields are too long: {error}")
    return IndexFormatError(f"{file}: damaged: {error}")


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
