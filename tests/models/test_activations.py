"""GELU by erf: torch's formula, and as exact in bfloat16 as the type allows."""

import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.models.activations import ACTIVATIONS

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")


def test_gelu_is_torchs():
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    ours = ACTIVATIONS["gelu"](jnp.asarray(x))
    np.testing.assert_allclose(ours, torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)


def test_gelu_keeps_its_digits_in_bfloat16():
    x = jnp.linspace(-3, 3, 301).astype(jnp.bfloat16)
    ours = ACTIVATIONS["gelu"](x)
    assert ours.dtype == jnp.bfloat16
    exact = torch.nn.functional.gelu(torch.tensor(np.asarray(x, np.float64))).numpy()
    assert np.asarray(ours, np.float64) == pytest.approx(exact, rel=2**-8, abs=1e-12)
