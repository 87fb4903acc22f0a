"""ModernBERT (Warner et al., 2024): rotary positions, local and global layers, gated units.

Layers are pre-layer-norm. The rotation is float32, as are layer normalisation and the softmax.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax.models.activations import activation
from colbert_jax.models.config import SLIDING, ModernBertConfig
from colbert_jax.models.layers import (
    MASKED,
    TrainMode,
    attend,
    dense,
    dropped,
    layer_norm,
    run_layers,
)


class ModernBertEmbeddings(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, width, embedding_init=normal, rngs=rngs)
        self.norm = layer_norm(config, width, use_bias=config.norm_bias, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.norm(self.word(ids))


class ModernBertAttention(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        settings = dense(config, dtype, rngs) | {"use_bias": config.attention_bias}
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = nnx.Linear(width, 3 * width, **settings)
        self.output = nnx.Linear(width, width, **settings)

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        rotation: tuple[np.ndarray, np.ndarray],
        position_bias: jax.Array | None,
        train: TrainMode | None = None,
    ) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        query, key = rotate(query, rotation), rotate(key, rotation)
        y = attend(query, key, value, attended, position_bias, train)
        # A token with nothing to attend to, within its window, gets zeros, as from transformers 5's
        # default attention (version 4 averages over everything, padding too).
        allowed = attended[:, None]
        if position_bias is not None:
            allowed = allowed & (position_bias > MASKED)
        seen = allowed.any(axis=-1)[..., None]
        return dropped(self.output(jnp.where(seen, y, 0)), train, 1)


class ModernBertMlp(nnx.Module):
    """GeGLU (Shazeer, 2020): one half, activated, gates the other."""

    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings = dense(config, dtype, rngs) | {"use_bias": config.mlp_bias}
        self.input = nnx.Linear(width, 2 * inner, **settings)
        self.output = nnx.Linear(inner, width, **settings)
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array, train: TrainMode | None = None) -> jax.Array:
        gate, y = jnp.split(self.input(x), 2, axis=-1)
        return self.output(dropped(self.activation(gate) * y, train, 2))


class ModernBertLayer(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, first: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = partial(layer_norm, config, config.hidden_size, use_bias=config.norm_bias, rngs=rngs)
        self.attention_norm = None if first else norm()  # the embeddings are normalised already
        self.attention = ModernBertAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = ModernBertMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, attended, rotation, position_bias, train=None) -> jax.Array:
        y = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.attention(y, attended, rotation, position_bias, train)
        return x + self.mlp(self.mlp_norm(x), train)


class ModernBert(nnx.Module):
    """Token ids to hidden states; arguments as of `bert.Bert`."""

    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = ModernBertEmbeddings(config, rngs=rngs)
        self.layers = nnx.List(
            [
                ModernBertLayer(config, first=i == 0, dtype=dtype, rngs=rngs)
                for i in range(config.num_hidden_layers)
            ]
        )
        self.final_norm = layer_norm(
            config, config.hidden_size, use_bias=config.norm_bias, rngs=rngs
        )

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """ids int32[B, L], attended bool[B, L] -> float32[B, L, hidden_size]."""
        config, length = self.config, ids.shape[1]
        rotations = {
            kind: rotary_tables(length, config.head_dim, config.rope_theta(kind))
            for kind in set(config.layer_types)
        }
        window = window_bias(length, config.local_attention // 2)

        def call(i: int, layer: ModernBertLayer, x: jax.Array, train: TrainMode | None):
            kind = config.layer_types[i]
            return layer(x, attended, rotations[kind], window if kind == SLIDING else None, train)

        x = dropped(self.embeddings(ids), train, 0)
        return self.final_norm(run_layers(self.layers, call, x, train))


def window_bias(length: int, reach: int) -> jax.Array:
    """float32[1, L, L]: 0 for positions at most `reach` apart, MASKED for the others."""
    i = jnp.arange(length)
    return jnp.where(jnp.abs(i[:, None] - i) <= reach, 0.0, MASKED)[None]


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32[L, head_dim / 2], of the angles of Su et al. (2021), eq. 15."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The models were trained with frequencies rounded to float32: at position 8,000 the rounding is
    # of the order of 1e-4 radians.
    frequencies = np.float32(1) / (np.float64(theta) ** exponents).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, rotation: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotate [B, L, heads, head_dim]: dimension i pairs with dimension i + head_dim / 2."""
    cosine, sine = (table[:, None, :] for table in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    return rotated.astype(x.dtype)
