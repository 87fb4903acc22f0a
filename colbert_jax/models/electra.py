"""ELECTRA (Clark et al., 2020): BERT, whose embeddings may be narrower than its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.config import ElectraConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    dense,
    post_norm_layers,
    run_post_norm_layers,
)


class Electra(nnx.Module):
    """Token ids to hidden states; arguments as of `bert.Bert`."""

    def __init__(self, config: ElectraConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        narrow, width = config.embedding_size, config.hidden_size
        self.embeddings = Embeddings(
            config, token_types=config.type_vocab_size, width=narrow, rngs=rngs
        )
        self.projection = (
            None if narrow == width else nnx.Linear(narrow, width, **dense(config, dtype, rngs))
        )
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """ids int32[B, L], attended bool[B, L] -> float32[B, L, hidden_size]."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, jnp.arange(ids.shape[1]))
        if self.projection is not None:
            x = self.projection(x).astype(jnp.float32)
        return run_post_norm_layers(self.layers, x, attended, train=train)
