"""Where the bytes of a tensor lie in a file, and reading them."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """Where the bytes of one tensor are.

    offset: of its first element, in bytes from the start of the file (of the member, if any).
    strides: in elements; None for C order without gaps.
    member: the zip member whose compressed bytes hold it; None where the bytes lie plainly.
    swapped: whether they are in the other byte order than this machine's.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    member: str | None = None
    swapped: bool = False

    def rows(self, start: int, stop: int) -> Stored:
        """Rows start..stop-1 of the first dimension; 0 <= start <= stop <= their number."""
        strides = c_strides(self.shape) if self.strides is None else self.strides
        offset = self.offset + start * strides[0] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def read(self, into: np.ndarray | None = None) -> np.ndarray:
        """The tensor, in C order and this machine's byte order.

        `into`: flat memory of the same dtype, as long as the tensor or longer, to be used instead
        of fresh memory; for a tensor without strides.

        Reads its bytes alone. The file is not mapped, since mapped pages count as resident.
        Raises ValueError where the bytes are damaged or cut off.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        width = self.dtype.itemsize
        strides = c_strides(self.shape) if self.strides is None else self.strides
        size = span(self.shape, strides) * width
        raw = np.empty(size, np.uint8) if into is None else into.view(np.uint8)[:size]
        with self.file.open("rb") as stream:
            try:
                got = self._fill(stream, raw)
            except Exception as error:  # zipfile and the decompressors raise many types
                raise ValueError(f"{self.file}: {self.member or 'tensor'}: {error}") from error
        if got != raw.size:
            raise ValueError(f"{self.file}: truncated; fetch the file again")
        if self.swapped:
            raw.view(f"u{width}").byteswap(inplace=True)
        if self.strides is None:
            return raw.view(self.dtype).reshape(self.shape)
        steps = tuple(stride * width for stride in strides)
        return np.ndarray(self.shape, self.dtype, raw.data, strides=steps).copy(order="C")

    def _fill(self, stream: Any, raw: np.ndarray) -> int:
        if self.member is None:
            stream.seek(self.offset)
            return stream.readinto(raw.data)
        with zipfile.ZipFile(stream) as archive, archive.open(self.member) as inner:
            inner.seek(self.offset)
            return inner.readinto(raw.data)  # type: ignore[attr-defined]


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of C order, as torch counts them."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie from a tensor's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
