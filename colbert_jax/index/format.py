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
    fields.sqlite                               the documents' fields, where they have any

and, where the index was built with learned vectors (`compression.learned`), of width F:

    learned_vectors.npy        int8    [N, F]
    learned_scales.npy         float32 [N]
    learned_landmarks.npy, learned_projection.npy, learned_tokens.npy, learned_means.npy,
    learned_solver.npy         float32           what makes the vectors of queries and documents

Codes, residual bytes and bucket order are Stanford ColBERT's.

A build writes format version 1. The first change (`index.changes`) makes it version 2, in which
`metadata.json` also names the file of every array and a generation:
  * arrays of tokens, documents and centroids grow at their end. Committed bytes never change: the
    header of such a file states the rows that it began with, `metadata.json` those that count.
  * `lists.npy` may cover only the first documents and centroids; searchers invert the others.
  * `deleted.npy`, uint8 [ceil(N / 8)]: bit i % 8 of byte i // 8, where document i is deleted.
  * a file that is replaced gets a new name, with the generation in it: `lists-7.npy`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from colbert_jax.compression.codec import check_packable
from colbert_jax.compression.learned import Predictor
from colbert_jax.config import NBITS
from colbert_jax.files import present, write_json
from colbert_jax.index.folder import METADATA, building_folder, locate, naming

FORMAT_VERSION = 1  # of what a build writes
CHANGED_VERSION = 2  # of what was changed since
# Arrays that grow at their end.
_STRINGS = ("pids", "pid_offsets", "texts", "text_offsets")
LEARNED = ("learned_vectors", "learned_scales")
PREDICTOR = tuple(f"learned_{name}" for name in Predictor._fields)
GROWING = frozenset(("codes", "residuals", "offsets", "centroids", "deleted", *_STRINGS, *LEARNED))
_ARRAYS = GROWING | {"bucket_cutoffs", "bucket_weights", "lists", "list_offsets", *PREDICTOR}
_TRIES = 20  # to open an index that stays as it is
_HEADER = 128  # bytes of the header of an array's file
_LARGEST = float(np.finfo(np.float16).max)  # weight; larger ones overflow in sums of squares
_ZEROS = 1 << 20  # bytes written at a time
_READ = 1 << 22  # bytes read at a time
_MOST_CHANGES = 10**17  # so that names of files have no more digits than they may
_FARTHEST = 4.0  # no two embeddings of unit length are; centroids are about as long
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
      num_documents, num_empty_documents: N, deleted ones included, and how many have no token.
      num_tokens, num_centroids: T and K.
      num_list_entries: entries of all inverted lists on disk.
      dim, nbits: D, and bits per dimension of the residuals.
      settings: what the index was built with.
      model: how to load the model, how to know it, and its search settings (`ColBERT.describe`);
        None: unknown.
      columns: the bytes of each column of strings that is there.
      checksums: CRC-32 of the committed bytes of each array's file; that of `metadata.json` is of
        its other fields, that of the documents' fields of their rows (`index.fields`).
      origin: of a converted index, where it comes from.
      outlier_distance: the distance from its centroid that one in ten held-out token embeddings
        exceeded when the centroids were trained; None: not known.
      fields: the file of the documents' fields; None where they have none.
      learned: the sizes "landmarks", "tokens" and "width" of the learned vectors and of what makes
        them; None: there are none.
      change: what changed since the build; None: nothing.
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
    outlier_distance: float | None = None
    fields: str | None = None
    learned: Mapping[str, int] | None = None
    change: Change | None = None

    @property
    def generation(self) -> int:
        """How often the index was changed since it was built."""
        return 0 if self.change is None else self.change.generation

    @property
    def state(self) -> str:
        """A name of its own for every state of every index."""
        return self.build if self.change is None else self.change.name

    @property
    def num_deleted(self) -> int:
        return 0 if self.change is None else self.change.num_deleted

    def file(self, array: str) -> str:
        """The name of an array's file."""
        return f"{array}.npy" if self.change is None else self.change.files[array]

    def to_json(self) -> dict[str, Any]:
        """The fields of `metadata.json`."""
        version = FORMAT_VERSION if self.change is None else CHANGED_VERSION
        fields: dict[str, Any] = {"format_version": version, **vars(self)}
        for name in ("origin", "outlier_distance", "fields", "learned", "change"):
            if fields[name] is None:
                del fields[name]
        if self.model is not None:  # as earlier versions have it where it asks for nothing new
            search = self.model["search"].items()
            asked = {name: value for name, value in search if (name, value) != ("candidates", None)}
            fields["model"] = {**self.model, "search": asked}
        if self.change is not None:
            fields["change"] = vars(self.change)
        columns, checksums = fields.pop("columns"), fields.pop("checksums")
        fields["text_columns"] = sorted(columns)
        fields |= {_size_field(name): columns[name] for name in sorted(columns)}
        return fields | {"checksums": checksums}

    @classmethod
    def from_json(cls, file: Path, fields: Mapping[str, Any]) -> Metadata:
        """Raises IndexFormatError, naming file and field, for one that is missing or damaged."""
        changed = fields["format_version"] == CHANGED_VERSION
        checked = _Checked(file, fields)
        names = checked("text_columns", _are_columns)
        values = {name: checked(name, right) for name, right in _FIELDS.items()}
        columns = {name: checked(_size_field(name), _is_count) for name in names}
        change = Change.from_json(file, checked("change", _is_object)) if changed else None
        sizes = ("num_documents", "num_tokens", "num_centroids")
        for name in () if changed else sizes:
            checked(name, bool)  # a build has one of each
        empty, whole = values["num_empty_documents"], values["num_documents"]
        if empty > whole or (empty == whole and not changed):
            raise IndexFormatError(f"{file}: damaged: {empty} of {whole} documents are empty")
        if whole and not values["num_centroids"]:
            raise IndexFormatError(f"{file}: damaged: {whole} documents, but no centroids")
        try:
            check_packable(values["dim"], values["nbits"])
        except ValueError as error:
            raise IndexFormatError(f"{file}: damaged: {error}") from None
        _check_model(file, values["model"])
        given = {
            name: checked(name, right)
            for name, right in _OPTIONAL.items()
            if fields.get(name) is not None
        }
        metadata = cls(**values, **given, columns=columns, change=change)
        demanded = array_specs(metadata)
        if change is not None:
            change.check(file, metadata, demanded)
        for of in (*map(metadata.file, demanded), metadata.fields or ""):
            if _generation_in(of) > metadata.generation:
                raise IndexFormatError(f"{file}: damaged: {of} is newer than 'change.generation'")
        named = metadata.checksums.keys() - {METADATA, metadata.fields}
        files = {metadata.file(name) for name in demanded}
        if named != files:
            other = ", ".join(sorted(named ^ files))
            raise IndexFormatError(
                f"{file}: damaged: field 'checksums' and the other fields differ in {other}"
            )
        return metadata


@dataclass(frozen=True)
class Change:
    """What `metadata.json` says of an index that was changed since it was built.

    Attributes:
      generation: the number of changes.
      name: of the last change, one that nothing else has.
      files: array -> file.
      num_deleted: documents that are deleted, but still have their place.
      num_listed_documents, num_listed_centroids: what the inverted lists on disk cover.
      next_id: the id of the next document without one, where ids are numbers that the index gave;
        None: ids are positions, or the documents' own.
      num_added_tokens, num_outliers: of the documents added, and how many of these tokens are
        farther than `outlier_distance` from their centroid.
    """

    generation: int
    name: str
    files: Mapping[str, str]
    num_deleted: int
    num_listed_documents: int
    num_listed_centroids: int
    next_id: int | None
    num_added_tokens: int
    num_outliers: int

    @classmethod
    def from_json(cls, file: Path, fields: Mapping[str, Any]) -> Change:
        checked = _Checked(file, fields, "change.")
        return cls(**{name: checked(name, right) for name, right in _CHANGE.items()})

    def check(self, file: Path, metadata: Metadata, demanded: Mapping[str, Any]) -> None:
        """Raises IndexFormatError where the fields contradict each other."""
        for name in demanded.keys() ^ self.files.keys():
            raise IndexFormatError(f"{file}: damaged: field 'change.files' and {name!r} differ")
        for name, of in self.files.items():
            if not is_array_file(of, name):
                raise IndexFormatError(f"{file}: damaged: field 'change.files' names {of!r:.80}")
        for part, whole in (
            ("num_deleted", "num_documents"),
            ("num_listed_documents", "num_documents"),
            ("num_listed_centroids", "num_centroids"),
        ):
            if getattr(self, part) > getattr(metadata, whole):
                raise IndexFormatError(f"{file}: damaged: {part} exceeds {whole}")
        if self.num_outliers > self.num_added_tokens:
            raise IndexFormatError(f"{file}: damaged: num_outliers exceeds num_added_tokens")
        if self.next_id is not None and "pid" not in metadata.columns:
            raise IndexFormatError(f"{file}: damaged: 'change.next_id', but there are no ids")


def _generation_in(file: str) -> int:
    """The generation in the name of a file; 0 where there is none."""
    found = re.search(r"-([0-9]+)\.", file)
    return 0 if found is None else int(found[1])


def is_array_file(file: str, array: str) -> bool:
    """Whether a file's name is one that an index gives to an array."""
    return re.fullmatch(rf"{array}(-[1-9][0-9]{{0,17}})?\.npy", file, re.ASCII) is not None


def is_fields_file(file: str) -> bool:
    """Whether a file's name is one that an index gives to the documents' fields."""
    return re.fullmatch(r"fields(-[1-9][0-9]{0,17})?\.sqlite", file, re.ASCII) is not None


class _Checked:
    """The fields of a JSON object, each held to what it may be."""

    def __init__(self, file: Path, fields: Mapping[str, Any], where: str = ""):
        self._file, self._fields, self._where = file, fields, where

    def __call__(self, name: str, right: Any) -> Any:
        if name not in self._fields or not right(self._fields[name]):
            raise IndexFormatError(
                f"{self._file}: field {self._where + name!r} is missing or damaged"
            )
        return self._fields[name]


def own_checksum(fields: Mapping[str, Any]) -> int:
    """CRC-32 of the fields of `metadata.json`, whatever their order, but for itself."""
    others = {name: sum_ for name, sum_ in fields["checksums"].items() if name != METADATA}
    text = json.dumps({**fields, "checksums": others}, sort_keys=True)
    return zlib.crc32(text.encode("ascii"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    """A number of documents or centroids, whose places are int32."""
    return _is_count(value) and value <= np.iinfo(np.int32).max


def _are_sizes(learned: dict[str, Any]) -> bool:
    return learned.keys() == {"landmarks", "tokens", "width"} and all(
        _is_size(value) and value > 0 for value in learned.values()
    )


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
    "num_tokens": _is_count,
    "num_centroids": _is_size,
    "num_list_entries": _is_count,
    "dim": lambda value: _is_size(value) and value > 0,
    "nbits": lambda value: _is_count(value) and value in NBITS,
    "settings": _is_object,
    "model": lambda value: value is None or _is_object(value),
    "checksums": lambda value: _is_object(value) and all(map(_is_count, value.values())),
}
_OPTIONAL: dict[str, Any] = {
    "origin": _is_object,
    "outlier_distance": lambda value: isinstance(value, float) and 0 <= value <= _FARTHEST,
    "fields": lambda value: isinstance(value, str) and is_fields_file(value),
    "learned": lambda value: _is_object(value) and _are_sizes(value),
}
_CHANGE: dict[str, Any] = {
    "generation": lambda value: _is_count(value) and 0 < value < _MOST_CHANGES,
    "name": lambda value: isinstance(value, str),
    "files": lambda value: _is_object(value) and all(isinstance(v, str) for v in value.values()),
    "num_deleted": _is_count,
    "num_listed_documents": _is_count,
    "num_listed_centroids": _is_count,
    "next_id": lambda value: value is None or _is_count(value),
    "num_added_tokens": _is_count,
    "num_outliers": _is_count,
}


def _size_field(column: str) -> str:
    return f"num_{column}_bytes"


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write `metadata.json` with the checksums of all arrays: the index is whole.

    `metadata` has the other checksums.
    """
    with IndexFiles(folder) as files:
        checksums = {
            metadata.file(name): files.checksum(metadata.file(name), dtype, shape)
            for name, (dtype, shape) in array_specs(metadata).items()
        }
    checksums |= metadata.checksums
    replace_metadata(folder, dataclasses.replace(metadata, checksums=checksums))


def replace_metadata(folder: Path, metadata: Metadata) -> None:
    """Replace `metadata.json` in one step: from now on the index is what it says."""
    fields = metadata.to_json()
    fields["checksums"] = {**fields["checksums"], METADATA: own_checksum(fields)}
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

    @property
    def is_anchored(self) -> bool:
        """Whether all files are opened in the same folder, wherever that is by now.

        Then what metadata names is what was published with it: committed bytes never change, and a
        file that has gone by now is missing.
        """
        return self._descriptor is not None

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
            raise IndexFormatError(f"{file}: damaged: {error!r:.200}") from None
        if version not in (FORMAT_VERSION, CHANGED_VERSION):
            raise IndexFormatError(
                f"{file}: format version {version}, this library reads {FORMAT_VERSION} and "
                f"{CHANGED_VERSION}"
            )
        return fields

    def checksum(self, name: str, dtype: Any, shape: tuple[int, ...]) -> int:
        """CRC-32 of the committed bytes of an array's file, read in blocks.

        Raises IndexFormatError where it is shorter.
        """
        size = _HEADER + math.prod(shape) * np.dtype(dtype).itemsize
        crc, read = self._checksum(name, size)
        if read < size:
            raise IndexFormatError(f"{self.folder / name}: damaged: shorter than {size} bytes")
        return crc

    def check(self, metadata: Metadata, arrays: Iterable[str]) -> None:
        """Compare the metadata, and the files of some arrays, with their checksums.

        Raises IndexFormatError, naming a file that is damaged or missing.
        """
        fields = self.fields()
        if metadata.checksums.get(METADATA) not in (None, own_checksum(fields)):
            raise IndexFormatError(f"{self.folder / METADATA}: damaged: its checksum differs")
        specs = array_specs(metadata)
        for array in arrays:
            name = metadata.file(array)
            try:
                found = self.checksum(name, *specs[array])
            except FileNotFoundError:
                raise _missing(self.folder / name) from None
            if found != metadata.checksums[name]:
                raise IndexFormatError(f"{self.folder / name}: damaged: its checksum differs")

    def whole_checksum(self, name: str) -> int:
        """CRC-32 of a file."""
        return self._checksum(name)[0]

    def _checksum(self, name: str, most: int | None = None) -> tuple[int, int]:
        """CRC-32 of a file, or of its first bytes, and how many they are."""
        crc = done = 0
        with self.open(name) as stream:
            while block := stream.read(_READ if most is None else min(most - done, _READ)):
                crc = zlib.crc32(block, crc)
                done += len(block)
        return crc, done


def delete_others(folder: Path, metadata: Metadata) -> None:
    """Delete the files of other states of an index; whoever has them mapped keeps them."""
    kept = {METADATA, metadata.fields, *map(metadata.file, array_specs(metadata))}
    for file in folder.iterdir():
        database = re.sub("-(wal|shm|journal)$", "", file.name)
        ours = any(is_array_file(file.name, name) for name in _ARRAYS) or is_fields_file(database)
        if ours and file.name not in kept and database not in kept:
            # The change is made: what is in the way, such as a folder, is no error any more.
            with contextlib.suppress(OSError):
                file.unlink()


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
        "list_offsets": (np.int64, (_num_listed_centroids(m) + 1,)),
    }
    if m.learned is not None:
        landmarks, tokens, width = (m.learned[name] for name in ("landmarks", "tokens", "width"))
        specs |= {
            "learned_vectors": (np.int8, (m.num_documents, width)),
            "learned_scales": (np.float32, (m.num_documents,)),
            "learned_landmarks": (np.float32, (landmarks, m.dim)),
            "learned_projection": (np.float32, (landmarks, width)),
            "learned_tokens": (np.float32, (tokens, m.dim)),
            "learned_means": (np.float32, (tokens,)),
            "learned_solver": (np.float32, (width, tokens)),
        }
    if m.num_deleted:
        specs["deleted"] = (np.uint8, (-(-m.num_documents // 8),))
    for column, size in m.columns.items():
        data, offsets = string_arrays(column)
        specs |= {data: (np.uint8, (size,)), offsets: (np.int64, (m.num_documents + 1,))}
    return specs


def _num_listed_centroids(metadata: Metadata) -> int:
    change = metadata.change
    return metadata.num_centroids if change is None else change.num_listed_centroids


def string_arrays(column: str) -> tuple[str, str]:
    """The file stems of a column of strings: of their bytes and of their offsets."""
    return f"{column}s", f"{column}_offsets"


def open_array(
    files: IndexFiles, name: str, dtype: type, shape: tuple[int, ...], grown: bool = False
) -> np.ndarray:
    """Map one array read-only. Raises IndexFormatError where it is missing, damaged or another.

    Args:
      name: of its file.
      grown: its header may state fewer rows than it has by now.
    """
    file = files.folder / name
    try:
        with files.open(file.name) as stream:
            start = _check_header(file, stream, dtype, shape, grown)
            if math.prod(shape) == 0:  # can't be mapped
                return np.empty(shape, dtype)
            with naming(file):
                return np.memmap(stream, dtype, "r", start, shape)
    except FileNotFoundError:
        raise _missing(file) from None


def _missing(file: Path) -> IndexFormatError:
    return IndexFormatError(f"{file}: missing; the index is incomplete: build it again")


def _check_header(
    file: Path, stream: BinaryIO, dtype: type, shape: tuple[int, ...], grown: bool
) -> int:
    """Where the rows of an array's file start.

    Raises IndexFormatError unless it holds as many as its metadata say; `grown`: or says that it
    holds fewer.
    """
    try:
        found = _read_header(stream)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged header fails in numpy's parser in many ways
        raise IndexFormatError(f"{file}: damaged or truncated: {error}") from None
    fits = found[0] == np.dtype(dtype) and found[1][1:] == shape[1:]
    rows = found[1][0] if len(found[1]) == len(shape) else None
    if not fits or rows is None or rows > shape[0] or (rows < shape[0] and not grown):
        raise IndexFormatError(
            f"{file}: holds {found[0]} {list(found[1])}, but {METADATA} promises "
            f"{np.dtype(dtype)} {list(shape)}"
        )
    start = stream.tell()
    if os.fstat(stream.fileno()).st_size < start + math.prod(shape) * np.dtype(dtype).itemsize:
        raise IndexFormatError(f"{file}: truncated")
    return start


def _read_header(stream: BinaryIO) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of a `.npy` file; ValueError for one that no index has."""
    version = np.lib.format.read_magic(stream)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[version[0]](stream)
    if fortran and len(shape) > 1:
        raise ValueError("in Fortran's order")
    if stream.tell() != _HEADER:  # checksums are of the bytes behind one of this size
        raise ValueError(f"a header of {stream.tell()} bytes")
    return dtype, shape


def open_arrays(path: Path) -> tuple[Path, Metadata, dict[str, np.ndarray]]:
    """Folder, metadata and all arrays of an index, checked for size, dtype and consistent offsets.

    A build that replaces the index while it is being opened is noticed: the old index or the new
    one is read, never a mixture. Opening changes nothing on disk.
    """

    def read(files: IndexFiles) -> tuple[Path, Metadata, dict[str, np.ndarray]]:
        metadata = files.metadata()
        specs = array_specs(metadata)
        changed = metadata.change is not None
        arrays = {
            name: open_array(files, metadata.file(name), *spec, changed and name in GROWING)
            for name, spec in specs.items()
        }
        return files.folder, metadata, arrays

    folder, metadata, arrays = _undisturbed(path, read, _TRIES)
    for name, total in (("offsets", "num_tokens"), ("list_offsets", "num_list_entries")):
        offsets = arrays[name]
        if (
            offsets[0] != 0
            or offsets[-1] != getattr(metadata, total)
            or (offsets[1:] < offsets[:-1]).any()  # differences may overflow
        ):
            file = folder / metadata.file(name)
            raise IndexFormatError(f"{file}: damaged: not ascending from 0 to {total}")
    for name in ("bucket_cutoffs", "bucket_weights"):
        if not (np.abs(arrays[name]) <= _LARGEST).all():
            raise IndexFormatError(
                f"{folder / metadata.file(name)}: damaged: holds NaN or infinite values, or too "
                "large ones"
            )
    return folder, metadata, arrays


def verify(path: Path, others: Callable[[Path, Metadata], None] | None = None) -> None:
    """Read every file that an index has, and compare checksums.

    An index that is replaced meanwhile is not damaged: the new one is read. Metadata that somebody
    has edited are opened, but differ from their checksum; those of earlier versions have none.

    Args:
      others: checks what else metadata names, in the index's folder.

    Raises:
      IndexFormatError: naming a file that is damaged or missing.
      FileNotFoundError: no index there.
    """

    def read(files: IndexFiles) -> None:
        metadata = files.metadata()
        files.check(metadata, array_specs(metadata))
        if others is not None:
            others(files.folder, metadata)

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
                if files.is_anchored or (there is not None and identity(folder) == there):
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
    """What tells the state of the index in a folder from every other that was or will be there.

    That of the folder changes when it is moved away and back.
    """
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

    def __init__(
        self,
        file: Path,
        dtype: Any,
        row: tuple[int, ...] = (),
        rows: int = 0,
        *,
        durable: bool = True,
    ):
        """
        Args:
          row: shape of one row.
          rows: how many rows a former run committed; what follows them is cut off.
          durable: whether `close` syncs; not what no index keeps, whose rows `sync` has committed.

        Errors of writing name the file.
        """
        self._file, self._durable = file, durable
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
            if self._durable:
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
        room = _HEADER - len(magic) - 2
        return magic + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"


def append_rows(
    file: Path, dtype: type, shape: tuple[int, ...], parts: Iterable[np.ndarray], crc: int
) -> int:
    """Append to the committed rows of an array's file, durably; what follows them is cut off.

    Readers have the committed rows mapped, so neither these nor the header are touched.

    Args:
      dtype, shape: of what is committed.
      parts: arrays of rows.
      crc: CRC-32 of what is committed.

    Returns:
      CRC-32 of what is there now.
    """
    if not present(file):
        raise _missing(file)
    with file.open("r+b", buffering=0) as stream, naming(file):
        start = _check_header(file, stream, dtype, shape, grown=True)
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        stream.truncate(end)
        stream.seek(end)
        for part in parts:
            part = np.ascontiguousarray(part, dtype)
            assert part.shape[1:] == shape[1:], (file, part.shape, shape)
            left = memoryview(part.reshape(-1).view(np.uint8).data)
            crc = zlib.crc32(left, crc)
            while len(left):
                left = left[stream.write(left) :]
        os.fsync(stream.fileno())
    return crc
