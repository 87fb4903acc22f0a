"""EuroBERT (Boizard et al., 2025): the blocks of a language model, looking in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from colbert_jax.models.config import Architecture
from colbert_jax.models.pre_norm import TENSORS, PreNormBackbone, PreNormConfig


@dataclass(frozen=True, kw_only=True)
class EuroBertConfig(PreNormConfig):
    """The configuration."""

    model_type: str = "eurobert"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    pad_token_id: int = 128_001

    model_types: ClassVar[tuple[str, ...]] = ("eurobert",)


ARCHITECTURES = (
    Architecture(
        "eurobert",
        EuroBertConfig,
        PreNormBackbone,
        TENSORS,
        prefix="model.",
        model_class="EuroBertModel",
        unused=(".lm_head.", ".dense."),
    ),
)
