"""RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2020).

BERT's layers; positions count the tokens that are not padding, from `pad_token_id` + 1 on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.config import RobertaConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    positions_after_padding,
    post_norm_layers,
    run_post_norm_layers,
)


class Roberta(nnx.Module):
    """Token ids to hidden states; arguments as of `bert.Bert`."""

    def __init__(self, config: RobertaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, token_types=config.type_vocab_size, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """ids int32[B, L], attended bool[B, L] -> float32[B, L, hidden_size]."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, positions_after_padding(ids, self.config.pad_token_id))
        return run_post_norm_layers(self.layers, x, attended, train=train)
