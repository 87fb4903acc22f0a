"""The kernel for GPUs, simulated: its memories, copies and products are Pallas' own in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from residual_reference import example, lowered, residual_maxsim, shapes

from colbert_jax.scoring import residual, residual_gpu

# Not exported by jax 0.10.
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

# nbits, B, n, L, Lq, D: slots that fill no chunk, query rows of two blocks of threads, documents
# of more than a tile, tiles in turn.
SHAPES = [
    (1, 1, 2, 3, 5, 96),
    (2, 2, 9, 40, 7, 32),
    (4, 1, 3, 130, 70, 32),
]


def simulated(arguments):
    fused = partial(residual_gpu.token_maxima, interpret=params.InterpretGPUParams())
    options = {"xla_backend_optimization_level": 0}
    run = partial(residual_maxsim, maxima=fused)
    return jax.jit(run, compiler_options=options)(*vars(arguments).values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_definition(shape):
    arguments, expected = example(*shape)
    scores = simulated(arguments)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    twin = jax.jit(residual_maxsim)(**vars(arguments))
    np.testing.assert_allclose(scores, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.slow  # 255 selects
def test_kernel_of_8_bits():
    arguments, expected = example(8, 1, 2, 19, 6, 32)
    np.testing.assert_allclose(simulated(arguments), expected, rtol=1e-5, atol=1e-5)


def test_three_parts_are_the_number():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 1e3
    values[:2] = 0, -1 + 2**-24
    parts = [np.asarray(part, np.float64) for part in jax.jit(residual_gpu.three_parts)(values)]
    np.testing.assert_array_equal(sum(parts), values)
    assert (abs(parts[1]) <= abs(parts[0]) / 2**7).all()


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_selects_are_a_table(nbits):
    fields, table = np.arange(-300, 300, dtype=np.int32), np.arange(1 << nbits) ** 2
    found = residual_gpu.select_weights(jnp.asarray(fields), list(table.astype(np.float32)))
    np.testing.assert_array_equal(found, table[fields % (1 << nbits)])


@pytest.mark.parametrize(("setting", "fused"), [(None, False), ("0", False), ("1", True)])
def test_on_gpus_where_asked_for(monkeypatch, setting, fused):
    monkeypatch.delenv("COLBERT_JAX_GPU_KERNELS", raising=False)
    if setting is not None:
        monkeypatch.setenv("COLBERT_JAX_GPU_KERNELS", setting)
    # A function of this test's own: JAX keeps what it has traced.
    text = lowered(lambda *given: residual_maxsim(*given), "cuda", shapes())
    assert ("mosaic_gpu" in text) == fused


def test_other_platforms_do_without(monkeypatch):
    monkeypatch.setenv("COLBERT_JAX_GPU_KERNELS", "1")
    for platform, kernel in (("cpu", "none"), ("tpu", "tpu_custom_call")):
        text = lowered(lambda *given: residual_maxsim(*given), platform, shapes())
        assert "mosaic_gpu" not in text and (kernel in text) == (platform == "tpu")


def test_documents_over_devices(eight_devices):
    """The kernel is lowered inside shard_map, where results differ between devices."""
    mesh = jax.make_mesh((8,), ("d",), devices=eight_devices, axis_types=(AxisType.Auto,))
    documents = P(None, "d")
    sharded = jax.shard_map(
        partial(residual_maxsim, maxima=partial(residual.token_maxima, kernel="mosaic_gpu")),
        mesh=mesh,
        in_specs=(P(), documents, documents, documents, documents, P()),
        out_specs=documents,
    )
    assert "mosaic_gpu" in lowered(sharded, "cuda", shapes())
