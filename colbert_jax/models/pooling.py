"""One vector for each text, pooled from hidden states (Reimers and Gurevych, 2019, section 3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from colbert_jax.models.colbert import EncoderConfig, make_encoder

POOLINGS = ("mean", "cls", "max")


def sentence_embeddings(
    config: EncoderConfig,
    params: dict,
    ids: jax.Array,
    attended: jax.Array,
    *,
    pooling: str = "mean",
    normalized: bool = True,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Compute one vector for each text: backbone, pooling, then the head's layers.

    Args:
      config, params: as for `models.colbert.make_encoder`.
      ids: int32[B, L].
      attended: int32[B], how many leading tokens take part in attention and in pooling.
      pooling: "mean" of the tokens, "cls" for the first token, "max" of each feature over tokens.
      normalized: whether to divide by the length.
      dtype: what the backbone's dense layers compute in; all else is float32.

    Returns:
      float32[B, D].

    Raises:
      ValueError: an unknown pooling.
    """
    mask = jnp.arange(ids.shape[1]) < attended[:, None]
    x = make_encoder(config, params, dtype).backbone(ids, mask).astype(jnp.float32)
    if pooling == "mean":
        x = jnp.where(mask[..., None], x, 0).sum(axis=1) / jnp.maximum(attended, 1)[:, None]
    elif pooling == "cls":
        x = x[:, 0]
    elif pooling == "max":
        x = jnp.where(mask[..., None], x, -jnp.inf).max(axis=1)
    else:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    x = apply_head(config, params, x)
    if normalized:
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x


def apply_head(config: EncoderConfig, params: dict, x: jax.Array) -> jax.Array:
    """Apply the layers of the head, in float32, to float32[B, hidden_size]: float32[B, D]."""
    for layer in make_encoder(config, params).head:
        x = layer(x)
    return x
