"""MPNet (Song et al., 2020): post-layer-norm, with learned biases of relative positions.

The biases, one for each head and bucket of distances, are shared by all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.bert import WORD_POSITION
from colbert_jax.models.config import Architecture, BackboneConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    positions_after_padding,
    post_norm_layers,
    run_post_norm_layers,
)

MAX_DISTANCE = 128


@dataclass(frozen=True, kw_only=True)
class MPNetConfig(BackboneConfig):
    """MPNet's configuration."""

    model_type: str = "mpnet"
    relative_attention_num_buckets: int = 32
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("mpnet",)
    # transformers uses these two numbers whatever config.json holds, so the published weights were
    # trained with them.
    position_padding_id: ClassVar[int] = 1
    num_buckets: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        buckets = self.relative_attention_num_buckets
        require(
            buckets >= self.num_buckets,
            f"relative_attention_num_buckets must be >= {self.num_buckets}, got {buckets}",
        )

    @property
    def first_position(self) -> int:
        return self.position_padding_id + 1


class MPNet(nnx.Module):
    """MPNet's encoder; arguments as for `bert.Bert`."""

    def __init__(self, config: MPNetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.relative_position = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_attention_heads,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `bert.Bert`."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, positions_after_padding(ids, self.config.position_padding_id))
        buckets = jnp.asarray(relative_buckets(ids.shape[1], self.config.num_buckets))
        bias = self.relative_position(buckets).transpose(2, 0, 1)
        return run_post_norm_layers(self.layers, x, attended, bias, train=train)


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
    """Return the bucket of key position minus query position (Raffel et al., 2020, 2.1).

    Half of the buckets are for each direction; of these, half for single distances and half for
    ranges that grow with the logarithm, the last one for MAX_DISTANCE and more.

    Returns:
      int32[L, L].
    """
    half = num_buckets // 2
    exact = half // 2
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(ahead)
    # float32, as in training: rounding decides on which side of an edge a distance falls.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(ratio) / np.float32(math.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
    ranged = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, ranged) + half * (ahead > 0)).astype(np.int32)


ARCHITECTURES = (
    Architecture(
        "mpnet",
        MPNetConfig,
        MPNet,
        {
            **WORD_POSITION,
            "relative_position": "encoder.relative_attention_bias",
            "layers.*.attention.query": "encoder.layer.*.attention.attn.q",
            "layers.*.attention.key": "encoder.layer.*.attention.attn.k",
            "layers.*.attention.value": "encoder.layer.*.attention.attn.v",
            "layers.*.attention.output": "encoder.layer.*.attention.attn.o",
            "layers.*.attention_norm": "encoder.layer.*.attention.LayerNorm",
            "layers.*.intermediate": "encoder.layer.*.intermediate.dense",
            "layers.*.output": "encoder.layer.*.output.dense",
            "layers.*.output_norm": "encoder.layer.*.output.LayerNorm",
        },
        prefix="mpnet.",
        model_class="MPNetModel",
        unused=(".lm_head.",),
        pooler=True,
    ),
)
