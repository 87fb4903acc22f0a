"""Bytes and lines of text files, plain or packed by gzip or zstd as their names say."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PACKED = (".gz", ".zst")
INSTALL = 'pip install "colbert-jax[tables]"'


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is packed."""
    return path.suffix.lower() in PACKED


def unpacked_suffix(path: Path) -> str:
    """The end of a file's name in lower case, without .gz or .zst."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


@contextmanager
def unpacking(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; a damaged archive raises `damage()`'s errors while it is read.

    Raises:
      ImportError: a .zst file, and nothing that reads it is installed.
    """
    packed = path.suffix.lower()
    if packed == ".zst":
        with path.open("rb") as stream, _zstd(path).input_stream(stream, "zstd") as unpacked:
            yield io.BufferedReader(unpacked, 1 << 20)
    else:
        opener: Any = gzip.open if packed == ".gz" else open
        with opener(path, "rb") as stream:
            yield stream


def _zstd(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{path}: .zst needs pyarrow: {INSTALL}") from error
    return pyarrow


def damage(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged archive raises; nothing of this for a plain file."""
    if path.suffix.lower() == ".zst":
        return (OSError,)
    return (EOFError, gzip.BadGzipFile, zlib.error)


def read_unpacked(path: Path) -> bytes:
    """All bytes of a file. Raises ValueError for a damaged archive."""
    try:
        with unpacking(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except damage(path) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def numbered_lines(path: Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines, strictly UTF-8, with or without a byte-order mark.

    blank: yield blank lines too.
    """
    number = 0
    with unpacking(path) as stream:
        try:
            for number, raw in enumerate(stream, 1):
                try:
                    line = decode(raw, first=number == 1)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                if blank or line.strip():
                    yield number, line
        except damage(path) as error:
            raise ValueError(f"{path}: damaged after line {number}: {error}") from None


def decode(raw: bytes, *, first: bool = False) -> str:
    """A line's text without its end; `first`: without the byte-order mark too.

    Raises:
      ValueError: not UTF-8, a NUL byte, or several lines with the line ends of old Macs; without
        the place.
    """
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {error.start + 1} of the line, "
            f"0x{raw[error.start]:02x}); convert the file, for example with iconv"
        ) from None
    if "\0" in line:
        raise ValueError(
            f"a NUL byte, after {line.partition(chr(0))[0][-40:]!r}: the file is damaged, or "
            "UTF-16; copy it again, or convert it with iconv"
        )
    if "\r" in line:
        raise ValueError(
            f"a carriage return inside the line, after {line.partition(chr(13))[0][-40:]!r}: if it "
            "ends a line, convert the file with tr '\\r' '\\n'; else put a space for it"
        )
    return line
