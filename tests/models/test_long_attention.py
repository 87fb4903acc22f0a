"""Attention of long sequences, in blocks of rows, against attention in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.models import layers

REACHES = {"all": None, "causal": (None, 0), "local": (3, 2), "backwards": (4, None)}


def inputs(length=37, heads=2, width=4):
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(2, length, heads, width)), jnp.float32) for _ in range(3)]
    attended = np.ones((2, length), bool)
    attended[0, 30:] = False
    return *qkv, jnp.asarray(attended)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", REACHES)
def test_blocks(name, biased, monkeypatch):
    *qkv, attended = inputs()
    reach, bias = REACHES[name], None
    if biased:
        bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 37, 37)), jnp.float32)

    def total(qkv):
        y = layers.attend(*qkv, attended, bias, reach=reach)
        y = jnp.where(layers.sees_any(attended, reach)[..., None], y, 0)
        return (y * jnp.arange(y.size).reshape(y.shape)).sum(), y

    grad = jax.value_and_grad(total, has_aux=True)
    expected = jax.jit(grad)(qkv)
    monkeypatch.setattr(layers, "_WHOLE", 32)
    monkeypatch.setattr(layers, "_BLOCK", 2 * 16 * 20)
    blocked = jax.jit(lambda qkv: grad(qkv))(qkv)
    for ours, theirs in zip(jax.tree.leaves(blocked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", REACHES)
def test_sees_any(name):
    reach = REACHES[name] or (None, None)
    attended = np.random.default_rng(3).random((4, 23)) < 0.2
    i = np.arange(23)
    near = np.ones((23, 23), bool)
    if reach[0] is not None:
        near &= i >= i[:, None] - reach[0]
    if reach[1] is not None:
        near &= i <= i[:, None] + reach[1]
    expected = (attended[:, None] & near).any(axis=-1)
    seen = layers.sees_any(jnp.asarray(attended), REACHES[name])
    np.testing.assert_array_equal(np.broadcast_to(seen, expected.shape), expected)


@pytest.mark.parametrize("name", ["all", "local"])
def test_memory_of_8192_tokens(name):
    """What the program of one layer's attention of 16 heads takes, beside its arguments."""
    shape = jax.ShapeDtypeStruct((1, 8192, 16, 64), jnp.float32)
    reach = None if name == "all" else (64, 64)
    program = jax.jit(lambda q, k, v, a: layers.attend(q, k, v, a, reach=reach))
    compiled = program.lower(shape, shape, shape, jax.ShapeDtypeStruct((1, 8192), bool)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4e8


def test_attention_with_dropout_in_blocks(monkeypatch):
    *qkv, attended = inputs()
    monkeypatch.setattr(layers, "_WHOLE", 16)
    keys = jax.random.split(jax.random.key(0), 2)

    def run(rate):
        return layers.attend(*qkv, attended, train=layers.TrainMode(keys, rate))

    none, some = run(0.0), run(0.5)
    assert np.isfinite(some).all() and not np.allclose(none, some)
