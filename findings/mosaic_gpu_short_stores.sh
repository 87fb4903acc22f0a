#!/usr/bin/env bash
# jax 0.12.0.1 (not 0.11.2), Python 3.12 or later; no GPU is needed to see it.
# A Pallas kernel for Mosaic GPU (warpgroup semantics) that stores a vector of 16 or 48 float32, made
# of a product's accumulators, to global memory is no longer lowered: jax 0.12 wants whole lines of
# 128 bytes, multiples of 32 float32. The error names neither the store nor its place in the kernel.
# Output seen:
#   0.11.2 16: lowered | 32: lowered | 48: lowered
#   0.12.0.1 16: GMEM transfer does not access a whole number of complete 128 byte cache lines |
#     32: lowered | 48: GMEM transfer does not access a whole number of complete 128 byte cache lines
# Fails if the behaviour changes. With another Python: PYTHON=python3.13 findings/THIS.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 12) and "needs Python 3.12")'
"${PYTHON:-python3}" -m venv "$folder/venv"

cat > "$folder/store.py" <<'PYTHON'
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def column_maxima(x, width):
    """float32[width], of the products of x with itself, by one warpgroup."""

    def kernel(x_ref, out_ref, shared, ready):
        plgpu.copy_gmem_to_smem(x_ref, shared, ready)
        plgpu.barrier_wait(ready)

        def multiply(acc):
            plgpu.wgmma(acc, shared, shared.at[:, pl.ds(0, width)])
            return acc[...]

        products = pl.run_scoped(multiply, plgpu.ACC((64, width)))
        out_ref[...] = products.max(axis=0)

    tile = plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((width,), jnp.float32),
        scratch_types=[plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tile), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x)


def outcome(width):
    run = jax.jit(functools.partial(column_maxima, width=width))
    try:
        run.trace(jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    except Exception as error:
        return str(error).splitlines()[0]
    return "lowered"


outcomes = {width: outcome(width) for width in (16, 32, 48)}
print(jax.__version__, " | ".join(f"{width}: {text}" for width, text in outcomes.items()))
refused = "lowered"
if jax.__version_info__ >= (0, 12):
    refused = "GMEM transfer does not access a whole number of complete 128 byte cache lines"
assert list(outcomes.values()) == [refused, "lowered", refused]
PYTHON

for version in 0.11.2 0.12.0.1; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/store.py"
done
