"""Ragged rows to a few static shapes: the length ladder and token-budget batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Padding is a share of the work and every step a program to compile: steps of 16 where most
# passages are, of about an eighth beyond.
LADDER = (
    *(16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 180),
    *(208, 232, 256, 300, 344, 400, 456, 512),
)
_WORTH_SPLITTING = 512  # tokens that two programs side by side do faster than one


def ladder_length(length: int, longest: int | None = None, ladder: Sequence[int] = LADDER) -> int:
    """The padded length for a row: the next step of the ladder, doubling beyond its end.

    `longest` caps the result (a model's number of positions); it must not be below `length`.
    """
    step = next((step for step in ladder if step >= length), ladder[-1])
    while step < length:
        step *= 2
    return step if longest is None else min(step, longest)


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class Batch(NamedTuple):
    """rows: positions of the batch's rows; size: rows to pad to; length: columns to pad to."""

    rows: np.ndarray
    size: int
    length: int


def plan_batches(
    lengths: np.ndarray,
    token_budget: int,
    *,
    multiple: int = 1,
    longest: int | None = None,
    parallel: int = 1,
) -> Iterator[Batch]:
    """Cut rows, longest first, into batches of about `token_budget` tokens.

    A batch has the ladder length of its longest row, and all full batches of one length have the
    same shape, so a run compiles few programs. The last rows, too few for a full batch, are cut
    into powers of two.

    Args:
      lengths: int[N], the rows' lengths.
      token_budget: tokens of a full batch, padding included.
      multiple: every size is a multiple of this (the number of devices).
      longest: see `ladder_length`.
      parallel: batches that run side by side; the last rows are shared among that many.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        step = ladder_length(int(lengths[order[start]]), longest)
        size = max(token_budget // (step * multiple), 1) * multiple
        left = len(order) - start
        if left * step < _WORTH_SPLITTING:
            rest = next_power_of_two(left)
        else:
            rest = _power_of_two_near(-(-left // parallel))
        size = min(size, -(-rest // multiple) * multiple)
        rows = order[start : start + size]
        yield Batch(rows, size, step)
        start += len(rows)


def _power_of_two_near(n: int) -> int:
    """The next power of two if n rows fill more than three quarters of it, else the one before."""
    above = next_power_of_two(n)
    return above if 4 * n > 3 * above else above // 2


def pad_rows(rows: Sequence[np.ndarray], size: int, length: int, fill: int = 0) -> np.ndarray:
    """[size, length] of the rows' dtype, each row at the left, the rest `fill`."""
    padded = np.full((size, length), fill, rows[0].dtype if rows else np.int32)
    for target, row in zip(padded, rows, strict=False):
        target[: len(row)] = row
    return padded
