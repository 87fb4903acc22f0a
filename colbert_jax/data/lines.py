"""Lines of a text file by position, without reading the file into memory."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from colbert_jax.data.streams import decode, is_packed, read_unpacked

_SCAN = 1 << 24  # bytes searched for line ends at a time
_ENDS = 1 << 16  # bytes at each end of a file that are hashed beside its checksum
_FEED = ord("\n")

T = TypeVar("T")


class Lines:
    """The lines of a UTF-8 file that are not blank, by position from 0.

    The file is mapped, not read, and 8 bytes are kept for every line; a file whose name ends in .gz
    or .zst is unpacked into memory.

    path: the file.
    data: its bytes, uint8[num_bytes].
    starts: int64[N], where each line begins in `data`.
    fingerprint: of all bytes of the file.
    """

    def __init__(self, path: str | Path):
        """Raises ValueError for an empty or damaged file."""
        self.path = Path(path)
        self._bytes = _open(self.path)
        self.data = np.frombuffer(self._bytes, np.uint8)
        self.starts = _line_starts(self.data)
        # Blank lines begin with white space, and few others do.
        suspects = np.flatnonzero(self.data[self.starts] <= ord(" "))
        blank = [i for i in suspects.tolist() if not self.raw(i).strip()]
        self.starts = np.delete(self.starts, blank)
        self._numbered = not blank  # line i of the file is line i here
        if len(self.starts) == 0:
            raise ValueError(f"{self.path}: the file is empty")
        ends = self._bytes[:_ENDS] + self._bytes[-_ENDS:]
        checksum = zlib.crc32(self._bytes)  # quicker than finding the lines was
        self.fingerprint = f"{self.num_bytes}:{checksum:08x}:{hashlib.sha256(ends).hexdigest()}"

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> str:
        """A line without its end. Raises ValueError, naming the line, where it is not UTF-8."""
        return self.read(i, lambda line: line)

    def read(self, i: int, parse: Callable[[str], T]) -> T:
        """What `parse` makes of a line; its ValueErrors get file and line put before them."""
        try:
            return parse(decode(self.raw(i), first=bool(self.starts[i] == 0)))
        except ValueError as error:
            raise ValueError(f"{self.where(i)}: {error}") from None

    def raw(self, i: int) -> bytes:
        """The bytes of a line without the line feed."""
        stop = self.starts[i + 1] if i + 1 < len(self.starts) else len(self._bytes)
        return self._bytes[self.starts[i] : stop].partition(b"\n")[0]

    def where(self, i: int) -> str:
        """File and number of line i, counted as editors do: from 1, blank lines included."""
        return f"{self.path}, line {self.number(i)}"

    def number(self, i: int) -> int:
        """The number of line i, counted from 1, blank lines included."""
        if self._numbered:
            return i + 1
        before = self.data[: self.starts[i]]
        cuts = range(0, len(before), _SCAN)
        return 1 + sum(int((before[cut : cut + _SCAN] == _FEED).sum()) for cut in cuts)

    def drop_first(self) -> None:
        """Leave out line 0, which was a header."""
        if len(self) == 1:
            raise ValueError(f"{self.path}: nothing below the header")
        self.starts, self._numbered = self.starts[1:], False


def _open(path: Path) -> Any:
    """The file's bytes: mapped, or unpacked."""
    if is_packed(path):
        return read_unpacked(path)
    with path.open("rb") as stream:
        if not path.is_file():  # but a pipe
            return stream.read()
        if not path.stat().st_size:  # can't be mapped
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _line_starts(data: np.ndarray) -> np.ndarray:
    """int64: 0 and every place behind a line feed, but not the end of the data."""
    starts = [np.zeros(1, np.int64)]
    for cut in range(0, len(data), _SCAN):
        starts.append(np.flatnonzero(data[cut : cut + _SCAN] == _FEED) + cut + 1)
    found = np.concatenate(starts)
    return found[found < len(data)]
