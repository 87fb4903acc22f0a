"""What the backbones share: attention, the post-layer-norm transformer layer, embeddings.

Parameters are float32; `dtype` is what the dense layers compute in. Layer normalisation and the
softmax are always float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.activations import activation
from colbert_jax.models.config import BackboneConfig

# Added to the score of a token that must not be attended to. Finite, so that a row with nothing
# to attend to gives an average and not NaN; nothing may be added to it but the score.
MASKED = float(jnp.finfo(jnp.float32).min)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 asks for real float32: accelerators round to bfloat16 or TF32 unless told not to."""
    highest = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT


def dense(config: BackboneConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keyword arguments of every `nnx.Linear` of a backbone."""
    return dict(
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


def layer_norm(
    config: BackboneConfig, width: int, *, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nnx.LayerNorm(
        width,
        epsilon=config.layer_norm_eps,
        use_bias=use_bias,
        use_fast_variance=False,
        rngs=rngs,
    )


def check_length(ids: jax.Array, longest: int) -> None:
    """Raises ValueError for sequences with more tokens than the model has positions."""
    if ids.shape[1] > longest:
        raise ValueError(f"sequences of {ids.shape[1]} tokens; the model has {longest} positions")


def positions_after_padding(ids: jax.Array, padding: int) -> jax.Array:
    """int32[B, L]: tokens count up from padding + 1, padding tokens stay at padding (fairseq)."""
    counted = (ids != padding).astype(jnp.int32)
    return jnp.cumsum(counted, axis=1) * counted + padding


class Embeddings(nnx.Module):
    """Word, position and, with `token_types` > 0, token type 0; normalised."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        token_types: int = 0,
        width: int | None = None,
        rngs: nnx.Rngs,
    ):
        width = width or config.hidden_size
        normal = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=width, embedding_init=normal, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(token_types) if token_types else None
        self.norm = layer_norm(config, width, rngs=rngs)

    def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """ids int32[B, L], positions int32[B, L] or [L] -> float32[B, L, width]."""
        x = self.word(ids)
        if self.token_type is not None:
            x = x + self.token_type.embedding[0]
        return self.norm(x + self.position(positions))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    precision: jax.lax.Precision,
) -> jax.Array:
    """Scaled dot-product attention of one sequence: [L, heads, head_dim].

    `bias`, float32 and broadcastable to [heads, L of the queries, L of the keys], is added to the
    scores.
    """
    einsum = partial(jnp.einsum, precision=precision)
    scores = einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5 + bias, axis=-1)
    return einsum("hqk,khd->qhd", weights.astype(value.dtype), value)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: jax.Array,
    position_bias: jax.Array | None = None,
) -> jax.Array:
    """Attention within each sequence of a batch.

    Args:
      query, key, value: [B, L, heads, head_dim].
      attended: bool[B, L], the tokens that others may attend to.
      position_bias: float32[heads or 1, L, L], added to the scores of every sequence; MASKED
        forbids a pair of positions. None: nothing is added.

    Returns:
      [B, L, heads * head_dim].
    """
    precision = matmul_precision(query.dtype)
    if position_bias is None:
        position_bias = jnp.zeros((1, 1, 1), jnp.float32)

    def one(query, key, value, attended, position_bias):
        bias = jnp.where(attended, position_bias, MASKED)
        return attention(query, key, value, bias, precision=precision)

    def one_by_one(query, key, value, attended, position_bias):
        rows = (query, key, value, attended)
        return jax.lax.map(lambda row: one(row[0], row[1], row[2], row[3], position_bias), rows)

    # On a CPU one sequence at a time keeps its attention matrices in cache: 2-4 times faster.
    y = jax.lax.platform_dependent(
        query,
        key,
        value,
        attended,
        position_bias,
        cpu=one_by_one,
        default=jax.vmap(one, in_axes=(0, 0, 0, 0, None)),
    )
    return y.reshape(*y.shape[:2], -1)


class Attention(nnx.Module):
    def __init__(self, config: BackboneConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        linear = partial(nnx.Linear, width, width, **dense(config, dtype, rngs))
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def __call__(
        self, x: jax.Array, attended: jax.Array, position_bias: jax.Array | None
    ) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:  # [B, L, H] -> [B, L, heads, head_dim]
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        return self.output(attend(query, key, value, attended, position_bias))


class PostNormLayer(nnx.Module):
    """The layer of the original transformer: each block is added to its input, then normalised."""

    def __init__(self, config: BackboneConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings = dense(config, dtype, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm(config, width, rngs=rngs)
        self.intermediate = nnx.Linear(width, inner, **settings)
        self.output = nnx.Linear(inner, width, **settings)
        self.output_norm = layer_norm(config, width, rngs=rngs)
        self.activation = activation(config.hidden_act)

    def __call__(
        self, x: jax.Array, attended: jax.Array, position_bias: jax.Array | None = None
    ) -> jax.Array:
        """x [B, L, H], the rest as in `attend` -> float32[B, L, H]."""
        x = self.attention_norm(x + self.attention(x, attended, position_bias))
        return self.output_norm(x + self.output(self.activation(self.intermediate(x))))


def post_norm_layers(config: BackboneConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    layers = range(config.num_hidden_layers)
    return nnx.List([PostNormLayer(config, dtype=dtype, rngs=rngs) for _ in layers])
