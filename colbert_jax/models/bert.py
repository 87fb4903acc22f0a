"""BERT (Devlin et al., 2019) as published: learned positions, post-layer-norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.config import BertConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    post_norm_layers,
    run_post_norm_layers,
)


class Bert(nnx.Module):
    """Token ids to hidden states.

    Args:
      config: the architecture.
      dtype: of the dense layers' computation; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, token_types=config.type_vocab_size, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        ids: jax.Array,
        attended: jax.Array,
        train: TrainMode | None = None,
        *,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """
        Args:
          ids: int32[B, L], L at most `config.max_length`.
          attended: bool[B, L], the tokens that others may attend to.
          train: dropout and recomputation; None: not training.
          types: int32[B, L], the token types; None: 0.

        Returns:
          float32[B, L, hidden_size], the last layer's output.
        """
        check_length(ids, self.config.max_position_embeddings)
        x = self.embeddings(ids, jnp.arange(ids.shape[1]), types)
        return run_post_norm_layers(self.layers, x, attended, train=train)
