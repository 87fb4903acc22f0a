"""The residual codec against Stanford's own outputs and hand-worked bytes."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.compression.codec import (
    SCALES,
    ResidualCodec,
    _lloyd_max,
    check_packable,
    compress,
    decompress,
    pack,
    train_codec,
    unpack,
)
from colbert_jax.compression.sharding import data_mesh

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "stanford_codec.npz")


@pytest.fixture(params=["default", "mesh"])
def mesh(request):
    """None, for which a CPU may have a way of its own, and a mesh of one device."""
    return None if request.param == "default" else data_mesh()


@pytest.mark.parametrize(
    ("nbits", "buckets", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0], [0x80, 0xD0]),
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0x27, 0xD8]),
        (4, [1, 2, 3, 4, 8, 15, 0, 7], [0x84, 0xC2, 0x1F, 0x0E]),
        (8, [1, 2, 255], [0x80, 0x40, 0xFF]),
    ],
)
def test_golden_bytes(nbits, buckets, expected):
    packed = pack(jnp.array(buckets), nbits)
    assert packed.tolist() == expected
    assert unpack(np.asarray(packed), nbits).tolist() == buckets


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_packing_is_reversible(nbits):
    buckets = np.random.default_rng(nbits).integers(0, 2**nbits, (50, 64))
    packed = np.asarray(pack(jnp.asarray(buckets), nbits))
    assert packed.shape == (50, 8 * nbits)
    assert (unpack(packed, nbits) == buckets).all()


def golden_codec(nbits: int, prefix: str = "") -> ResidualCodec:
    prefix = prefix or f"b{nbits}"
    return ResidualCodec(
        *(
            jnp.asarray(GOLDEN[key])
            for key in (
                f"b{nbits}_centroids",
                f"{prefix}_bucket_cutoffs",
                f"b{nbits}_bucket_weights",
            )
        )
    )


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_equals_stanford(nbits, mesh):
    """Codes and bytes bit for bit, decompressed embeddings to rounding."""
    codec = golden_codec(nbits)
    codes, residuals = compress(codec, GOLDEN[f"b{nbits}_inputs"], mesh)
    np.testing.assert_array_equal(codes, GOLDEN[f"b{nbits}_codes"])
    np.testing.assert_array_equal(residuals, GOLDEN[f"b{nbits}_residuals"])
    values = decompress(codec, jnp.asarray(codes), jnp.asarray(residuals))
    np.testing.assert_allclose(values, GOLDEN[f"b{nbits}_decompressed"], atol=1e-6)
    assert codec.nbits == nbits


def test_a_value_at_a_cutoff_stays_below_it(mesh):
    _, residuals = compress(golden_codec(2, "b2tie"), GOLDEN["b2_inputs"], mesh)
    np.testing.assert_array_equal(residuals, GOLDEN["b2tie_residuals"])


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_statistics_equal_stanford(nbits):
    points = GOLDEN[f"b{nbits}_inputs"]
    codec = train_codec(GOLDEN[f"b{nbits}_centroids"], points, nbits, "quantile")
    for name in ("bucket_cutoffs", "bucket_weights"):
        np.testing.assert_allclose(getattr(codec, name), GOLDEN[f"b{nbits}_{name}"], atol=1e-7)


def cosines_of(codec, codes, residuals, points):
    values = np.asarray(decompress(codec, jnp.asarray(codes), jnp.asarray(residuals)))
    return (values * points).sum(axis=1)


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_embeddings_are_rounded_to_the_nearest_direction(nbits):
    rng = np.random.default_rng(nbits)
    centroids, points = unit_rows(rng, 8, 32), unit_rows(rng, 400, 32)
    codec = train_codec(centroids, points, nbits)
    assert codec.scales == (SCALES if nbits < 8 else (1,))
    codes, residuals = compress(codec, points)
    found = cosines_of(codec, codes, residuals, points)
    cutoffs, weights = np.asarray(codec.bucket_cutoffs), np.asarray(codec.bucket_weights)
    of_scales = []
    for scale in codec.scales:
        rounded = (
            centroids[codes] + weights[np.searchsorted(cutoffs, scale * points - centroids[codes])]
        )
        of_scales.append((points * rounded).sum(axis=1) / np.linalg.norm(rounded, axis=1))
    np.testing.assert_allclose(found, np.max(of_scales, axis=0), atol=2e-6)
    if nbits < 8:
        plain = train_codec(centroids, points, nbits, "quantile")
        theirs = cosines_of(plain, *compress(plain, points), points)
        assert 1 - found.mean() < 0.93 * (1 - theirs.mean())
        least = [  # what rounding with the smallest squared error gives
            np.asarray(w) for w in _lloyd_max(np.sort((points - centroids[codes]).ravel()), weights)
        ]
        rounded = centroids[codes] + least[1][np.searchsorted(least[0], points - centroids[codes])]
        squared = (points * rounded).sum(axis=1) / np.linalg.norm(rounded, axis=1)
        assert 1 - found.mean() < 0.97 * (1 - squared.mean())


def test_a_codec_of_stanford_has_no_scales():
    for nbits in (1, 2, 4, 8):
        assert golden_codec(nbits).scales == (1,)


def test_optimal_buckets_of_8_bits_have_the_smallest_error():
    nbits = 8
    rng = np.random.default_rng(nbits)
    centroids, points = unit_rows(rng, 8, 32), unit_rows(rng, 400, 32)
    codec = train_codec(centroids, points, nbits)
    codes = np.argmax(points @ centroids.T, axis=1)
    residuals = (points - centroids[codes]).ravel()
    cutoffs, weights = np.asarray(codec.bucket_cutoffs), np.asarray(codec.bucket_weights)
    np.testing.assert_allclose(cutoffs, (weights[1:] + weights[:-1]) / 2, atol=1e-6)

    def error(weights):
        return np.square(residuals - weights[np.searchsorted(cutoffs, residuals)]).mean()

    quantile = train_codec(centroids, points, nbits, "quantile")
    places = np.searchsorted(np.asarray(quantile.bucket_cutoffs), residuals)
    theirs = np.square(residuals - np.asarray(quantile.bucket_weights)[places]).mean()
    assert error(weights) < 0.97 * theirs
    for step in (-0.01, 0.01):  # no single weight is better elsewhere
        for i in range(len(weights)):
            moved = weights.copy()
            moved[i] += step * np.ptp(weights)
            assert error(weights) <= error(moved) + 1e-9


def test_unknown_buckets_are_named():
    with pytest.raises(ValueError, match="buckets must be one of"):
        train_codec(np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32), 2, "best")


def test_more_bits_less_error():
    rng = np.random.default_rng(0)
    centroids, points = unit_rows(rng, 8, 32), unit_rows(rng, 400, 32)
    errors = []
    for nbits in (1, 2, 4, 8):
        codec = train_codec(centroids, points, nbits)
        codes, residuals = compress(codec, points)
        values = np.asarray(decompress(codec, jnp.asarray(codes), jnp.asarray(residuals)))
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
        errors.append(np.abs(values - points).mean())
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_blocks_are_seamless(monkeypatch, mesh):
    codec, points = golden_codec(2), GOLDEN["b2_inputs"]
    monkeypatch.setattr("colbert_jax.compression.codec._BLOCK", 13)
    codes, residuals = compress(codec, points, mesh)
    np.testing.assert_array_equal(codes, GOLDEN["b2_codes"])
    np.testing.assert_array_equal(residuals, GOLDEN["b2_residuals"])


@pytest.mark.parametrize("n", [1, 21, 700])
def test_devices_change_nothing(eight_devices, monkeypatch, n):
    monkeypatch.setattr("colbert_jax.compression.codec._BLOCK", 32)
    rng = np.random.default_rng(0)
    codec = train_codec(unit_rows(rng, 50, 32), unit_rows(rng, 200, 32), 2)
    points = unit_rows(rng, n, 32)
    one, two, eight = (compress(codec, points, data_mesh(eight_devices[:n])) for n in (1, 2, 8))
    for ours in (two, eight):
        np.testing.assert_array_equal(ours[0], one[0])
        np.testing.assert_array_equal(ours[1], one[1])
    nearest = (points @ np.asarray(codec.centroids).T).argmax(axis=1)
    np.testing.assert_array_equal(one[0], nearest)


def test_dimensions_that_do_not_fill_bytes():
    check_packable(12, 2)
    with pytest.raises(ValueError, match=r"12 dimensions at 1 bits .* multiple of 8"):
        check_packable(12, 1)
    with pytest.raises(ValueError, match="nbits must be one of"):
        check_packable(12, 3)
