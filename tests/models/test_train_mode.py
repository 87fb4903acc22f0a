"""Dropout and recomputation in every backbone."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from colbert_jax.models.backbones import MODEL_TYPES, config_from_huggingface, make_backbone
from colbert_jax.models.layers import TrainMode, drop, rows_product

pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=1,
    embedding_size=16,
    local_attention=4,
)
# The module of another type, with other names.
SAME = ("xlm-roberta", "bidirectional_pplx_qwen3", "nomic_bert")
RENAMED = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24)


@pytest.fixture(scope="module", params=[kind for kind in MODEL_TYPES if kind not in SAME])
def backbone(request):
    """The output and the gradient of its weighted sum, a program for each way to train."""
    fields = SIZES | RENAMED | {"model_type": request.param}
    model = make_backbone(config_from_huggingface(fields), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(2, 31, (4, 10)), jnp.int32)
    attended = jnp.arange(10) < jnp.array([[10], [7], [3], [10]])
    weights = jnp.asarray(rng.normal(size=(4, 10, 16)), jnp.float32) * attended[..., None]

    def output(params, train, rows=slice(None)):
        return nnx.merge(graphdef, params)(ids[rows], attended[rows], train)

    @partial(jax.jit, static_argnums=(1, 2))
    def gradient(keys, dropout, remat):
        def loss(params):
            train = None if dropout is None else TrainMode(keys, dropout, remat)
            out = output(params, train)
            return jnp.sum(out * weights), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    @cache
    def run(seed=0, dropout=0.3, remat=False):
        """`dropout` None: not training."""
        (_, out), grads = gradient(keys(seed), dropout, remat)
        return np.asarray(out), jax.tree.map(np.asarray, grads)

    @partial(jax.jit, static_argnums=0)
    def alone(row, keys):
        rows = slice(row, row + 1)
        return output(params, TrainMode(keys[rows], 0.3, False), rows)

    return run, lambda row: np.asarray(alone(row, keys(0)))


def keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), 4)


def test_no_dropout_is_no_training(backbone):
    run, _ = backbone
    jax.tree.map(np.testing.assert_array_equal, run(dropout=0.0), run(dropout=None))


def test_recomputation_changes_nothing(backbone):
    """Gradients of recomputed layers, with the same dropout both times."""
    run, _ = backbone
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, run(remat=True), run())


def test_dropout_is_of_the_row(backbone):
    """Other keys, other output; a row alone loses what it loses among others."""
    run, alone = backbone
    out, _ = run()
    assert np.abs(out - run(dropout=None)[0]).max() > 0.1
    assert np.abs(out - run(seed=1)[0]).max() > 0.1
    np.testing.assert_allclose(alone(1)[0, :7], out[1, :7], rtol=1e-4, atol=1e-5)


def test_share_and_scale():
    x = jnp.ones((100, 1000), jnp.bfloat16)
    y = np.asarray(drop(x, jax.random.key(3), 0.1).astype(jnp.float32))
    assert abs((y == 0).mean() - 0.1) < 0.005
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-2)


def test_dropout_looks_random():
    """Places, rows and keys lose values independently of each other."""
    shape, rate = (3, 64, 257), 0.3
    lost = np.stack([drop(jnp.ones(shape), key, rate) == 0 for key in keys(7)])
    spread = (rate * (1 - rate) / lost[0].size) ** 0.5
    assert np.abs(lost.mean(axis=(1, 2, 3)) - rate).max() < 4 * spread
    flat = lost.reshape(len(lost), -1).astype(float) - rate
    for lag in (1, 2, 257, 64 * 257):  # neighbours along each axis
        assert np.abs((flat[:, :-lag] * flat[:, lag:]).mean()) < 3 * spread
    for other in flat[1:]:
        assert np.abs((flat[0] * other).mean()) < 4 * spread


@pytest.mark.parametrize(
    "k, m, dtype", [(6, 10, "float32"), (10, 6, "float32"), (6, 10, "bfloat16")]
)
def test_gradient_of_a_dense_layer(k, m, dtype):
    """As JAX has it, for kernels that widen and that narrow."""
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, k), (k, m), (2, 5, m))
    )
    last = (((2,), (0,)), ((), ()))

    def gradients(product):
        def loss(x, kernel):
            return (product(x, kernel, last, precision=jax.lax.Precision.HIGHEST) * weights).sum()

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    close = 1e-5 if dtype == "float32" else 2e-2
    for ours, theirs in zip(*map(gradients, (rows_product, jax.lax.dot_general)), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, close, close)
