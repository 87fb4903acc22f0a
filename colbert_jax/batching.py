"""Ragged rows to a few static shapes: the length ladder and token-budget batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

LADDER = (16, 32, 48, 64, 96, 128, 180, 256, 300, 512)


def ladder_length(length: int, longest: int | None = None) -> int:
    """The padded length for a row: the next step of the ladder, doubling beyond its end.

    `longest` caps the result (a model's number of positions); it must not be below `length`.
    """
    step = next((step for step in LADDER if step >= length), LADDER[-1])
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
    lengths: np.ndarray, token_budget: int, *, multiple: int = 1, longest: int | None = None
) -> Iterator[Batch]:
    """Cut rows into batches of one ladder length each, longest first, about `token_budget` tokens.

    Every full batch of a ladder step has the same shape, so a run compiles few programs; the last,
    smaller one is padded to a power of two of rows.

    Args:
      lengths: int[N], the rows' lengths.
      token_budget: tokens of a full batch, padding included.
      multiple: every size is a multiple of this (the number of devices).
      longest: see `ladder_length`.
    """
    steps = np.array([ladder_length(int(n), longest) for n in lengths], np.int64)
    order = np.argsort(-steps, kind="stable")
    start = 0
    while start < len(order):
        step = int(steps[order[start]])
        stop = start + int((steps == step).sum())
        full = 1 << max(token_budget // step, 1).bit_length() - 1
        for first in range(start, stop, full):
            rows = order[first : min(first + full, stop)]
            size = min(full, next_power_of_two(len(rows)))
            yield Batch(rows, -(-size // multiple) * multiple, step)
        start = stop


def pad_rows(rows: Sequence[np.ndarray], size: int, length: int, fill: int = 0) -> np.ndarray:
    """[size, length] of the rows' dtype, each row at the left, the rest `fill`."""
    padded = np.full((size, length), fill, rows[0].dtype if rows else np.int32)
    for target, row in zip(padded, rows, strict=False):
        target[: len(row)] = row
    return padded
