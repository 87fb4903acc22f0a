"""Qwen3 (Yang et al., 2025): causal, or with attention in both directions as in pplx-embed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from colbert_jax.config import require
from colbert_jax.models.config import Architecture
from colbert_jax.models.pre_norm import TENSORS, PreNormBackbone, PreNormConfig

_BOTH = "bidirectional_pplx_qwen3"
_CODE = "perplexity-ai/pplx-embed-v1-late-0.6b"


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(PreNormConfig):
    """The configuration."""

    model_type: str = "qwen3"
    max_position_embeddings: int = 32768
    num_key_value_heads: int | None = 32
    head_size: int | None = 128

    model_types: ClassVar[tuple[str, ...]] = ("qwen3", _BOTH)
    normed_heads: ClassVar[bool] = True

    @property
    def causal(self) -> bool:
        return self.model_type != _BOTH

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        require(
            not fields.get("use_sliding_window"),
            f"use_sliding_window {fields.get('use_sliding_window')!r} is not supported; leave it "
            "out",
        )
        both = fields.get("use_bidirectional_attention")
        require(
            both is None or both == (fields.get("model_type") == _BOTH),
            f"use_bidirectional_attention {both!r} does not go with model_type "
            f"{fields.get('model_type')!r}",
        )
        return super().read_fields(fields)

    def written_fields(self) -> dict[str, Any]:
        fields = super().written_fields()
        if self.model_type == _BOTH:  # transformers loads it with the code of its repository
            fields["use_bidirectional_attention"] = True
            fields["auto_map"] = {
                "AutoConfig": f"{_CODE}--configuration.PPLXQwen3Config",
                "AutoModel": f"{_CODE}--modeling.PPLXQwen3Model",
            }
        return fields


ARCHITECTURES = tuple(
    Architecture(
        model_type,
        Qwen3Config,
        PreNormBackbone,
        TENSORS,
        prefix="model.",
        model_class=model_class,
        unused=(".lm_head.", ".score."),
    )
    for model_type, model_class in (("qwen3", "Qwen3Model"), (_BOTH, "PPLXQwen3Model"))
)
