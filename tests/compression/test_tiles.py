"""Tiles against the products that they are made of, whatever the numbers of rows and strips."""

import numpy as np
import pytest

pytest.importorskip("numba")

from colbert_jax.compression import tiles
from colbert_jax.search import cpu_kernels

SIZES = [(1, 1), (5, 16), (8, 17), (13, 33), (30, 48)]  # rows, columns


def made(num_rows, num_columns, dim):
    rng = np.random.default_rng(num_rows)
    rows, other = rng.normal(size=(num_rows, dim)), rng.normal(size=(num_columns, dim))
    rows, other = rows.astype(np.float32), other.astype(np.float32)
    columns = tiles.packed(other)
    scores = np.zeros((num_rows, len(columns) * tiles.LANES), np.float32)
    scores[:, :num_columns] = rows @ other.T
    return rows, columns, scores


@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
@pytest.mark.parametrize("dim", [1, 16, 128])
def test_best_of_rows(num_rows, num_columns, dim):
    rows, columns, scores = made(num_rows, num_columns, dim)
    scale = np.linspace(0.5, 2, num_rows).astype(np.float32)
    scores *= scale[:, None]
    for n in {1, (num_rows + 1) // 2, num_rows}:
        for least in (-np.inf, 0.3):  # what is larger stays
            best = np.full(scores.shape[1], least, np.float32)
            cpu_kernels.update_best(rows, scale, n, columns, best)
            expected = np.maximum(scores[:n].max(axis=0), least)
            np.testing.assert_allclose(best, expected, atol=1e-4)


@pytest.mark.parametrize(("num_rows", "num_columns"), [*SIZES, (200, 20)])
def test_keys_of_centroids(num_rows, num_columns):
    rows, columns, scores = made(num_rows, num_columns, 16)
    keys = np.zeros(scores.shape, np.int32)
    blocks = -(-num_rows // cpu_kernels.BLOCK)
    best = np.zeros((blocks, scores.shape[1]), np.int32)
    cpu_kernels.score_centroids(rows, columns, 0, num_rows, keys, best)
    decoded = as_scores(keys)
    np.testing.assert_allclose(decoded, scores, atol=1e-4)
    in_order = np.take_along_axis(keys, np.argsort(decoded, axis=0), axis=0)
    assert (in_order[:-1] <= in_order[1:]).all()
    for b in range(blocks):
        block = keys[b * cpu_kernels.BLOCK : (b + 1) * cpu_kernels.BLOCK]
        np.testing.assert_array_equal(best[b], block.max(axis=0))
    largest = np.empty(num_rows, np.int32)
    cpu_kernels.best_of_centroids(keys, num_columns, largest)
    np.testing.assert_array_equal(largest, keys[:, :num_columns].max(axis=1))


@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_largest_keys_of_rows(num_rows, num_columns):
    _, _, scores = made(num_rows, num_columns, 16)
    keys = as_keys(scores)
    chosen = np.random.default_rng(0).integers(0, num_rows, 9).astype(np.int32)
    for n in (0, 1, 9):
        best = np.full(scores.shape[1], cpu_kernels.LOWEST, np.int32)
        cpu_kernels.raise_all(keys, chosen, n, best)
        expected = np.vstack([keys[chosen[:n]], np.full_like(best, cpu_kernels.LOWEST)[None]])
        np.testing.assert_array_equal(best, expected.max(axis=0))


def as_keys(scores):
    bits = scores.view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def as_scores(keys):
    return as_keys(keys.view(np.float32)).view(np.float32)
