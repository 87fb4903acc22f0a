"""The ColBERT encoder: backbone, projection without bias, mask, L2 normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import BertConfig
from colbert_jax.models.bert import Bert, matmul_precision


class TokenEncoder(nnx.Module):
    """Token ids to token embeddings of unit length (Khattab and Zaharia, 2020, section 3.2).

    Args:
      config: the backbone's architecture.
      dim: width of the projection; None: no projection, embeddings keep the backbone's width.
      dtype: of the dense layers' computation.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        config: BertConfig,
        dim: int | None,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.backbone = Bert(config, dtype=dtype, rngs=rngs)
        self.projection = (
            None
            if dim is None
            else nnx.Linear(
                config.hidden_size,
                dim,
                use_bias=False,
                kernel_init=nnx.initializers.normal(config.initializer_range),
                dtype=dtype,
                precision=matmul_precision(dtype),
                rngs=rngs,
            )
        )

    def __call__(self, ids: jax.Array, attended: jax.Array, kept: jax.Array) -> jax.Array:
        """
        Args:
          ids: int32[B, L].
          attended: int32[B], how many leading tokens take part in attention.
          kept: bool[B, L], the rows that are embeddings; the others come out as zeros.

        Returns:
          float32[B, L, D], rows of unit length.
        """
        x = self.backbone(ids, jnp.arange(ids.shape[1]) < attended[:, None])
        if self.projection is not None:
            x = self.projection(x)
        x = x.astype(jnp.float32) * kept[..., None]
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
