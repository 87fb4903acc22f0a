#!/usr/bin/env bash
# jax 0.12.0.1 (not 0.11.2), Python 3.12 or later.
# Inside `jax.shard_map`, the derivative of erf, erfc and exact GELU fails: jax 0.12 computes it
# with `lax.polynomial`, whose coefficients are alike on all devices while its argument is not, and
# the check of varying axes refuses the mixture. Values are fine; so are gradients of tanh, and of
# erf with `check_vma=False`.
# Output seen:
#   0.11.2 tanh: ok | erf: ok | gelu: ok | erf unchecked: ok
#   0.12.0.1 tanh: ok | erf: Primitive polynomial requires varying manual axes to match | gelu:
#     Primitive polynomial requires varying manual axes to match | erf unchecked: ok
# Fails if the behaviour changes. With another Python: PYTHON=python3.13 findings/THIS.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 12) and "needs Python 3.12")'
"${PYTHON:-python3}" -m venv "$folder/venv"

cat > "$folder/erf.py" <<'PYTHON'
import jax
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("data",))
x = jax.device_put(jax.numpy.linspace(-2, 2, 8), jax.NamedSharding(mesh, P("data")))


def outcome(function, **options):
    gradient = jax.grad(lambda x: function(x).sum())
    try:
        jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"), **options)(x)
    except ValueError as error:
        return str(error).partition(", but got")[0]
    return "ok"


outcomes = {
    "tanh": outcome(jax.numpy.tanh),
    "erf": outcome(jax.lax.erf),
    "gelu": outcome(lambda x: jax.nn.gelu(x, approximate=False)),
    "erf unchecked": outcome(jax.lax.erf, check_vma=False),
}
print(jax.__version__, " | ".join(f"{name}: {text}" for name, text in outcomes.items()))
refused = "ok"
if jax.__version_info__ >= (0, 12):
    refused = "Primitive polynomial requires varying manual axes to match"
assert list(outcomes.values()) == ["ok", refused, refused, "ok"]
PYTHON

for version in 0.11.2 0.12.0.1; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/erf.py"
done
