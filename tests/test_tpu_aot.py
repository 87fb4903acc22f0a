"""Every jitted program compiles for a real TPU (v5e), on a machine that need not have one.

Lowering stops before the compiler of the TPU, which is where a kernel fails that asks for an
unsupported layout or more memory than the chip has. The compiler is in the package libtpu, which is
optional: `make tpu-aot` installs it and runs these. Nothing runs on a TPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_lowering

TOPOLOGY = "v5e:2x4"
# nbits, B, n, L, Lq, D: usual ones, ones that fill no tile, a query of many rows.
SHAPES = [
    (1, 4, 64, 128, 32, 128),
    (2, 4, 64, 180, 32, 128),
    (4, 4, 64, 128, 32, 128),
    (8, 2, 8, 128, 32, 128),
    (2, 3, 61, 48, 7, 96),
    (4, 4, 100, 32, 32, 128),
    (4, 1, 1, 1, 1, 16),
    (2, 2, 16, 256, 512, 128),
]

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the compiler for TPUs, is not installed: make tpu-aot",
    ),
]


@pytest.fixture(scope="module")
def compiled(index) -> dict[str, str]:
    """Of every program, by name, what its compiler said: an empty text if all went well.

    In a process of its own, because libtpu ends the process it is in where it cannot go on.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, str(index.path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["pallas", "xla"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_maxima(compiled, shape, kernel):
    assert compiled[f"{kernel} {shape}"] == ""


@pytest.mark.parametrize("name", test_lowering.NAMES)
def test_program(compiled, name):
    assert compiled[name] == ""


def compile_all(folder: str) -> dict[str, str]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AxisType, SingleDeviceSharding

    from colbert_jax import Index
    from colbert_jax.scoring.residual import token_maxima

    index = Index.open(folder)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    one = SingleDeviceSharding(chips[0])
    mesh = jax.make_mesh((len(chips),), ("data",), (AxisType.Auto,), devices=chips)

    def shaped(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    programs = {}
    for shape in SHAPES:
        nbits, batch, n, length, lq, dim = shape
        documents = (batch, n, length)
        arguments = (
            *(shaped(batch, lq, dim), shaped(*documents, lq)),
            shaped(*documents, dim * nbits // 8, dtype=jnp.uint8),
            *(shaped(*documents), shaped(1 << nbits)),
        )
        for kernel in ("pallas", "xla"):
            score = jax.jit(token_maxima, static_argnames="kernel")
            programs[f"{kernel} {shape}"] = score.trace(*arguments, kernel=kernel)
    programs |= test_lowering.traced(chips, lambda: test_lowering.of_index(index), mesh)

    problems = {}
    for name, traced in programs.items():
        try:
            fused = "tpu_custom_call" in traced.lower().compile().as_text()
            searches = "plaid" in name or ("learned" in name and name != "learned vectors")
            expected = name.startswith("pallas") or searches
            problems[name] = "" if fused == expected else f"the fused kernel is in it: {fused}"
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"
    return problems


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(compile_all(sys.argv[1])))
