"""GTE (Zhang et al., 2024) and nomic-bert (Nussbaum et al., 2024): BERT's post-layer-norm with
rotary positions and gated units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.activations import activation
from colbert_jax.models.config import Architecture, BackboneConfig
from colbert_jax.models.layers import (
    Attention,
    TrainMode,
    WordEmbeddings,
    check_length,
    dense,
    dropped,
    layer_norm,
    run_layers,
)
from colbert_jax.models.rotary import (
    Rotation,
    check_rotary,
    read_theta,
    rotary_tables,
    written_theta,
)


@dataclass(frozen=True, kw_only=True)
class RotaryBertConfig(BackboneConfig):
    """The configuration of both."""

    type_vocab_size: int = 1
    rope_theta: float = 160_000.0

    biased: ClassVar[frozenset[str]] = frozenset()  # dense layers, by the last part of their path

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.type_vocab_size >= 0, f"type_vocab_size: {self.type_vocab_size} is below 0")
        check_rotary(self.head_dim, self.rope_theta)

    def has_module(self, path: str) -> bool:
        return path != "embeddings.token_type" or self.type_vocab_size > 0

    def has_bias(self, path: str) -> bool:
        return path.endswith("norm") or path.split(".")[-1] in self.biased

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = fields.get("head_dim")
        require(
            head_dim is None or head_dim * fields["num_attention_heads"] == fields["hidden_size"],
            f"head_dim {head_dim!r} is not hidden_size / num_attention_heads",
        )
        theta = read_theta(fields.get("rope_parameters"))
        return {} if theta is None else {"rope_theta": theta}

    def written_fields(self) -> dict[str, Any]:
        return written_theta(self.rope_theta)


@dataclass(frozen=True, kw_only=True)
class GteConfig(RotaryBertConfig):
    """GTE's configuration. Its own repositories call it "new"; transformers' copies have a base of
    their own.

    ntk_factor: see `rotary.rotary_tables`; `rope_scaling` of its own repositories.
    """

    model_type: str = "gte"
    max_position_embeddings: int = 8192
    pad_token_id: int = 1
    ntk_factor: float = 1.0

    model_types: ClassVar[tuple[str, ...]] = ("gte",)
    biased: ClassVar[frozenset[str]] = frozenset({"query", "key", "value", "output", "down"})
    fixed: ClassVar[frozenset[str]] = frozenset({"ntk_factor"})
    scales_rotation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.ntk_factor
        require(1 <= factor < math.inf, f"rope_scaling: factor must be at least 1, got {factor}")

    @classmethod
    def usual_fields(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if fields.get("model_type") != "new":
            return fields
        _only(fields, _ONLY_NEW)
        defaults = {"rope_theta": 10_000.0, "max_position_embeddings": 2048, "pad_token_id": 0}
        return {**defaults, **fields}

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        scaling = fields.get("rope_scaling") or {}
        known = isinstance(scaling, Mapping) and scaling.get("type") in (None, "ntk")
        known = known and set(_given(scaling)) <= {"type", "factor"}
        require(
            known, f"rope_scaling {scaling!r:.80} is not supported; supported: ntk, by a factor"
        )
        factor = scaling.get("factor", 1.0)
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        require(number, f"rope_scaling: factor must be a number, got {factor!r:.80}")
        return super().read_fields(fields) | {"ntk_factor": float(factor)}

    def written_fields(self) -> dict[str, Any]:
        scaling = {"type": "ntk", "factor": self.ntk_factor}
        return super().written_fields() | (
            {} if self.ntk_factor == 1 else {"rope_scaling": scaling}
        )


@dataclass(frozen=True, kw_only=True)
class NomicConfig(RotaryBertConfig):
    """The configuration of nomic-bert. Its own repositories have GPT-2's names.

    There, `rotary_scaling_factor` changes the frequencies of texts that are longer than
    `max_trained_positions`, by their length: here these are the longest.
    """

    model_type: str = "nomic_bert"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    type_vocab_size: int = 2
    rope_theta: float = 1_000.0

    model_types: ClassVar[tuple[str, ...]] = ("nomic_bert",)

    @classmethod
    def usual_fields(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if "n_embd" not in fields:
            return fields
        _only(fields, _ONLY_NOMIC)
        gate = fields.get("activation_function", "swiglu")
        require(
            gate in _GATES, f"activation_function {gate!r:.80} is not one of {', '.join(_GATES)}"
        )
        usual = {name: fields[own] for own, name in _OWN_NAMES.items() if own in fields}
        if usual.get("intermediate_size") is None and isinstance(fields["n_embd"], int):
            usual["intermediate_size"] = 4 * fields["n_embd"]
        if fields.get("rotary_scaling_factor"):
            known = _given(fields)
            longest = [known.get(name, 2048) for name in ("max_trained_positions", "n_positions")]
            numbers = all(type(length) is int for length in longest)
            require(numbers, f"max_trained_positions, n_positions: {longest!r:.80} are no integers")
            usual["max_position_embeddings"] = min(longest)
        return {**fields, **usual, "hidden_act": _GATES[gate]}


# What nomic-bert's own repositories call the sizes.
_OWN_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
_GATES = {"swiglu": "silu", "geglu": "gelu"}
# The value that means "not used", and that an absent field has.
_ONLY_NOMIC = {
    "prenorm": False,
    "causal": False,
    "use_rms_norm": False,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "moe_every_n_layers": 0,
}
_ONLY_NEW = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _only(fields: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError for a field with another value than that in a table."""
    for name, value in values.items():
        given = fields.get(name)
        require(given in (None, value), f"{name} {given!r:.80} is not supported; only {value!r}")


class RotaryBertLayer(nnx.Module):
    """Attention and gated units; each is added to its input, then normalised."""

    def __init__(self, config: RotaryBertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings, biased = dense(config, dtype, rngs), config.biased
        self.attention = Attention(config, use_bias="query" in biased, dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm(config, width, rngs=rngs)
        self.gate = nnx.Linear(width, inner, use_bias=False, **settings)
        self.up = nnx.Linear(width, inner, use_bias=False, **settings)
        self.down = nnx.Linear(inner, width, use_bias="down" in biased, **settings)
        self.output_norm = layer_norm(config, width, rngs=rngs)
        self.activation = activation(config.hidden_act)

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        rotation: Rotation,
        train: TrainMode | None = None,
    ) -> jax.Array:
        y = self.attention(x, attended, None, train, rotation=rotation)
        x = self.attention_norm(x + dropped(y, train, 1))
        y = self.down(self.activation(self.gate(x)) * self.up(x))
        return self.output_norm(x + dropped(y, train, 2))


class RotaryBert(nnx.Module):
    """The encoder; arguments as for `bert.Bert`."""

    def __init__(self, config: RotaryBertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = WordEmbeddings(config, token_types=config.type_vocab_size, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([RotaryBertLayer(config, dtype=dtype, rngs=rngs) for _ in layers])

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `bert.Bert`."""
        config = self.config
        check_length(ids, config.max_length)
        factor = getattr(config, "ntk_factor", 1.0)
        rotation = rotary_tables(ids.shape[1], config.head_dim, config.rope_theta, factor)

        def call(i: int, layer: Any, x: jax.Array, train: TrainMode | None) -> jax.Array:
            return layer(x, attended, rotation, train)

        return run_layers(self.layers, call, dropped(self.embeddings(ids), train, 0), train)


# transformers' names for what post-layer-norm models with rotary positions share.
ROTARY_TENSORS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.*.attention.query": "layers.*.self_attn.q_proj",
    "layers.*.attention.key": "layers.*.self_attn.k_proj",
    "layers.*.attention.value": "layers.*.self_attn.v_proj",
    "layers.*.attention.output": "layers.*.self_attn.o_proj",
    "layers.*.attention_norm": "layers.*.post_attention_layernorm",
    "layers.*.output_norm": "layers.*.post_mlp_layernorm",
}
_TENSORS = ROTARY_TENSORS | {
    "layers.*.gate": "layers.*.mlp.gate_proj",
    "layers.*.up": "layers.*.mlp.up_proj",
    "layers.*.down": "layers.*.mlp.down_proj",
}
QKV = "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj"

ARCHITECTURES = (
    Architecture(
        "gte",
        GteConfig,
        RotaryBert,
        _TENSORS,
        prefix="gte.",
        model_class="GteModel",
        unused=(".lm_head.",),
        pooler=True,
        other_names={
            "new": "gte",
            "encoder.layer": "layers",
            "attention.qkv_proj": QKV,
            "attention.o_proj": "self_attn.o_proj",
            "attn_ln": "post_attention_layernorm",
            "mlp_ln": "post_mlp_layernorm",
            "mlp.up_gate_proj": "mlp.up_proj|mlp.gate_proj",
        },
        also=lambda fields: fields.get("model_type") == "new",
    ),
    Architecture(
        "nomic_bert",
        NomicConfig,
        RotaryBert,
        _TENSORS,
        prefix="nomic_bert.",
        model_class="NomicBertModel",
        unused=(".lm_head.", ".cls."),
        pooler=True,
        other_names={
            "encoder.layers": "layers",
            "emb_ln": "embeddings.LayerNorm",
            "attn.Wqkv": QKV,
            "attn.out_proj": "self_attn.o_proj",
            "fc11": "up_proj",
            "fc12": "gate_proj",
            "fc2": "down_proj",
            "norm1": "post_attention_layernorm",
            "norm2": "post_mlp_layernorm",
        },
    ),
)
