"""The index on disk: a folder of flat `.npy` arrays and one `metadata.json`, written last.

    metadata.json              format version, settings, counts, model fingerprint, checksums
    centroids.npy              float32 [K, D], every value representable in float16
    bucket_cutoffs.npy         float32 [2^b - 1]
    bucket_weights.npy         float32 [2^b]
    codes.npy                  int32   [T]           centroid of every token
    residuals.npy              uint8   [T, D * b / 8]
    offsets.npy                int64   [N + 1]       document i: tokens offsets[i]..offsets[i+1]-1
    lists.npy                  int32   [L]           per centroid, the documents with a token there
    list_offsets.npy           int64   [K + 1]
    pids.npy, pid_offsets.npy    uint8, int64   document ids as UTF-8, where they are not 0..N-1
    texts.npy, text_offsets.npy  uint8, int64   the documents' texts, where they are kept

Codes, residual bytes and bucket order are Stanford ColBERT's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import stat
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from colbert_jax.compression.codec import check_packable
from colbert_jax.config import NBITS
from colbert_jax.files import present, write_json
from colbert_jax.index.folder import METADATA, building_folder, locate, naming

FORMAT_VERSION = 1
_TRIES = 20  # to open an index that stays as it is
_LARGEST = float(np.finfo(np.float16).max)  # weight; larger ones overflow in sums of squares
_ZEROS = 1 << 20  # bytes written at a time
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


_T = TypeVar("_T")


class IndexFormatError(ValueError):
    """A folder that is not a readable index."""


# --- Metadata -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What `metadata.json` says of an index.

    Attributes:
      build: a name of its own for every index that was built.
      num_documents, num_empty_documents: N, and how many of them have no token.
      num_tokens, num_centroids: T and K.
      num_list_entries: entries of all inverted lists.
      dim, nbits: D, and bits per dimension of the residuals.
      settings: what the index was built with.
      model: how to load the model, how to know it, and its search settings (`ColBERT.describe`);
        None: unknown.
      columns: the bytes of each column of strings that is there.
      checksums: CRC-32 of each file; that of `metadata.json` is of the other fields.
      origin: of a converted index, where it comes from.
    """

    build: str
    num_documents: int
    num_empty_documents: int
    num_tokens: int
    num_centroids: int
    num_list_entries: int
    dim: int
    nbits: int
    settings: Mapping[str, Any]
    model: Mapping[str, Any] | None
    columns: Mapping[str, int]
    checksums: Mapping[str, int]
    origin: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of `metadata.json`."""
        fields: dict[str, Any] = {"format_version": FORMAT_VERSION, **vars(self)}
        if self.origin is None:
            del fields["origin"]
        columns, checksums = fields.pop("columns"), fields.pop("checksums")
        fields["text_columns"] = sorted(columns)
        fields |= {_size_field(name): columns[name] for name in sorted(columns)}
        return fields | {"checksums": checksums}

    @classmethod
    def from_json(cls, file: Path, fields: Mapping[str, Any]) -> Metadata:
        """Raises IndexFormatError, naming file and field, for one that is missing or damaged."""

        def checked(name: str, right: Any) -> Any:
            if name not in fields or not right(fields[name]):
                raise IndexFormatError(f"{file}: field {name!r} is missing or damaged")
            return fields[name]

        names = checked("text_columns", _are_columns)
        values = {name: checked(name, right) for name, right in _FIELDS.items()}
        columns = {name: checked(_size_field(name), _is_count) for name in names}
        if values["num_empty_documents"] >= values["num_documents"]:
            raise IndexFormatError(
                f"{file}: damaged: {values['num_empty_documents']} of {values['num_documents']} "
                "documents are empty"
            )
        try:
            check_packable(values["dim"], values["nbits"])
        except ValueError as error:
            raise IndexFormatError(f"{file}: damaged: {error}") from None
        _check_model(file, values["model"])
        origin = checked("origin", _is_object) if fields.get("origin") is not None else None
        metadata = cls(**values, columns=columns, origin=origin)
        demanded = {f"{name}.npy" for name in array_specs(metadata)}
        named = metadata.checksums.keys() - {METADATA}
        if named != demanded:
            other = ", ".join(sorted(named ^ demanded))
            raise IndexFormatError(
                f"{file}: damaged: field 'checksums' and the other fields differ in {other}"
            )
        return metadata


def own_checksum(fields: Mapping[str, Any]) -> int:
    """CRC-32 of the fields of `metadata.json`, whatever their order, but for itself."""
    others = {name: sum_ for name, sum_ in fields["checksums"].items() if name != METADATA}
    text = json.dumps({**fields, "checksums": others}, sort_keys=True)
    return zlib.crc32(text.encode("ascii"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    """A number of documents or centroids: there is one, and its place is an int32."""
    return _is_count(value) and 1 <= value <= np.iinfo(np.int32).max


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_columns(value: Any) -> bool:
    return isinstance(value, list) and value in ([], ["pid"], ["text"], ["pid", "text"])


def _check_model(file: Path, model: Any) -> None:
    """Raises IndexFormatError unless a model has all that `ColBERT.describe` writes."""
    if model is None:
        return
    load = model.get("load")
    if not _is_object(load) or not isinstance(load.get("name_or_path"), str):
        wrong = "'load' names no checkpoint"
    elif not isinstance(model.get("fingerprint"), str):
        wrong = "'fingerprint' is no string"
    elif not _is_object(model.get("search")):
        wrong = "'search' is no object"
    else:
        return
    raise IndexFormatError(f"{file}: field 'model' is damaged: {wrong}")


_FIELDS: dict[str, Any] = {
    "build": lambda value: isinstance(value, str),
    "num_documents": _is_size,
    "num_empty_documents": _is_count,
    "num_tokens": lambda value: _is_count(value) and value > 0,
    "num_centroids": _is_size,
    "num_list_entries": _is_count,
    "dim": _is_size,
    "nbits": lambda value: _is_count(value) and value in NBITS,
    "settings": _is_object,
    "model": lambda value: value is None or _is_object(value),
    "checksums": lambda value: _is_object(value) and all(map(_is_count, value.values())),
}


def _size_field(column: str) -> str:
    return f"num_{column}_bytes"


def write_metadata(
    folder: Path,
    *,
    build: str,
    lengths: np.ndarray,
    num_centroids: int,
    num_list_entries: int,
    dim: int,
    nbits: int,
    settings: Mapping[str, Any],
    model: Mapping[str, Any] | None,
    columns: Mapping[str, int],
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write `metadata.json`, with the checksums of all arrays: the index is whole.

    Args:
      lengths: int[N], tokens of each document.
      others: see `Metadata`.
    """
    metadata = Metadata(
        build=build,
        num_documents=len(lengths),
        num_empty_documents=int((lengths == 0).sum()),
        num_tokens=int(lengths.sum()),
        num_centroids=num_centroids,
        num_list_entries=num_list_entries,
        dim=dim,
        nbits=nbits,
        settings=settings,
        model=model,
        columns=columns,
        checksums={},
        origin=origin,
    )
    names = [f"{name}.npy" for name in array_specs(metadata)]
    with IndexFiles(folder) as files:
        checksums = {name: files.checksum(name) for name in names}
    fields = dataclasses.replace(metadata, checksums=checksums).to_json()
    fields["checksums"] = {**checksums, METADATA: own_checksum(fields)}
    with naming(folder / METADATA):
        write_json(folder / METADATA, fields)


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the index in a folder, its fields checked.

    Raises:
      FileNotFoundError: no index there; says so where an unfinished build is.
      IndexFormatError: not an index this version reads.
    """
    with IndexFiles(folder) as files:
        return files.metadata()


def read_build(path: Path) -> str | None:
    """What the index at a path is called (`Metadata.build`); None where there is none.

    Raises IndexFormatError for one that this version cannot read.
    """
    try:
        return read_metadata(locate(path)).build
    except FileNotFoundError:
        return None


class IndexFiles:
    """The files of the folder that is at a place now, whatever takes that place meanwhile.

    Where the system can open files by their folder, an index and one that replaces it never mix.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            flags = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._descriptor = os.open(folder, flags)

    def __enter__(self) -> IndexFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def open(self, name: str) -> BinaryIO:
        """Open a file to be read, never waiting for a writer as with a named pipe.

        Raises:
          FileNotFoundError, OSError: naming the file; too many open files are no damage.
          IndexFormatError: it is a folder, a pipe or a device.
        """
        file = self.folder / name

        def opener(path: str, flags: int) -> int:
            where = path if self._descriptor is None else name
            flags |= getattr(os, "O_NONBLOCK", 0)
            try:
                descriptor = os.open(where, flags, dir_fd=self._descriptor)
            except OSError as error:
                error.filename = str(file)  # not only its name in the folder
                raise
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise IndexFormatError(f"{file}: is no file but a folder, pipe or device")
            return descriptor

        return open(file, "rb", opener=opener)

    def metadata(self) -> Metadata:
        """See `read_metadata`."""
        return Metadata.from_json(self.folder / METADATA, self.fields())

    def fields(self) -> dict[str, Any]:
        """The fields of `metadata.json`, of which only the version is checked."""
        file = self.folder / METADATA
        try:
            with self.open(METADATA) as stream:
                fields = json.loads(stream.read().decode("utf-8"))
            version = fields["format_version"]
        except IndexFormatError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            if building_folder(self.folder).is_dir():
                raise FileNotFoundError(
                    f"{self.folder}: no index yet, only an unfinished build: run it again to resume"
                ) from None
            raise FileNotFoundError(
                f"{self.folder}: no index there ({METADATA} is missing)"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IndexFormatError(f"{file}: damaged: {error!r}") from None
        if version != FORMAT_VERSION:
            raise IndexFormatError(
                f"{file}: format version {version}, this library reads {FORMAT_VERSION}"
            )
        return fields

    def checksum(self, name: str) -> int:
        """CRC-32 of a file, read in blocks."""
        crc = 0
        with self.open(name) as stream:
            while block := stream.read(1 << 22):
                crc = zlib.crc32(block, crc)
        return crc


# --- Arrays ---------------------------------------------------------------------------------


def array_specs(metadata: Metadata) -> dict[str, tuple[type, tuple[int, ...]]]:
    """File stem -> dtype and shape, from the counts in an index's metadata."""
    m = metadata
    specs: dict[str, tuple[type, tuple[int, ...]]] = {
        "centroids": (np.float32, (m.num_centroids, m.dim)),
        "bucket_cutoffs": (np.float32, (2**m.nbits - 1,)),
        "bucket_weights": (np.float32, (2**m.nbits,)),
        "codes": (np.int32, (m.num_tokens,)),
        "residuals": (np.uint8, (m.num_tokens, m.dim * m.nbits // 8)),
        "offsets": (np.int64, (m.num_documents + 1,)),
        "lists": (np.int32, (m.num_list_entries,)),
        "list_offsets": (np.int64, (m.num_centroids + 1,)),
    }
    for column, size in m.columns.items():
        data, offsets = string_arrays(column)
        specs |= {data: (np.uint8, (size,)), offsets: (np.int64, (m.num_documents + 1,))}
    return specs


def string_arrays(column: str) -> tuple[str, str]:
    """The file stems of a column of strings: of their bytes and of their offsets."""
    return f"{column}s", f"{column}_offsets"


def open_array(files: IndexFiles, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map one array read-only. Raises IndexFormatError where it is missing, damaged or another."""
    file = files.folder / f"{name}.npy"
    try:
        with files.open(file.name) as stream:
            found = _read_header(stream)
            if found != (np.dtype(dtype), shape):
                raise IndexFormatError(
                    f"{file}: holds {found[0]} {list(found[1])}, but {METADATA} promises "
                    f"{np.dtype(dtype)} {list(shape)}"
                )
            start = stream.tell()
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if os.fstat(stream.fileno()).st_size < start + size:
                raise IndexFormatError(f"{file}: truncated")
            if size == 0:  # can't be mapped
                return np.empty(shape, dtype)
            with naming(file):
                return np.memmap(stream, dtype, "r", start, shape)
    except FileNotFoundError:
        raise IndexFormatError(
            f"{file}: missing; the index is incomplete: build it again"
        ) from None
    except (IndexFormatError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged header fails in numpy's parser in many ways
        raise IndexFormatError(f"{file}: damaged or truncated: {error}") from None


def _read_header(stream: BinaryIO) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of a `.npy` file; ValueError for one that no index has."""
    version = np.lib.format.read_magic(stream)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[version[0]](stream)
    if fortran and len(shape) > 1:
        raise ValueError("in Fortran's order")
    return dtype, shape


def open_arrays(path: Path) -> tuple[Path, Metadata, dict[str, np.ndarray]]:
    """Folder, metadata and all arrays of an index, checked for size, dtype and consistent offsets.

    A build that replaces the index while it is being opened is noticed: the old index or the new
    one is read, never a mixture. Opening changes nothing on disk.
    """

    def read(files: IndexFiles) -> tuple[Path, Metadata, dict[str, np.ndarray]]:
        metadata = files.metadata()
        specs = array_specs(metadata)
        arrays = {name: open_array(files, name, *spec) for name, spec in specs.items()}
        return files.folder, metadata, arrays

    folder, metadata, arrays = _undisturbed(path, read, _TRIES)
    for name, total in (("offsets", "num_tokens"), ("list_offsets", "num_list_entries")):
        offsets = arrays[name]
        if (
            offsets[0] != 0
            or offsets[-1] != getattr(metadata, total)
            or (offsets[1:] < offsets[:-1]).any()  # differences may overflow
        ):
            raise IndexFormatError(f"{folder / name}.npy: damaged: not ascending from 0 to {total}")
    for name in ("bucket_cutoffs", "bucket_weights"):
        if not (np.abs(arrays[name]) <= _LARGEST).all():
            raise IndexFormatError(
                f"{folder / name}.npy: damaged: holds NaN or infinite values, or too large ones"
            )
    return folder, metadata, arrays


def verify(path: Path) -> None:
    """Read every file that an index has, and compare checksums.

    An index that is replaced meanwhile is not damaged: the new one is read. Metadata that somebody
    has edited are opened, but differ from their checksum; those of earlier versions have none.

    Raises:
      IndexFormatError: naming a file that is damaged or missing.
      FileNotFoundError: no index there.
    """

    def read(files: IndexFiles) -> None:
        fields = files.fields()
        for name, expected in Metadata.from_json(files.folder / METADATA, fields).checksums.items():
            try:
                found = own_checksum(fields) if name == METADATA else files.checksum(name)
            except FileNotFoundError:
                raise IndexFormatError(
                    f"{files.folder / name}: missing; the index is incomplete: build it again"
                ) from None
            if found != expected:
                raise IndexFormatError(f"{files.folder / name}: damaged: its checksum differs")

    _undisturbed(path, read, 1)


def _undisturbed(path: Path, read: Callable[[IndexFiles], _T], tries: int) -> _T:
    """read(files) of an index that stays as it is meanwhile; again with what replaces it.

    Args:
      tries: how often it may fail though nothing has changed.
    """
    failed = 0
    while True:
        folder = locate(path)
        there = identity(folder)
        try:
            with IndexFiles(folder) as files:
                value = read(files)
            if there is not None and identity(folder) == there:
                return value
            problem: Exception = IndexFormatError(f"{path}: replaced while it was being read")
        except (IndexFormatError, FileNotFoundError) as error:
            problem = error
        # What fails while builds are published one after the other may not fail with the next; what
        # fails though nothing has changed is damaged for good.
        failed = failed + 1 if identity(locate(path)) == there else 0
        if failed >= (tries if there else _TRIES):
            raise problem
        time.sleep(0.01)


def identity(folder: Path) -> tuple[int, ...] | None:
    """What tells the index in a folder from every other that was or will be there. That of the
    folder changes when it is moved away and back."""
    try:
        stats = folder.stat(), (folder / METADATA).stat()
    except OSError:
        return None
    return tuple(n for s in stats for n in (s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns))


def write_array(file: Path, array: np.ndarray) -> None:
    with ArrayWriter(file, array.dtype, array.shape[1:]) as writer:
        writer.append(array)


class ArrayWriter:
    """A `.npy` file that grows by rows, cut back to a committed number of rows when reopened.

    The header is written at its final size at once and patched by `close`; until then the file
    claims no rows, so a reader can't take it for whole.
    """

    def __init__(self, file: Path, dtype: Any, row: tuple[int, ...] = (), rows: int = 0):
        """
        Args:
          row: shape of one row.
          rows: how many rows a former run committed; what follows them is cut off.

        Errors of writing name the file.
        """
        self._file = file
        self.dtype, self.row, self.rows = np.dtype(dtype), row, rows
        header = self._header(0)
        size = len(header) + rows * self._row_bytes()
        if rows and (not present(file) or file.stat().st_size < size):
            raise IndexFormatError(
                f"{file}: shorter than its build committed; delete {file.parent} and build again"
            )
        # Without a buffer: what has no room fails where it is written, not again in closing.
        self._stream = file.open("r+b" if rows else "w+b", buffering=0)
        try:
            self._write(header)
            with naming(file):
                self._stream.truncate(size)
            self._stream.seek(size)
        except BaseException:
            self._stream.close()
            raise

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self.dtype)
        assert rows.shape[1:] == self.row, (rows.shape, self.row)
        self._write(rows.reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def reserve(self, rows: int) -> None:
        """Append rows of zeros that have their room on disk, to be written through a map.

        In a file with holes, a map's write that finds the disk full ends the process (SIGBUS).
        """
        size = rows * self._row_bytes()
        start = self._stream.tell()
        try:
            with naming(self._file):
                os.posix_fallocate(self._stream.fileno(), start, size)
            self._stream.seek(start + size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_FALLOCATE:
                raise
            zeros = bytes(min(size, _ZEROS))
            for at in range(0, size, _ZEROS):
                self._write(zeros[: size - at])
        self.rows += rows

    def sync(self) -> None:
        with naming(self._file):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        with self._stream:
            self._stream.seek(0)
            self._write(self._header(self.rows))
            self.sync()

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        with naming(self._file):
            while len(left):
                left = left[self._stream.write(left) :]

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the file, unless an error ends the block: then it stays unfinished."""
        if kind is None:
            self.close()
        else:
            self._stream.close()

    def _row_bytes(self) -> int:
        return int(np.prod(self.row, dtype=np.int64)) * self.dtype.itemsize

    def _header(self, rows: int) -> bytes:
        shape = (rows, *self.row)
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        magic = b"\x93NUMPY\x01\x00"
        room = 128 - len(magic) - 2
        return magic + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"
