import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.compression import assign, kmeans
from colbert_jax.compression.kmeans import num_centroids_for, sample_size_for, train_kmeans
from colbert_jax.compression.refill import refill
from colbert_jax.compression.sharding import data_mesh


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(50, 64), (71, 128), (284, 256), (1000, 256), (853_477, 8192), (65.6e6, 65536)]
    + [(597.9e6, 262_144), (9.4e9, 1_048_576)],
)
def test_golden_number_of_centroids(tokens, expected):
    assert num_centroids_for(tokens) == expected


@pytest.mark.parametrize(
    ("documents", "expected"),
    [(1, 1), (10_000, 10_000), (269_000, 90_905), (2_400_000, 271_530), (138_400_000, 2_061_953)],
)
def test_golden_sample_size(documents, expected):
    # The reference gives rounded collection sizes, so its figures hold to a few documents.
    assert sample_size_for(documents) == pytest.approx(expected, rel=1e-3)


def lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        distance = ((points[:, None] - centroids[None]) ** 2).sum(axis=2)
        nearest = distance.argmin(axis=1)
        centroids = np.stack([points[nearest == c].mean(axis=0) for c in range(len(centroids))])
    return centroids / np.linalg.norm(centroids, axis=1, keepdims=True)


@pytest.fixture(params=["default", "mesh"])
def mesh(request):
    """None, for which a CPU may have a way of its own, and a mesh of one device."""
    return None if request.param == "default" else data_mesh()


def test_equals_plain_lloyd(mesh):
    """Points around separated directions, one initial centroid near each: no cluster empties."""
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16, dtype=np.float32)
    points = np.concatenate([c + 0.1 * rng.normal(size=(60, 16)) for c in centres])
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

    def initial(seed: int) -> np.ndarray:
        return points[np.sort(np.random.default_rng(seed).choice(np.arange(240), 4, replace=False))]

    seed = next(s for s in range(999) if len(set((initial(s) @ centres.T).argmax(axis=1))) == 4)
    ours = train_kmeans(points, 4, iterations=3, seed=seed, mesh=mesh)
    np.testing.assert_allclose(ours, lloyd(points, initial(seed), 3), atol=1e-5)


def test_blocks_and_half_precision_change_little(monkeypatch, mesh):
    points = unit_rows(np.random.default_rng(0), 1000, 16)
    whole = train_kmeans(points, 20, seed=3, mesh=mesh)
    monkeypatch.setattr(kmeans, "_BLOCK", 64)
    np.testing.assert_allclose(train_kmeans(points, 20, seed=3, mesh=mesh), whole, atol=1e-4)
    np.testing.assert_allclose(
        train_kmeans(points.astype(np.float16), 20, seed=3, mesh=mesh), whole, atol=0.1
    )


def test_seeded(mesh):
    points = unit_rows(np.random.default_rng(0), 300, 16)
    a, b, c = (train_kmeans(points, 8, seed=s, mesh=mesh) for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_more_centroids_than_points(mesh):
    points = unit_rows(np.random.default_rng(0), 3, 16)
    centroids = train_kmeans(points, 64, mesh=mesh)
    assert centroids.shape == (3, 16)
    np.testing.assert_allclose(centroids, points, atol=1e-6)


def test_subset_is_used_above_the_limit(mesh):
    points = unit_rows(np.random.default_rng(0), 5000, 8)
    limited = train_kmeans(points, 4, max_points_per_centroid=10, mesh=mesh)
    assert limited.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(limited, axis=1), 1, atol=1e-5)


def test_rows_select_points(mesh):
    points = unit_rows(np.random.default_rng(0), 100, 8)
    rows = np.arange(0, 100, 2)
    np.testing.assert_allclose(
        train_kmeans(points, 4, rows=rows, mesh=mesh),
        train_kmeans(points[rows], 4, mesh=mesh),
        atol=1e-6,
    )


def test_empty_clusters_are_refilled(mesh):
    """All points but one are equal, so most of the initial centroids lose their points."""
    points = np.tile(np.eye(1, 8, dtype=np.float32), (50, 1))
    points[7] = np.eye(8, dtype=np.float32)[3]
    centroids = train_kmeans(points, 5, iterations=6, mesh=mesh)
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert (centroids @ points[0]).max() > 0.99 and (centroids @ points[7]).max() > 0.99


def test_refill_splits_the_largest_and_copes_with_more_empty_than_full():
    means = np.eye(5, 8, dtype=np.float32)
    counts = np.array([10, 0, 0, 0, 3], np.float32)
    refilled = refill(means, counts)
    assert np.isfinite(refilled).all()
    assert np.argmax(refilled[1]) == 0  # a copy of the largest
    assert len({tuple(row) for row in refilled.round(6)}) == 5


def test_no_points():
    with pytest.raises(ValueError, match="at least one point"):
        train_kmeans(np.zeros((0, 4), np.float32), 2)


@pytest.mark.parametrize("n", [1, 256, 257, 1000])
def test_argmax_in_blocks(n):
    x = np.random.default_rng(n).integers(0, 40, (30, n)).astype(np.float32)
    np.testing.assert_array_equal(assign.argmax(jnp.asarray(x)), x.argmax(axis=1))


def test_nearest_blocks():
    rng = np.random.default_rng(0)
    points, centroids = unit_rows(rng, 700, 16), unit_rows(rng, 300, 16)
    codes = assign.nearest_blocks(points, jnp.asarray(centroids), block=128)
    np.testing.assert_array_equal(codes, (points @ centroids.T).argmax(axis=1))


@pytest.mark.parametrize("scores", [1 << 12, 1 << 27])
@pytest.mark.parametrize("n", [1, 256, 700])
def test_both_ways_to_the_nearest_centroid(monkeypatch, n, scores):
    """What accelerators run and what a CPU runs; equal scores go to the smaller centroid."""
    monkeypatch.setattr(assign, "_SCORES", scores)
    rng = np.random.default_rng(n)
    points, half, bias = (  # small whole numbers: sums without rounding, many of them equal
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((n, 16), (150, 16), 300)
    )
    centroids = np.concatenate([half, half])
    expected = (points @ centroids.T + bias).argmax(axis=1)
    for way in (assign.nearest_in_cache, assign.nearest_by_matmul):
        codes = jax.jit(way)(*map(jnp.asarray, (points, centroids, bias)))
        assert codes.dtype == jnp.int32
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_way_is_chosen_by_platform(platform):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 16), (300, 16), (300,))]
    text = assign.nearest.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("while" in text) == (platform == "cpu")  # the CPU's goes block by block
    assert "tensor<1024x300xf32>" in text or platform == "cpu"
    assert "HIGHEST" in text


def test_devices_change_rounding_only(eight_devices, monkeypatch):
    """Blocks that do not divide by 8, the last one small; one cluster empties and is refilled."""
    monkeypatch.setattr(kmeans, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    points = unit_rows(rng, 1100, 16)
    points[:40] = points[0]
    rows = np.flatnonzero(rng.random(1100) < 0.9)
    one, two, eight = (
        train_kmeans(points, 40, rows=rows, seed=3, mesh=data_mesh(eight_devices[:n]))
        for n in (1, 2, 8)
    )
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(eight, one, atol=1e-5)


def test_a_process_reads_only_its_devices_rows(eight_devices):
    """Every row once an iteration, a device's share at a time."""
    points, read = unit_rows(np.random.default_rng(0), 1000, 8), []

    class Points:
        def __len__(self):
            return len(points)

        def __getitem__(self, rows):
            read.append(rows)
            return points[rows]

    train_kmeans(Points(), 4, iterations=2, mesh=data_mesh(eight_devices))
    shares = read[1:]  # the first are the initial centroids
    assert len(shares) == 16 and max(map(len, shares)) == 128
    assert np.concatenate(shares).tolist() == [*range(1000)] * 2


def test_a_mesh_of_another_kind(eight_devices):
    points = unit_rows(np.random.default_rng(0), 8, 8)
    square = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"a mesh of one axis, got .*'a': 2, 'b': 4"):
        train_kmeans(points, 2, mesh=square)
