"""Scoring of compressed tokens: against embeddings decompressed one by one, kernel and twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from residual_reference import example, lowered, residual_maxsim, shapes

from colbert_jax.compression.codec import pack
from colbert_jax.scoring import residual, residual_tpu, slots

# nbits, B, n, L, Lq, D. A tile of the kernel is 128 tokens of 8 documents, or 32 of 32.
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (1, 2, 2, 128, 5, 96),
    (2, 2, 9, 200, 40, 32),
    (2, 1, 1, 129, 32, 128),
    (4, 1, 34, 17, 7, 128),
    (8, 1, 2, 19, 6, 32),
]


def interpreted(arguments, interpret):
    """The kernel on CPU, where compiling it is what takes time."""
    fused = partial(residual_tpu.token_maxima, interpret=interpret)
    run = partial(residual_maxsim, maxima=fused)
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(run, compiler_options=options)(*vars(arguments).values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_is_the_definition(shape):
    arguments, expected = example(*shape)
    scores = jax.jit(residual_maxsim)(**vars(arguments))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert np.isneginf(expected).any() or shape[2] == 1


# 8 bits are left out: their 255 selects take long to compile for CPU, and have a test below.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 8], ids=str)
def test_kernel_is_the_definition(shape):
    arguments, expected = example(*shape)
    scores = interpreted(arguments, True)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    twin = jax.jit(residual_maxsim)(**vars(arguments))
    np.testing.assert_allclose(scores, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_selects_are_a_table(nbits):
    """The weights of every byte, against those of the packed buckets."""
    weights = np.arange(1 << nbits, dtype=np.float32)
    buckets = np.random.default_rng(0).integers(0, 1 << nbits, (300, 8))
    packed = pack(jnp.asarray(buckets), nbits)
    values = list(np.asarray(slots.field_weights(weights)))
    found = slots.slot_weights(packed, values)
    np.testing.assert_array_equal(found, slots.slot_major(buckets.astype(np.float32), weights))


def test_kernel_with_the_memories_of_a_tpu_simulated():
    """What lies beyond the edges of the arrays is NaN there."""
    arguments, expected = example(2, 1, 3, 130, 4, 16)
    scores = interpreted(arguments, pltpu.InterpretParams(uninitialized_memory="nan"))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nbits", [1, 4])
def test_inverse_norms(nbits):
    rng = np.random.default_rng(nbits)
    centroids = rng.normal(size=(5, 16)).astype(np.float32)
    weights = rng.normal(size=1 << nbits).astype(np.float32)
    codes, buckets = rng.integers(0, 5, (3, 4)), rng.integers(0, 1 << nbits, (3, 4, 16))
    centroids[codes[0, 0]], buckets[0, 0], weights[0] = 0, 0, 0
    packed = pack(jnp.asarray(buckets), nbits)
    found = jax.jit(residual.inverse_norms)(centroids, codes, packed, weights)
    norms = np.linalg.norm(centroids[codes].astype(np.float64) + weights[buckets], axis=-1)
    np.testing.assert_allclose(found, 1 / np.maximum(norms, 1e-12), rtol=1e-6)
    assert norms[0, 0] == 0


def test_order_of_tokens_and_padding_change_nothing():
    arguments, _ = example(2, 2, 3, 30, 6, 32)
    order = np.random.default_rng(1).permutation(30)
    changed = dict(vars(arguments))
    for name in ("similarity", "residuals", "inverse_norms", "mask"):
        array = changed[name][:, :, order]
        padding = [(0, 0), (0, 0), (0, 9)] + [(0, 0)] * (array.ndim - 3)
        changed[name] = np.pad(array, padding, constant_values=False if name == "mask" else 7)
    score = jax.jit(residual_maxsim)
    np.testing.assert_allclose(score(**changed), score(**vars(arguments)), rtol=1e-6)


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_fused_where_compiled_for_a_tpu(nbits):
    """The default follows the platform that a program is compiled for, not the one it is on."""
    assert "tpu_custom_call" in lowered(residual_maxsim, "tpu", shapes(nbits))


@pytest.mark.parametrize(
    ("platform", "kernel", "fused"),
    [("tpu", "pallas", True), ("tpu", "xla", False), ("cuda", None, False), ("cpu", None, False)],
)
def test_kernel_asked_for(platform, kernel, fused):
    function = partial(residual_maxsim, maxima=partial(residual.token_maxima, kernel=kernel))
    assert ("tpu_custom_call" in lowered(function, platform, shapes())) == fused


def test_documents_over_devices(eight_devices):
    mesh = jax.make_mesh((8,), ("d",), devices=eight_devices, axis_types=(AxisType.Auto,))
    documents = P(None, "d")
    sharded = jax.shard_map(
        residual_maxsim,
        mesh=mesh,
        in_specs=(P(), documents, documents, documents, documents, P()),
        out_specs=documents,
    )
    arguments, expected = example(2, 2, 16, 20, 8, 16)
    scores = jax.jit(sharded)(*vars(arguments).values())
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert "tpu_custom_call" in lowered(sharded, "tpu", shapes())


def test_kernel_that_does_not_exist():
    arguments, _ = example(4, 1, 1, 1, 1, 16)
    with pytest.raises(ValueError, match=r"'xla', 'pallas'.* got 'triton'"):
        residual_maxsim(**vars(arguments), maxima=partial(residual.token_maxima, kernel="triton"))
