"""Dropout and recomputation in every backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from colbert_jax.models.backbones import make_backbone
from colbert_jax.models.config import MODEL_TYPES, config_from_huggingface
from colbert_jax.models.layers import TrainMode, drop

SIZES = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=1,
    embedding_size=16,
    local_attention=4,
)
RENAMED = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=[kind for kind in MODEL_TYPES if kind != "xlm-roberta"])
def backbone(request):
    """A forward pass with a gradient: (train) -> (output, gradient of its weighted sum)."""
    fields = SIZES | RENAMED | {"model_type": request.param}
    model = make_backbone(config_from_huggingface(fields), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(2, 31, (4, 10)), jnp.int32)
    attended = jnp.arange(10) < jnp.array([[10], [7], [3], [10]])
    weights = jnp.asarray(rng.normal(size=(4, 10, 16)), jnp.float32) * attended[..., None]

    def run(train, rows=slice(None)):
        def loss(params):
            own = train and TrainMode(train.keys[rows], train.dropout, train.remat)
            module = nnx.merge(graphdef, params)
            out = module(ids[rows], attended[rows], own)
            return jnp.sum(out * weights[rows]), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return np.asarray(out), jax.tree.map(np.asarray, gradient)

    return run


def mode(seed=0, dropout=0.3, remat=False):
    return TrainMode(jax.random.split(jax.random.key(seed), 4), dropout, remat)


def test_no_dropout_is_no_training(backbone):
    plain, zero = backbone(None), backbone(mode(dropout=0.0))
    jax.tree.map(np.testing.assert_array_equal, zero, plain)


def test_recomputation_changes_nothing(backbone):
    """Gradients of recomputed layers, with the same dropout both times."""
    kept, again = backbone(mode()), backbone(mode(remat=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, again, kept)


def test_dropout_is_of_the_row(backbone):
    """Other keys, other output; a row alone loses what it loses among others."""
    out, _ = backbone(mode())
    assert np.abs(out - backbone(None)[0]).max() > 0.1
    assert np.abs(out - backbone(mode(seed=1))[0]).max() > 0.1
    alone, _ = backbone(mode(), rows=slice(1, 2))
    np.testing.assert_allclose(alone[0, :7], out[1, :7], rtol=1e-4, atol=1e-5)


def test_share_and_scale():
    x = jnp.ones((100, 1000), jnp.bfloat16)
    y = np.asarray(drop(x, jax.random.key(3), 0.1).astype(jnp.float32))
    assert abs((y == 0).mean() - 0.1) < 0.005
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-2)
