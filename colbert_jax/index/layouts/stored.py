"""An index on disk, whatever its layout: where its large arrays lie, and its small ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.compression.codec import ResidualCodec, check_packable
from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.files import present, read_json, read_object
from colbert_jax.index.format import IndexFormatError
from colbert_jax.tensors.stored import Stored

BLOCK = 1 << 18  # tokens, or entries of inverted lists, in memory at a time


@dataclass(frozen=True)
class DiskIndex:
    """
    layout: "native" (our own), "stanford" or "fast-plaid".
    codec: arrays of the host; every centroid's value representable in float16.
    lengths: int64[N], tokens of each document.
    codes, residuals: parts that together hold int[T] and uint8[T, D * b / 8].
    lists: int[L], per centroid the ascending documents that have a token there. None where the
      layout does not hold them: they can be made from the codes.
    list_lengths: int64[K].
    config: the settings that a Stanford index was made with; empty for others.
    checkpoint: the name or folder of the model, where it is known.
    avg_residual: the mean size of a residual's component, where it is known.
    """

    layout: str
    folder: Path
    codec: ResidualCodec
    lengths: np.ndarray
    codes: Sequence[Stored]
    residuals: Sequence[Stored]
    lists: Stored | None
    list_lengths: np.ndarray | None
    config: Mapping[str, Any]
    checkpoint: str | None = None
    avg_residual: float | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_centroids(self) -> int:
        return len(self.codec.centroids)

    @property
    def dim(self) -> int:
        return self.codec.centroids.shape[1]

    def code_blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The codes of tokens start..stop-1, int32[n] at a time.

        Raises IndexFormatError for a code that is no centroid.
        """
        for part, first, codes in _blocks(self.codes, start, stop):
            bad = np.flatnonzero((codes < 0) | (codes >= self.num_centroids))
            if len(bad):
                raise IndexFormatError(
                    f"{part.file}: damaged: token {first + bad[0]} has code {codes[bad[0]]}, "
                    f"there are {self.num_centroids} centroids"
                )
            yield codes.astype(np.int32, copy=False)

    def residual_blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The packed residuals of tokens start..stop-1, uint8[n, D * b / 8] at a time."""
        for _, _, residuals in _blocks(self.residuals, start, stop):
            yield residuals

    def list_blocks(self) -> Iterator[np.ndarray]:
        """The inverted lists, int32[n] at a time.

        Raises IndexFormatError for a list that is not ascending or names no document.
        """
        assert self.lists is not None and self.list_lengths is not None
        starts = offsets_from_lengths(self.list_lengths)
        before = np.int64(-1)
        for part, first, entries in _blocks([self.lists], 0, int(starts[-1])):
            documents = entries.astype(np.int64)
            ascending = np.diff(documents, prepend=before) > 0
            outside = (documents < 0) | (documents >= len(self.lengths))
            position = first + np.arange(len(documents))
            begins = starts[np.searchsorted(starts, position)] == position
            bad = np.flatnonzero(outside | ~(ascending | begins))
            if len(bad):
                centroid = int(np.searchsorted(starts, first + bad[0], side="right")) - 1
                raise IndexFormatError(
                    f"{part.file}: damaged: the inverted list of centroid {centroid} is not an "
                    f"ascending list of documents below {len(self.lengths)}"
                )
            before = documents[-1]
            yield documents.astype(np.int32)


def _blocks(
    parts: Sequence[Stored], start: int, stop: int
) -> Iterator[tuple[Stored, int, np.ndarray]]:
    """Rows start..stop-1 of all parts together: the part, the block's first row in it, the rows."""
    before = 0
    for part in parts:
        rows = part.shape[0]
        first, last = max(start - before, 0), min(stop - before, rows)
        for at in range(first, last, BLOCK):
            yield part, at, part.rows(at, min(at + BLOCK, last)).read()
        before += rows


def make_codec(
    files: Mapping[str, Path],
    centroids: np.ndarray,
    cutoffs: np.ndarray,
    weights: np.ndarray,
    dim: int,
    nbits: int,
) -> ResidualCodec:
    """The codec of another library, checked.

    Centroids are rounded to float16, which is what the libraries search with on a GPU and what they
    write; the buckets come out as float32.

    Args:
      files: which file holds the "settings", "centroids", "cutoffs" and "weights", for errors.
    """
    try:
        check_packable(dim, nbits)
    except ValueError as error:
        raise IndexFormatError(f"{files['settings']}: {error}") from None
    shapes = {"cutoffs": (2**nbits - 1,), "weights": (2**nbits,)}
    arrays = dict(centroids=centroids, cutoffs=cutoffs, weights=weights)
    for name, array in arrays.items():
        shape = shapes.get(name, (len(centroids) if centroids.ndim else 0, dim))
        if array.shape != shape or 0 in shape:
            raise IndexFormatError(
                f"{files[name]}: the {name} have shape {list(array.shape)}, but "
                f"{files['settings'].name} says dim {dim} and nbits {nbits}"
            )
        if array.dtype.kind != "f":
            raise IndexFormatError(f"{files[name]}: the {name} are {array.dtype}, not floats")
        kind = np.float32 if name == "cutoffs" else np.float16
        with np.errstate(over="ignore"):
            whole = np.isfinite(array.astype(kind)).all()
        if not whole:
            raise IndexFormatError(
                f"{files[name]}: damaged: the {name} hold NaN or infinite values, or too large ones"
            )
    if (np.diff(cutoffs.astype(np.float32)) < 0).any():
        raise IndexFormatError(f"{files['cutoffs']}: damaged: the cutoffs do not ascend")
    return ResidualCodec(
        centroids.astype(np.float16).astype(np.float32),
        cutoffs.astype(np.float32),
        weights.astype(np.float32),
    )


def read_npy(file: Path) -> Stored:
    """Where the rows of a `.npy` file lie.

    Raises FileNotFoundError, IndexFormatError for one that is damaged, or OSError."""
    require(file)
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version[0]](stream)
            offset = stream.tell()
        if dtype.kind not in "fiub" or fortran or not shape or min(shape) < 0:
            raise ValueError(f"an unexpected sort of array: {dtype} {shape}")
        if file.stat().st_size < offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise ValueError(f"too short for {dtype} {list(shape)}")
    except OSError:  # too many open files are no damage
        raise
    except Exception as error:  # numpy's parser fails in many ways
        raise IndexFormatError(f"{file}: damaged or truncated: {error}") from None
    return Stored(file, offset, dtype.newbyteorder("="), shape, swapped=not dtype.isnative)


def read_lengths(file: Path) -> np.ndarray:
    """int64[n], the lengths of a chunk's documents, from a JSON list."""
    require(file)
    values = read_json(file)
    right = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**31 for v in values)
    if not right:
        raise IndexFormatError(f"{file}: expected a list of whole numbers >= 0, below 2^31")
    return np.array(values, np.int64)


def are_lengths(lengths: np.ndarray) -> bool:
    """Whether whole numbers can be lengths of lists, so that their sum means something."""
    return bool(((lengths >= 0) & (lengths <= np.iinfo(np.int32).max)).all())


def read_fields(file: Path, **kinds: type) -> dict[str, Any]:
    """A JSON object with certain fields of certain types."""
    require(file)
    fields = read_object(file)
    for name, kind in kinds.items():
        if type(fields.get(name)) is not kind:
            raise IndexFormatError(
                f"{file}: field {name!r} is missing or damaged: expected {kind.__name__}, got "
                f"{fields.get(name)!r:.60}"
            )
    return fields


def require(file: Path) -> None:
    """Raises FileNotFoundError unless the file is there, ValueError where it cannot be read."""
    if not present(file):
        raise FileNotFoundError(f"{file}: missing; the index is incomplete: copy it whole")


def checked_rows(
    stored: Stored, kinds: str, row: tuple[int, ...], tokens: int, spare: int
) -> Stored:
    """The first `tokens` rows of codes or residuals, checked.

    Args:
      kinds: numpy's letters of the types that they may have.
      spare: how many more rows may follow.
    """
    shape = stored.shape
    if stored.dtype.kind not in kinds or shape[1:] != row or not shape:
        expected = "uint8" if row else "whole numbers"
        raise IndexFormatError(
            f"{stored.file}: expected {expected} [{', '.join(map(str, (tokens, *row)))}], found "
            f"{stored.dtype} {list(shape)}"
        )
    if not tokens <= shape[0] <= tokens + spare:
        raise IndexFormatError(
            f"{stored.file}: holds {shape[0]} tokens, but the documents' lengths add up to {tokens}"
        )
    return stored.rows(0, tokens)
