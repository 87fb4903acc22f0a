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
    texts.npy, text_offsets.npy  uint8, int64   the passages, where they are kept

Codes, residual bytes and bucket order are Stanford ColBERT's.
"""

from __future__ import annotations

import json
import operator
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.files import previous_folder, replace_folder

FORMAT_VERSION = 1
METADATA = "metadata.json"
_BUILDING = ".building"


class IndexFormatError(ValueError):
    """A folder that is not a readable index."""


def array_specs(metadata: dict[str, Any]) -> dict[str, tuple[type, tuple[int, ...]]]:
    """File stem -> dtype and shape, from the counts in an index's metadata."""
    n, t, k, dim, nbits = (
        operator.index(metadata[key])
        for key in ("num_documents", "num_tokens", "num_centroids", "dim", "nbits")
    )
    specs: dict[str, tuple[type, tuple[int, ...]]] = {
        "centroids": (np.float32, (k, dim)),
        "bucket_cutoffs": (np.float32, (2**nbits - 1,)),
        "bucket_weights": (np.float32, (2**nbits,)),
        "codes": (np.int32, (t,)),
        "residuals": (np.uint8, (t, dim * nbits // 8)),
        "offsets": (np.int64, (n + 1,)),
        "lists": (np.int32, (metadata["num_list_entries"],)),
        "list_offsets": (np.int64, (k + 1,)),
    }
    for column in metadata["text_columns"]:
        specs[column + "s"] = (np.uint8, (metadata[f"num_{column}_bytes"],))
        specs[column + "_offsets"] = (np.int64, (n + 1,))
    return specs


def open_array(folder: Path, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map one array read-only. Raises IndexFormatError where it is missing, damaged or another."""
    file = folder / f"{name}.npy"
    try:
        # An empty file can't be mapped; every other array stays on disk.
        array = np.load(file, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
        size = file.stat().st_size
    except FileNotFoundError:
        raise IndexFormatError(
            f"{file}: missing; the index is incomplete: build it again"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # a damaged header fails in numpy's parser in many ways
        raise IndexFormatError(f"{file}: damaged or truncated: {error}") from None
    if array.dtype != dtype or array.shape != shape:
        raise IndexFormatError(
            f"{file}: holds {array.dtype} {list(array.shape)}, but {METADATA} promises "
            f"{np.dtype(dtype)} {list(shape)}"
        )
    if size < array.nbytes:
        raise IndexFormatError(f"{file}: truncated")
    return array


_FIELDS: dict[str, Any] = {
    "build": str,
    "num_documents": int,
    "num_empty_documents": int,
    "num_tokens": int,
    "num_centroids": int,
    "num_list_entries": int,
    "dim": int,
    "nbits": int,
    "settings": dict,
    "model": (dict, type(None)),
    "text_columns": list,
    "checksums": dict,
}


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the index in a folder, its fields checked.

    Raises:
      FileNotFoundError: no index there; says so where an unfinished build is.
      IndexFormatError: not an index this version reads.
    """
    file = folder / METADATA
    try:
        metadata = json.loads(file.read_text("utf-8"))
        version = metadata["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        if building_folder(folder).is_dir():
            raise FileNotFoundError(
                f"{folder}: no index yet, only an unfinished build: run it again to resume"
            ) from None
        raise FileNotFoundError(f"{folder}: no index there ({METADATA} is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IndexFormatError(f"{file}: damaged: {error!r}") from None
    if version != FORMAT_VERSION:
        raise IndexFormatError(
            f"{file}: format version {version}, this library reads {FORMAT_VERSION}"
        )
    fields = dict(_FIELDS)
    columns = metadata.get("text_columns")
    if isinstance(columns, list):
        fields |= {f"num_{column}_bytes": int for column in columns}
    for name, kind in fields.items():
        if not isinstance(metadata.get(name, ...), kind):
            raise IndexFormatError(f"{file}: field {name!r} is missing or damaged")
    return metadata


def open_arrays(path: Path) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """Folder, metadata and all arrays of an index, checked for size, dtype and consistent offsets.

    A build that replaces the index while it is being opened is noticed: the old index or the new
    one is read, never a mixture. Opening changes nothing on disk.
    """
    problem: Exception = IndexFormatError(f"{path}: replaced while it was being opened")
    for _ in range(20):
        folder = _locate(path)
        try:
            metadata = read_metadata(folder)
            specs = array_specs(metadata)
            arrays = {name: open_array(folder, name, *spec) for name, spec in specs.items()}
            if read_metadata(folder)["build"] == metadata["build"]:
                break
        except (IndexFormatError, FileNotFoundError) as error:
            problem = error  # for good, unless a build is just being published
        time.sleep(0.01)
    else:
        raise problem
    for name, total in (("offsets", "num_tokens"), ("list_offsets", "num_list_entries")):
        offsets = arrays[name]
        if offsets[0] != 0 or offsets[-1] != metadata[total] or (np.diff(offsets) < 0).any():
            raise IndexFormatError(f"{folder / name}.npy: damaged: not ascending from 0 to {total}")
    return folder, metadata, arrays


def _locate(path: Path) -> Path:
    """The index's folder: `path`, or where an interrupted `publish` has left the former index."""
    aside = previous_folder(path)
    return aside if not path.exists() and (aside / METADATA).is_file() else path


def building_folder(path: Path) -> Path:
    """Where an index is put together before it is published: a sibling, on the same file system."""
    return path.with_name(path.name + _BUILDING)


def publish(building: Path, path: Path) -> None:
    """Make a finished folder the index at `path`, in place of the one that is there.

    Readers find the old index or the new one at every moment (`open_arrays`). A kill between the
    two renames leaves the old one aside, where readers look too and `recover` brings it back.
    Only the process that holds the building folder may call this.
    """
    replace_folder(building, path)


def write_array(file: Path, array: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


class ArrayWriter:
    """A `.npy` file that grows by rows, cut back to a committed number of rows when reopened.

    The header is written at its final size at once and patched by `close`; until then the file
    claims no rows, so a reader can't take it for whole.
    """

    def __init__(self, file: Path, dtype: type, row: tuple[int, ...] = (), rows: int = 0):
        """
        Args:
          row: shape of one row.
          rows: how many rows a former run committed; what follows them is cut off.
        """
        self.dtype, self.row, self.rows = np.dtype(dtype), row, rows
        header = self._header(0)
        size = len(header) + rows * self._row_bytes()
        if rows and (not file.is_file() or file.stat().st_size < size):
            raise IndexFormatError(
                f"{file}: shorter than its build committed; delete {file.parent} and build again"
            )
        self._stream = file.open("r+b" if rows else "w+b")
        self._stream.write(header)
        self._stream.truncate(size)
        self._stream.seek(size)

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self.dtype)
        assert rows.shape[1:] == self.row, (rows.shape, self.row)
        self._stream.write(rows.data)
        self.rows += len(rows)

    def sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        with self._stream:
            self._stream.seek(0)
            self._stream.write(self._header(self.rows))
            self.sync()

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


class StringWriter:
    """Strings of an index as one array of UTF-8 bytes and one of offsets."""

    def __init__(self, folder: Path, column: str):
        self._bytes = ArrayWriter(folder / f"{column}s.npy", np.uint8)
        self._offsets = ArrayWriter(folder / f"{column}_offsets.npy", np.int64)
        self._offsets.append(np.zeros(1, np.int64))

    def extend(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8") for string in strings]
        ends = self._bytes.rows + np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._offsets.append(ends)

    @property
    def num_bytes(self) -> int:
        return self._bytes.rows

    def __enter__(self) -> StringWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bytes.__exit__(*error)
        self._offsets.__exit__(*error)


def delete_strings(folder: Path, column: str) -> None:
    for name in (f"{column}s.npy", f"{column}_offsets.npy"):
        (folder / name).unlink(missing_ok=True)


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
        raise NotImplementedError


class Positions(Column):
    """The ids of a collection without ids of its own: "0", "1", ..."""

    def one(self, i: int) -> str:
        return str(i)


class Strings(Column):
    """Strings on disk: `data` holds their UTF-8 bytes, string i those from offsets[i] on."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        super().__init__(len(offsets) - 1)
        self._data, self._offsets = data, offsets

    def one(self, i: int) -> str:
        return self._data[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")
