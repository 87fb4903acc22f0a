"""What backbones made of language models share: RMS normalisation before each block, rotary
positions, grouped-query attention, gated units (Touvron et al., 2023; Ainslie et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.activations import activation
from colbert_jax.models.config import BackboneConfig
from colbert_jax.models.layers import (
    Reach,
    TrainMode,
    attend,
    check_length,
    dense,
    dropped,
    run_layers,
)
from colbert_jax.models.rotary import (
    Rotation,
    check_rotary,
    read_theta,
    rotary_tables,
    rotate,
    written_theta,
)

CAUSAL: Reach = (None, 0)


@dataclass(frozen=True, kw_only=True)
class PreNormConfig(BackboneConfig):
    """The configuration.

    num_key_value_heads: as many groups of query heads share a key and a value. If None, each has
      its own.
    head_size: width of a head. If None, `hidden_size / num_attention_heads`.
    """

    hidden_act: str = "silu"
    layer_norm_eps: float = 1e-6
    num_key_value_heads: int | None = None
    head_size: int | None = None
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False

    renamed: ClassVar[Mapping[str, str]] = {
        "layer_norm_eps": "rms_norm_eps",
        "head_size": "head_dim",
    }
    normed_heads: ClassVar[bool] = False  # whether queries and keys are normalised, head by head

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_size is None:
            object.__setattr__(self, "head_size", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        check_rotary(self.head_dim, self.rope_theta)
        require(
            self.key_heads >= 1 and self.num_attention_heads % self.key_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.head_size or super().head_dim

    @property
    def key_heads(self) -> int:
        """The number of heads of keys and values."""
        heads = self.num_key_value_heads
        return self.num_attention_heads if heads is None else heads

    @property
    def causal(self) -> bool:
        """Whether a token looks at those before it only."""
        return False

    def has_module(self, path: str) -> bool:
        return self.normed_heads or not path.endswith(("query_norm", "key_norm"))

    def has_bias(self, path: str) -> bool:
        if path.endswith("norm"):
            return False
        return self.attention_bias if ".attention." in path else self.mlp_bias

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        theta = read_theta(fields.get("rope_parameters"))
        return {} if theta is None else {"rope_theta": theta}

    def written_fields(self) -> dict[str, Any]:
        return written_theta(self.rope_theta)


def rms_norm(config: BackboneConfig, width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Make an RMS normalisation over `width` features (Zhang and Sennrich, 2019)."""
    return nnx.RMSNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


class GroupedAttention(nnx.Module):
    """Self-attention with rotary positions, in which heads share keys and values."""

    def __init__(self, config: PreNormConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        settings = dense(config, dtype, rngs) | {"use_bias": config.attention_bias}
        self.heads, self.key_heads = config.num_attention_heads, config.key_heads
        self.head_dim = config.head_dim
        linear: Any = partial(nnx.Linear, config.hidden_size, **settings)
        self.query = linear(self.heads * self.head_dim)
        self.key = linear(self.key_heads * self.head_dim)
        self.value = linear(self.key_heads * self.head_dim)
        self.output = nnx.Linear(self.heads * self.head_dim, config.hidden_size, **settings)
        norm = partial(rms_norm, config, self.head_dim, rngs)
        self.query_norm = norm() if config.normed_heads else None
        self.key_norm = norm() if config.normed_heads else None

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        rotation: Rotation,
        reach: Reach | None,
        train: TrainMode | None = None,
    ) -> jax.Array:
        """Apply attention to x [B, L, H], other arguments as for `layers.attend`: [B, L, H]."""

        def split(y: jax.Array, heads: int) -> jax.Array:  # -> [B, L, heads, head_dim]
            return y.reshape(*y.shape[:2], heads, self.head_dim)

        query, key = split(self.query(x), self.heads), split(self.key(x), self.key_heads)
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query).astype(query.dtype)
            key = self.key_norm(key).astype(key.dtype)
        query, key = rotate(query, rotation), rotate(key, rotation)
        shared = self.heads // self.key_heads
        key, value = (
            jnp.repeat(y, shared, axis=2) for y in (key, split(self.value(x), self.key_heads))
        )
        return self.output(attend(query, key, value, attended, train=train, reach=reach))


class GatedUnits(nnx.Module):
    """Gated linear units (Shazeer, 2020): down(activation(gate(x)) * up(x))."""

    def __init__(self, config: PreNormConfig, inner: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        settings = dense(config, dtype, rngs) | {"use_bias": config.mlp_bias}
        self.gate = nnx.Linear(config.hidden_size, inner, **settings)
        self.up = nnx.Linear(config.hidden_size, inner, **settings)
        self.down = nnx.Linear(inner, config.hidden_size, **settings)
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class PreNormLayer(nnx.Module):
    """Attention, then gated units; each is added to its input, which it gets normalised."""

    def __init__(self, config: PreNormConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, config.hidden_size, rngs)
        self.attention = GroupedAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config, config.hidden_size, rngs)
        self.mlp = GatedUnits(config, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, attended, rotation, reach, train=None) -> jax.Array:
        y = self.attention(self.attention_norm(x), attended, rotation, reach, train)
        x = x + dropped(y, train, 1)
        return x + dropped(self.mlp(self.mlp_norm(x)), train, 2)


class PreNormBackbone(nnx.Module):
    """An encoder of such layers; arguments as for `bert.Bert`."""

    def __init__(self, config: PreNormConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, width, embedding_init=normal, rngs=rngs)
        self.layers = nnx.List(
            [self.make_layer(i, dtype, rngs) for i in range(config.num_hidden_layers)]
        )
        self.final_norm = rms_norm(config, width, rngs)

    def make_layer(self, i: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """Make layer i, called as `PreNormLayer` is."""
        return PreNormLayer(self.config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `bert.Bert`."""
        config = self.config
        check_length(ids, config.max_length)
        rotation = rotary_tables(ids.shape[1], config.head_dim, config.rope_theta)
        reach = CAUSAL if config.causal else None

        def call(i: int, layer: Any, x: jax.Array, train: TrainMode | None) -> jax.Array:
            return layer(x, attended, rotation, reach, train)

        x = dropped(self.word(ids), train, 0)
        return self.final_norm(run_layers(self.layers, call, x, train)).astype(jnp.float32)


TENSORS = {
    "word": "embed_tokens",
    "layers.*.attention_norm": "layers.*.input_layernorm",
    "layers.*.attention.query": "layers.*.self_attn.q_proj",
    "layers.*.attention.key": "layers.*.self_attn.k_proj",
    "layers.*.attention.value": "layers.*.self_attn.v_proj",
    "layers.*.attention.output": "layers.*.self_attn.o_proj",
    "layers.*.attention.query_norm": "layers.*.self_attn.q_norm",
    "layers.*.attention.key_norm": "layers.*.self_attn.k_norm",
    "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
    "layers.*.mlp.gate": "layers.*.mlp.gate_proj",
    "layers.*.mlp.up": "layers.*.mlp.up_proj",
    "layers.*.mlp.down": "layers.*.mlp.down_proj",
    "final_norm": "norm",
}
