"""LFM2 (Liquid AI, 2025): gated short convolutions, and grouped-query attention in some layers.

LFM2-ColBERT is causal. LFM2.5-ColBERT looks in both directions: its attention has no causal mask,
and its convolutions are centred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.config import Architecture
from colbert_jax.models.layers import TrainMode, dense, dropped
from colbert_jax.models.pre_norm import (
    GatedUnits,
    GroupedAttention,
    PreNormBackbone,
    PreNormConfig,
    rms_norm,
)

CONVOLUTION, ATTENTION = "conv", "full_attention"
_CODE = "LiquidAI/LFM2.5-ColBERT-350M--modeling_lfm2_bidirectional.Lfm2BidirectionalModel"


@dataclass(frozen=True, kw_only=True)
class Lfm2Config(PreNormConfig):
    """The configuration.

    layer_types: for each layer "conv" or "full_attention". If empty, all are attention.
    conv_width: positions that a convolution sees, its own included.
    conv_bias: whether convolutions and their dense layers have biases.
    block_*: how `intermediate_size` becomes the width of the gated units, see `inner`.
    bidirectional: whether tokens see those after them.
    """

    model_type: str = "lfm2"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 128_000
    num_key_value_heads: int | None = 8
    rope_theta: float = 1_000_000.0
    layer_types: tuple[str, ...] = ()
    conv_width: int = 3
    conv_bias: bool = False
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: float = 1.0
    block_multiple_of: int = 256
    bidirectional: bool = False

    model_types: ClassVar[tuple[str, ...]] = ("lfm2",)
    renamed: ClassVar[Mapping[str, str]] = {
        "layer_norm_eps": "norm_eps",
        "conv_width": "conv_L_cache",
    }
    fixed: ClassVar[frozenset[str]] = frozenset(
        {"hidden_act", "head_size", "attention_bias", "mlp_bias", "bidirectional"}
    )
    normed_heads: ClassVar[bool] = True
    layers_alike: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("conv_width", "block_multiple_of")
        require(
            isinstance(self.layer_types, tuple | list),
            f"layer_types must be a list, got {self.layer_types!r}",
        )
        layers = self.num_hidden_layers
        types = tuple(self.layer_types) or (ATTENTION,) * layers
        object.__setattr__(self, "layer_types", types)
        unknown = sorted({str(kind) for kind in types} - {CONVOLUTION, ATTENTION})
        require(not unknown, f"layer_types {', '.join(unknown)}: expected conv or full_attention")
        require(len(types) == layers, f"layer_types has {len(types)} entries for {layers} layers")
        require(
            not self.bidirectional or self.conv_width % 2 == 1,
            f"conv_L_cache must be odd in a bidirectional model, got {self.conv_width}",
        )
        require(self.inner >= 1, f"intermediate_size {self.intermediate_size} is too small")

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def inner(self) -> int:
        """The width of the gated units."""
        width = self.intermediate_size
        if self.block_auto_adjust_ff_dim:
            width = int(self.block_ffn_dim_multiplier * int(2 * width / 3))
            width = self.block_multiple_of * -(-width // self.block_multiple_of)
        return width

    def with_layers(self, layers: int) -> Lfm2Config:
        types = self.layer_types[:layers]
        return dataclasses.replace(self, num_hidden_layers=layers, layer_types=types)

    def has_module(self, path: str) -> bool:
        parts = path.split(".")
        if "conv" not in parts and "attention" not in parts:
            return True
        return ("conv" in parts) == (self.layer_types[int(parts[1])] == CONVOLUTION)

    def has_bias(self, path: str) -> bool:
        return ".conv." in path and self.conv_bias

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read_fields(fields)
        if fields.get("block_ff_dim") is not None:
            read["intermediate_size"] = fields["block_ff_dim"]
        chosen, layers = fields.get("full_attn_idxs"), fields["num_hidden_layers"]
        if fields.get("layer_types") is None and chosen is not None:
            require(
                isinstance(chosen, list) and isinstance(layers, int),
                f"full_attn_idxs must be a list, got {chosen!r}",
            )
            kinds = (ATTENTION if i in chosen else CONVOLUTION for i in range(layers))
            read["layer_types"] = tuple(kinds)
        require(
            fields.get("head_dim") is None,
            f"head_dim {fields.get('head_dim')!r} is not supported; leave it out",
        )
        code = fields.get("auto_map")
        names = [*(code.values() if isinstance(code, Mapping) else ())]
        names += fields.get("architectures") or []
        read["bidirectional"] = any("bidir" in str(name).lower() for name in names)
        return read

    def written_fields(self) -> dict[str, Any]:
        fields = super().written_fields() | {"layer_types": list(self.layer_types)}
        if self.bidirectional:  # transformers has it with the code of its repository only
            fields["auto_map"] = {"AutoModel": _CODE}
        return fields


class ShortConvolution(nnx.Module):
    """A depthwise convolution over a few positions, between two gates.

    Its filter has a kernel float32[conv_width, 1, hidden_size].
    """

    def __init__(self, config: Lfm2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        settings = dense(config, dtype, rngs) | {"use_bias": config.conv_bias}
        self.input = nnx.Linear(width, 3 * width, **settings)
        self.filter = Filter(config, rngs)
        self.output = nnx.Linear(width, width, **settings)

    def __call__(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Apply it to x [B, L, H], where tokens that are not attended count as zeros."""
        before, after, x = jnp.split(self.input(x * attended[..., None]), 3, axis=-1)
        return self.output(after * self.filter(before * x))


class Filter(nnx.Module):
    """Sums each feature over neighbouring positions, with a weight for each."""

    def __init__(self, config: Lfm2Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        shape = (config.conv_width, 1, config.hidden_size)
        self.kernel = nnx.Param(normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size)) if config.conv_bias else None
        self.ahead = (config.conv_width - 1) // 2 if config.bidirectional else 0

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, length = self.kernel[...].astype(x.dtype), x.shape[1]
        width = len(kernel)
        padded = jnp.pad(x, [(0, 0), (width - 1 - self.ahead, self.ahead), (0, 0)])
        y = sum(padded[:, k : k + length] * kernel[k, 0] for k in range(width))
        return jnp.asarray(y) if self.bias is None else y + self.bias[...].astype(x.dtype)


class Lfm2Layer(nnx.Module):
    """A convolution or attention, then gated units."""

    def __init__(self, config: Lfm2Config, i: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        is_conv = config.layer_types[i] == CONVOLUTION
        self.operator_norm = rms_norm(config, config.hidden_size, rngs)
        self.conv = ShortConvolution(config, dtype=dtype, rngs=rngs) if is_conv else None
        self.attention = None if is_conv else GroupedAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config, config.hidden_size, rngs)
        self.mlp = GatedUnits(config, config.inner, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, attended: jax.Array, rotation, reach, train: TrainMode | None = None
    ) -> jax.Array:
        y = self.operator_norm(x)
        if self.conv is not None:
            y = self.conv(y, attended)
        elif self.attention is not None:
            y = self.attention(y, attended, rotation, reach, train)
        x = x + dropped(y, train, 1)
        return x + dropped(self.mlp(self.mlp_norm(x)), train, 2)


class Lfm2(PreNormBackbone):
    """LFM2's encoder; arguments as for `bert.Bert`."""

    config: Lfm2Config

    def make_layer(self, i: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return Lfm2Layer(self.config, i, dtype=dtype, rngs=rngs)


ARCHITECTURES = (
    Architecture(
        "lfm2",
        Lfm2Config,
        Lfm2,
        {
            "word": "embed_tokens",
            "layers.*.operator_norm": "layers.*.operator_norm",
            "layers.*.conv.input": "layers.*.conv.in_proj",
            "layers.*.conv.filter": "layers.*.conv.conv",
            "layers.*.conv.output": "layers.*.conv.out_proj",
            "layers.*.attention.query": "layers.*.self_attn.q_proj",
            "layers.*.attention.key": "layers.*.self_attn.k_proj",
            "layers.*.attention.value": "layers.*.self_attn.v_proj",
            "layers.*.attention.output": "layers.*.self_attn.out_proj",
            "layers.*.attention.query_norm": "layers.*.self_attn.q_layernorm",
            "layers.*.attention.key_norm": "layers.*.self_attn.k_layernorm",
            "layers.*.mlp_norm": "layers.*.ffn_norm",
            "layers.*.mlp.gate": "layers.*.feed_forward.w1",
            "layers.*.mlp.up": "layers.*.feed_forward.w3",
            "layers.*.mlp.down": "layers.*.feed_forward.w2",
            "final_norm": "embedding_norm",
        },
        prefix="model.",
        model_class="Lfm2Model",
        unused=(".lm_head.",),
    ),
)
