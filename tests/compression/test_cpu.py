"""The CPU's k-means and compression against comparing every point with all centroids."""

import numpy as np
import pytest

pytest.importorskip("numba")

import numba
from support import unit_rows

from colbert_jax.compression import cpu, tiles
from colbert_jax.compression.codec import _compressed, compress, decompress, train_codec
from colbert_jax.compression.kmeans import train_kmeans
from colbert_jax.compression.sharding import data_mesh


def clustered(rng, n, centres, dim=16, noise=0.25):
    rows = centres[rng.integers(0, len(centres), n)] + noise * rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    return clustered(rng, 30_000, unit_rows(rng, 500, 16))


def true_nearest(points, centroids, bias=0.0):
    return np.argmax(points @ centroids.T + bias, axis=1)


def biases(groups):
    """float32[K]; every centroid is in one lane of one strip."""
    real = np.isfinite(groups.strips.bias)
    places = groups.strips.places[real]
    assert sorted(places) == list(range(len(groups.centroids)))
    return groups.strips.bias[real][np.argsort(places)]


def test_all_groups_probed_is_exact(points, monkeypatch):
    centroids = points[::20].copy()  # 1,500: two levels
    some = points[7:4000:3]
    for distance in (False, True):
        groups = cpu.group_centroids(0.9 * centroids, distance=distance)
        bias = biases(groups)
        monkeypatch.setattr(cpu, "_PROBES", len(groups.coarse))
        expected = true_nearest(some, groups.centroids, bias)
        np.testing.assert_array_equal(cpu.nearest(groups, some), expected)


def test_more_centroids_join_the_groups_there_are(points, monkeypatch):
    """The known ones are grouped once, also for what is compared with more centroids later."""
    centroids, some = points[::20], points[7:4000:3]
    made, group = [], cpu.group_centroids

    def counted(centroids, **settings):
        made.append(len(centroids))
        return group(centroids, **settings)

    monkeypatch.setattr(cpu, "group_centroids", counted)
    monkeypatch.setattr(cpu, "_PROBES", 1 << 10)
    known, few, many = centroids[:1200].copy(), centroids[:1300].copy(), centroids.copy()
    cpu.groups_of(known)
    for more, expected in ((few, [1200]), (many, [1200, 1500])):
        cpu.extend_groups(known, more)
        groups = cpu.groups_of(more)
        assert made == expected
        assert len(biases(groups)) == len(more)
        np.testing.assert_array_equal(cpu.nearest(groups, some), true_nearest(some, more))


def test_few_groups_find_nearly_all(points):
    centroids = train_kmeans(points, 2048, iterations=4, progress=False)
    found = cpu.nearest(cpu.group_centroids(centroids, distance=False), points)
    best = true_nearest(points, centroids)
    assert (found == best).mean() > 0.9

    def error(codes):
        return np.square(points - centroids[codes]).sum(axis=1).mean()

    assert error(found) < 1.02 * error(best)


def test_two_levels_stay_near_lloyd(points, monkeypatch):
    def error(centroids):
        codes = true_nearest(points, centroids)
        return np.square(points - centroids[codes]).sum(axis=1).mean()

    two_level = error(train_kmeans(points, 2048, iterations=4, progress=False))
    monkeypatch.setattr(cpu, "EXACT", 4096)
    lloyd = error(train_kmeans(points, 2048, iterations=4, progress=False))
    assert two_level < 1.05 * lloyd


def test_threads_change_nothing(points, monkeypatch):
    def build():
        centroids = train_kmeans(points[:8000], 1500, iterations=2, progress=False)
        codec = train_codec(centroids, points[8000:9000], 2)
        return centroids, *compress(codec, points[:5000])

    several = build()
    monkeypatch.setattr(cpu, "num_threads", lambda: 1)
    for a, b in zip(several, build(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("buckets", ["optimal", "quantile"])
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_bytes_are_those_of_the_xla_program(points, nbits, buckets):
    codec, values = train_codec(points[:50], points[100:900], nbits, buckets), points[1000:1777]
    codes, residuals = compress(codec, values)
    ((rows, block),) = _compressed(data_mesh(), codec, values)
    xla_codes, xla_residuals = (np.asarray(part)[: rows.stop] for part in block)
    np.testing.assert_array_equal(codes, xla_codes)
    if len(codec.scales) == 1:
        np.testing.assert_array_equal(residuals, xla_residuals)
    # Of two scales that are equally good but for rounding, either may be taken.
    lengths = np.linalg.norm(values, axis=1)
    both = [np.asarray(decompress(codec, codes, of)) for of in (residuals, xla_residuals)]
    cosines = [(rounded * values).sum(axis=1) / lengths for rounded in both]
    np.testing.assert_allclose(*cosines, atol=1e-6)
    assert (residuals != xla_residuals).any(axis=1).mean() < 0.01


def test_shares_add_up_and_fit():
    for weights, counts, total in (
        ([1, 1, 1], [5, 5, 5], 7),
        ([0, 0, 9], [4, 4, 4], 12),
        ([9, 1, 0], [2, 50, 50], 40),
        ([0, 0, 0], [3, 0, 3], 5),
    ):
        shares = cpu._shares(np.array(weights, float), np.array(counts), total)
        assert shares.sum() == total and (shares <= counts).all() and (shares >= 0).all()


def test_as_many_centroids_as_points():
    points = unit_rows(np.random.default_rng(1), 1100, 8)
    centroids = train_kmeans(points, 5000, iterations=2, progress=False)
    assert centroids.shape == points.shape and np.isfinite(centroids).all()


@pytest.mark.parametrize("dim", [1, 5, 16, 128])
@pytest.mark.parametrize("count", [1, 16, 21])
def test_tiles_are_products(dim, count):
    rng = np.random.default_rng(dim)
    rows, other = rng.normal(size=(40, dim)), rng.normal(size=(count, dim))
    rows, other = rows.astype(np.float32), other.astype(np.float32)
    order = rng.integers(0, 40, 3 + tiles.ROWS).astype(np.int32)
    columns = tiles.packed(other)
    out = np.empty((tiles.ROWS, tiles.LANES), np.float32)
    expected = np.zeros((tiles.ROWS, len(columns) * tiles.LANES))
    expected[:, :count] = rows[order[3:]] @ other.T
    for s, strip in enumerate(columns):
        multiply_once(rows, order, strip, out)
        part = expected[:, s * tiles.LANES : (s + 1) * tiles.LANES]
        np.testing.assert_allclose(out, part, atol=1e-4)


@numba.njit
def multiply_once(rows, order, columns, out):
    tiles.multiply(rows, order, 3, columns, out)
