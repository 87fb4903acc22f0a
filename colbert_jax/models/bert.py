"""BERT (Devlin et al., 2019) as published: learned positions, post-layer-norm, token type 0.

Parameters are float32; `dtype` is what the dense layers compute in. Layer normalisation and the
softmax are always float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import BertConfig

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str):
    """The activation function of that Hugging Face name. Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 asks for real float32: accelerators round to bfloat16 or TF32 unless told not to."""
    highest = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        normal = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=width, embedding_init=normal, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        positions = self.position.embedding[: ids.shape[1]]
        token_type = self.token_type.embedding[0]
        return self.norm(self.word(ids) + positions + token_type)


class Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        linear = partial(nnx.Linear, width, width, **_dense(config, dtype, rngs))
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.precision = matmul_precision(dtype)
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:  # [B, L, H] -> [B, L, heads, head_dim]
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        attend = partial(attention, precision=self.precision)
        # On a CPU one sequence at a time keeps its attention matrices in cache: 2-4 times faster.
        y = jax.lax.platform_dependent(
            query,
            key,
            value,
            bias,
            cpu=lambda *rows: jax.lax.map(lambda row: attend(*row), rows),
            default=jax.vmap(attend),
        )
        return self.output(y.reshape(x.shape))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    precision: jax.lax.Precision,
) -> jax.Array:
    """Scaled dot-product attention of one sequence: [L, heads, head_dim], bias [L] of the keys."""
    einsum = partial(jnp.einsum, precision=precision)
    scores = einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5 + bias, axis=-1)
    return einsum("hqk,khd->qhd", weights.astype(value.dtype), value)


class Layer(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        dense = _dense(config, dtype, rngs)
        norm = partial(nnx.LayerNorm, width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = norm()
        self.intermediate = nnx.Linear(width, inner, **dense)
        self.output = nnx.Linear(inner, width, **dense)
        self.output_norm = norm()
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, bias))
        return self.output_norm(x + self.output(self.activation(self.intermediate(x))))


class Bert(nnx.Module):
    """Token ids to hidden states.

    Args:
      config: the architecture.
      dtype: of the dense layers' computation; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in layers])

    def __call__(self, ids: jax.Array, attended: jax.Array) -> jax.Array:
        """
        Args:
          ids: int32[B, L], L at most `max_position_embeddings`.
          attended: bool[B, L], the tokens that others may attend to.

        Returns:
          float32[B, L, hidden_size], the last layer's output.
        """
        x = self.embeddings(ids)
        bias = jnp.where(attended, 0.0, jnp.finfo(jnp.float32).min)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def _dense(config: BertConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict:
    return dict(
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )
