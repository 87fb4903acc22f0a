"""DistilBERT (Sanh et al., 2019): BERT without token types."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.config import DistilBertConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    post_norm_layers,
    run_post_norm_layers,
)


class DistilBert(nnx.Module):
    """Token ids to hidden states; arguments as of `bert.Bert`."""

    def __init__(self, config: DistilBertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """ids int32[B, L], attended bool[B, L] -> float32[B, L, hidden_size]."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, jnp.arange(ids.shape[1]))
        return run_post_norm_layers(self.layers, x, attended, train=train)
