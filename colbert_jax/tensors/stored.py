"""A tensor in a file: the place of its bytes, and reading them."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    file: the file.
    offset: of the first element, in bytes from the start of the file, or of `member`.
    dtype, shape: of the tensor.
    strides: in elements. If None, C order without gaps.
    member: the compressed zip member that holds it. If None, the file holds its bytes as they are.
    swapped: whether its byte order is not this machine's.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    member: str | None = None
    swapped: bool = False

    def rows(self, start: int, stop: int) -> Stored:
        """Take rows start..stop-1 of the first dimension; 0 <= start <= stop <= their number."""
        strides = c_strides(self.shape) if self.strides is None else self.strides
        offset = self.offset + start * strides[0] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def read(self, into: np.ndarray | None = None) -> np.ndarray:
        """Read the tensor, in C order and this machine's byte order.

        Only its bytes are read. The file is not mapped, since mapped pages count as resident.

        Args:
          into: for a tensor without strides, flat memory of the same dtype and at least its size,
            to read into. If None, fresh memory.

        Raises:
          ValueError: the bytes are damaged or truncated.
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
    """Return the strides of C order, in elements, as torch counts them."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements from a tensor's first to its last in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
