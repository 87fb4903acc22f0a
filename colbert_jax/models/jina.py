"""Jina's XLM-RoBERTa (Sturua et al., 2024): post-layer-norm, rotary positions, no others.

jina-colbert-v2 and jina-embeddings-v3. Their own repositories name it "xlm-roberta" with rotary
positions and fuse queries, keys and values; transformers has it as `jina_embeddings_v3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.config import Architecture, BackboneConfig
from colbert_jax.models.layers import (
    TrainMode,
    WordEmbeddings,
    check_length,
    post_norm_layers,
    run_post_norm_layers,
)
from colbert_jax.models.rotary import check_rotary, read_theta, rotary_tables, written_theta
from colbert_jax.models.rotary_bert import QKV, ROTARY_TENSORS


@dataclass(frozen=True, kw_only=True)
class JinaConfig(BackboneConfig):
    """The configuration."""

    model_type: str = "jina_embeddings_v3"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 8194
    pad_token_id: int = 1
    type_vocab_size: int = 1
    rope_theta: float = 20_000.0

    model_types: ClassVar[tuple[str, ...]] = ("jina_embeddings_v3",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("type_vocab_size")
        check_rotary(self.head_dim, self.rope_theta)

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        tasks = fields.get("lora_adaptations")
        require(
            not tasks,
            f"lora_adaptations {tasks!r:.120}: adapters of tasks, which this library does not "
            "merge; jina-colbert-v2 has the same trunk without them",
        )
        theta = read_theta(fields.get("rope_parameters"))
        for name in ("rope_theta", "rotary_emb_base"):
            theta = fields.get(name) if theta is None else theta
        require(
            fields.get("model_type") == "jina_embeddings_v3" or theta is not None,
            "rotary_emb_base is missing",
        )
        return {} if theta is None else {"rope_theta": theta}

    def written_fields(self) -> dict[str, Any]:
        return written_theta(self.rope_theta)


class Jina(nnx.Module):
    """The encoder; arguments as for `bert.Bert`."""

    def __init__(self, config: JinaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = WordEmbeddings(config, token_types=config.type_vocab_size, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `bert.Bert`."""
        config = self.config
        check_length(ids, config.max_length)
        rotation = rotary_tables(ids.shape[1], config.head_dim, config.rope_theta)
        x = self.embeddings(ids)
        return run_post_norm_layers(self.layers, x, attended, train=train, rotation=rotation)


def _is_jina(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of jina-colbert-v2, which has no `model_type`, or its kin."""
    rotary = fields.get("position_embedding_type") == "rotary"
    return rotary and fields.get("model_type") in (None, "xlm-roberta")


ARCHITECTURES = (
    Architecture(
        "jina_embeddings_v3",
        JinaConfig,
        Jina,
        ROTARY_TENSORS
        | {
            "layers.*.intermediate": "layers.*.mlp.fc1",
            "layers.*.output": "layers.*.mlp.fc2",
        },
        prefix="roberta.",
        model_class="JinaEmbeddingsV3Model",
        unused=(".lm_head.",),
        pooler=True,
        other_names={
            "emb_ln": "embeddings.LayerNorm",
            "encoder.layers": "layers",
            "mixer.Wqkv": QKV,
            "mixer.out_proj": "self_attn.o_proj",
            "norm1": "post_attention_layernorm",
            "norm2": "post_mlp_layernorm",
        },
        also=_is_jina,
    ),
)
