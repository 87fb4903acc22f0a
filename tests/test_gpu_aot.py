"""Every jitted program compiles for a real GPU (an H100), on a machine that need not have one.

At sizes of use: an index of 1,000,000 passages on one device and of 8,000,000 on eight, BERT-base
for texts. The compiler and what it calls are in two packages: `make gpu-aot` installs them, in an
environment of its own, runs these and prints the table. Nothing runs on a GPU. The training steps
take minutes to compile, the others seconds: only what `-k` chooses is compiled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

DEVICE = "NVIDIA H100 80GB HBM3"
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{DEVICE}"
"""
# Triton's matrix products are chosen by timing them; without a GPU to do that, XLA stops at one of
# CLIP's ("Couldn't find output tile sizes", jax 0.10.2), so cuBLAS' are taken.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_gpu_enable_triton_gemm=false"
MIB = 1 << 20
# Of the kernel that scores residuals: bits of a dimension, dimensions.
KERNELS = [(nbits, dim) for nbits in (1, 2, 4, 8) for dim in (64, 96, 128)]
# Of temporary memory, in MiB, about a quarter above what was measured (jax 0.10.2).
LIMITS = {
    "all pairs": 6,
    "n-way": 6,
    "ragged": 6,
    "plaid": 651,
    "plaid in some documents": 651,
    "plaid of a few documents": 641,
    "learned": 643,
    "learned in some documents": 643,
    "sharded learned": 644,
    "learned vectors": 165,
    "exact": 11,
    "sharded plaid": 651,
    "sharded plaid in some documents": 651,
    "sharded exact": 11,
    "merged shards": 1,
    "k-means": 646,
    "sharded k-means": 646,
    "sharded means": 1,
    "compress": 686,
    "sharded compress": 686,
    "decompress": 41,
    "norms": 1,
    "sharded norms": 1,
    "image query": 88,
    "training step": 2_149,
    "sharded training step": 11_625,
    "sharded training step of images": 36_656,
    "encoder": 1_241,
    "plaid, fused": 651,
    "sharded plaid, fused": 651,
    "sharded encoder": 1_241,
} | {f"fused kernel, {nbits} x {dim}": 1 for nbits, dim in KERNELS}
# Their residuals are copied to whole chunks of 16 bytes.
LIMITS |= {"fused kernel, 1 x 64": 11, "fused kernel, 1 x 96": 11, "fused kernel, 2 x 96": 21}

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="the compiler for GPUs is not installed: make gpu-aot",
    ),
]


@pytest.fixture(scope="module")
def compiled(request) -> dict[str, dict]:
    """Of every program whose test was chosen, by name: seconds, temporary bytes, and whether there
    is code."""
    chosen = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in chosen if hasattr(item, "callspec")]
    # Without JAX_PLATFORMS the plugin looks for cuDNN when it is registered.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.run(
        [sys.executable, __file__, *names], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    print(table(found))
    return found


@pytest.mark.parametrize("name", LIMITS)
def test_program(compiled, name):
    found = compiled[name]
    assert "error" not in found, found["error"]
    assert found["code"] and found["temporary"] <= LIMITS[name] * MIB
    assert found["kernel"] == ("fused" in name)


def test_all_programs_are_held():
    assert sorted(shapes()) == sorted(LIMITS)


def shapes():
    """The programs of tests/test_lowering.py at sizes of use."""
    import jax
    import jax.numpy as jnp
    import test_lowering
    from test_lowering import shaped

    from colbert_jax.checkpoints.flmr import VISION_DEFAULTS
    from colbert_jax.compression.codec import ResidualCodec
    from colbert_jax.models.bert import BertConfig
    from colbert_jax.models.colbert import EncoderConfig
    from colbert_jax.models.flmr import ImageEncoderConfig
    from colbert_jax.models.vision import vision_config
    from colbert_jax.scoring.residual import token_maxima
    from colbert_jax.search import plaid
    from colbert_jax.search.arrays import IndexArrays

    documents, tokens, clusters, dim, nbits = 1 << 20, 80 << 20, 1 << 17, 128, 2
    integers = partial(shaped, dtype=jnp.int32)
    arrays = IndexArrays(
        centroids=shaped(clusters, dim),
        bucket_weights=shaped(1 << nbits),
        codes=integers(tokens),
        residuals=shaped(tokens, dim * nbits // 8, dtype=jnp.uint8),
        offsets=integers(documents + 1),
        lists=integers(tokens * 3 // 4),
        list_offsets=integers(clusters + 1),
        inverse_norms=shaped(tokens),
    )
    codec = ResidualCodec(arrays.centroids, shaped((1 << nbits) - 1), arrays.bucket_weights)
    found = test_lowering.programs(
        arrays, codec, batch=(32, 32), capacity=1 << 17, ndocs=1024, block=1 << 16, width=512
    )
    base = BertConfig(
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )
    encoder = EncoderConfig.projecting(base, dim)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:8])
    sizes = dict(encoder=encoder, lengths=(32, 180))
    found["learned vectors"] = test_lowering.learned_solver(dim, 1 << 13, 1024, 1 << 12, 512, 128)
    found["training step"] = test_lowering.training_step(bsize=8, nway=16, **sizes)
    found["sharded training step"] = test_lowering.training_step(mesh, bsize=64, nway=16, **sizes)
    images = ImageEncoderConfig(
        vision=vision_config(VISION_DEFAULTS), dim=dim, mapping=base.with_layers(1)
    )
    found["image query"] = test_lowering.image_query(images, batch=32)
    found["sharded training step of images"] = test_lowering.image_training_step(
        mesh, encoder, images, bsize=64, nway=5, lengths=(32, 512)
    )
    found["encoder"] = test_lowering.encoder(encoder, 256, 180)
    found["sharded encoder"] = test_lowering.encoder(encoder, 256, 180, mesh)
    static = 4, 1024, 10, 1 << 17, plaid._ACCELERATOR
    found["plaid, fused"] = (
        lambda a, q: by_the_kernel(plaid._search_batch, a, q, 0.5, *static),
        *(arrays, shaped(32, 32, dim)),
    )
    plain, *given = found["sharded plaid"]
    found["sharded plaid, fused"] = partial(by_the_kernel, plain.func, **plain.keywords), *given
    for nbits, width in KERNELS:
        found[f"fused kernel, {nbits} x {width}"] = (
            partial(token_maxima, kernel="mosaic_gpu"),
            *(shaped(32, 32, width), shaped(32, 512, 32, 32)),
            shaped(32, 512, 32, width * nbits // 8, dtype=jnp.uint8),
            *(shaped(32, 512, 32), shaped(1 << nbits)),
        )
    return found


def by_the_kernel(function, *arguments, **settings):
    """A jitted program as it is where COLBERT_JAX_GPU_KERNELS=1 is set, traced anew."""
    # Not the environment itself: Pallas puts there, when imported, where its library is.
    with mock.patch("colbert_jax.runtime.use_gpu_kernels", lambda: True):
        return function.__wrapped__(*arguments, **settings)


def abstract_gpu():
    """Pallas asks for the device's kind from JAX 0.11 on, which there is no device to tell."""
    import jax

    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind=DEVICE, num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def compile_all(names: list[str]) -> dict[str, dict]:
    """Compile the programs of these names, all without any."""
    import jax
    import test_lowering
    from jax.experimental import topologies

    # Hosts, devices of a host, 1: of GPUs no other order works.
    chips = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=TARGET, topology="1x8x1"
    ).devices
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,), devices=chips)

    def chosen():
        return {name: made for name, made in shapes().items() if not names or name in names}

    results = {}
    for name, program in test_lowering.traced(chips, chosen, mesh).items():
        start = time.perf_counter()
        try:
            with abstract_gpu() if "fused" in name else contextlib.nullcontext():
                made = program.lower().compile()
            executable = made.runtime_executable()
            results[name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "temporary": executable.get_compiled_memory_stats().temp_size_in_bytes,
                "code": b"ELF" in executable.serialize(),
                "kernel": "mosaic_gpu" in made.as_text(),
            }
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        print(name, results[name], file=sys.stderr, flush=True)
    return results


def table(results: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| program | seconds to compile | temporary MiB |", "|---|---|---|"]
    for name, found in results.items():
        said = found.get("error") or f"{found['temporary'] / MIB:,.1f}"
        lines.append(f"| {name} | {found.get('seconds', '')} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(compile_all(sys.argv[1:])))
