"""ModernBERT (Warner et al., 2024): rotary positions, local and global layers, gated units.

Layers are pre-layer-norm. The rotation is float32, as are layer normalisation and the softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.activations import activation
from colbert_jax.models.config import Architecture, BackboneConfig
from colbert_jax.models.layers import (
    Reach,
    TrainMode,
    attend,
    dense,
    dropped,
    layer_norm,
    run_layers,
    sees_any,
)
from colbert_jax.models.rotary import Rotation, check_rotary, read_theta, rotary_tables, rotate

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(BackboneConfig):
    """ModernBERT's configuration.

    layer_types: for each layer whether it attends to all tokens ("full_attention") or to those
      within `local_attention // 2` of each ("sliding_attention"). If empty, every third layer
      attends to all, from the first on.
    """

    model_type: str = "modernbert"
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 50283
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: tuple[str, ...] = ()
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0

    model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    renamed: ClassVar[Mapping[str, str]] = {
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("local_attention")
        layers = self.num_hidden_layers
        require(
            isinstance(self.layer_types, tuple | list),
            f"layer_types must be a list, got {self.layer_types!r}",
        )
        types = tuple(self.layer_types) or _every(3, layers)
        object.__setattr__(self, "layer_types", types)
        unknown = sorted({str(kind) for kind in types} - {FULL, SLIDING})
        require(not unknown, f"layer_types {', '.join(unknown)}: expected {FULL} or {SLIDING}")
        require(len(types) == layers, f"layer_types has {len(types)} entries for {layers} layers")
        for name in ("global_rope_theta", "local_rope_theta"):
            check_rotary(self.head_dim, getattr(self, name), name)

    def rope_theta(self, layer_type: str) -> float:
        """The base of the rotary frequencies in layers of this type."""
        return self.global_rope_theta if layer_type == FULL else self.local_rope_theta

    def with_layers(self, layers: int) -> ModernBertConfig:
        types = self.layer_types[:layers]
        return dataclasses.replace(self, num_hidden_layers=layers, layer_types=types)

    def has_module(self, path: str) -> bool:
        # The embeddings have normalised the first layer's input already.
        return path != "layers.0.attention_norm"

    def has_bias(self, path: str) -> bool:
        if path.endswith("norm"):
            return self.norm_bias
        return self.attention_bias if ".attention." in path else self.mlp_bias

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read attention pattern and thetas as transformers 5 or 4 writes them; 5's take
        precedence.
        """
        given: dict[str, Any] = {}
        every, layers = fields.get("global_attn_every_n_layers"), fields["num_hidden_layers"]
        if fields.get("layer_types") is None and every is not None and isinstance(layers, int):
            require(
                isinstance(every, int) and every >= 1,
                f"global_attn_every_n_layers must be an int >= 1, got {every!r}",
            )
            given["layer_types"] = _every(every, layers)
        if "local_rope_theta" in fields and fields["local_rope_theta"] is None:
            # transformers 4: local layers without a theta use that of the global layers.
            given["local_rope_theta"] = fields.get("global_rope_theta") or 160_000.0
        parameters = fields.get("rope_parameters") or {}
        require(
            isinstance(parameters, Mapping) and set(parameters) <= {FULL, SLIDING},
            f"rope_parameters must hold {FULL} and {SLIDING}, got {parameters!r}",
        )
        for layer_type, name in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
            theta = read_theta(parameters.get(layer_type), f"rope_parameters of {layer_type}")
            if theta is not None:
                given[name] = theta
        return given

    def written_fields(self) -> dict[str, Any]:
        """Write attention pattern and thetas for transformers 4 and for transformers 5.

        A pattern other than "every n-th layer from the first on" exists in 5 only.
        """
        layers = self.num_hidden_layers
        thetas = {FULL: float(self.global_rope_theta), SLIDING: float(self.local_rope_theta)}
        fields: dict[str, Any] = {
            "layer_types": list(self.layer_types),
            "global_rope_theta": thetas[FULL],
            "local_rope_theta": thetas[SLIDING],
            "rope_parameters": {
                layer_type: {"rope_type": "default", "rope_theta": theta}
                for layer_type, theta in thetas.items()
            },
        }
        for n in range(1, layers + 1):
            if self.layer_types == _every(n, layers):
                fields["global_attn_every_n_layers"] = n
                break
        return fields


def _every(n: int, layers: int) -> tuple[str, ...]:
    return tuple(SLIDING if i % n else FULL for i in range(layers))


class ModernBertEmbeddings(nnx.Module):
    """Normalised word embeddings."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, width, embedding_init=normal, rngs=rngs)
        self.norm = layer_norm(config, width, use_bias=config.norm_bias, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.norm(self.word(ids))


class ModernBertAttention(nnx.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        settings = dense(config, dtype, rngs) | {"use_bias": config.attention_bias}
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = nnx.Linear(width, 3 * width, **settings)
        self.output = nnx.Linear(width, width, **settings)

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        rotation: Rotation,
        reach: Reach | None,
        train: TrainMode | None = None,
    ) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        query, key = rotate(query, rotation), rotate(key, rotation)
        y = attend(query, key, value, attended, train=train, reach=reach)
        # A token with nothing to attend to within its window gets zeros, as in transformers 5 by
        # default (version 4 averages over all tokens, padding included).
        seen = sees_any(attended, reach)[..., None]
        return dropped(self.output(jnp.where(seen, y, 0)), train, 1)


class ModernBertMlp(nnx.Module):
    """GeGLU (Shazeer, 2020): the first half, activated, gates the second."""

    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings = dense(config, dtype, rngs) | {"use_bias": config.mlp_bias}
        self.input = nnx.Linear(width, 2 * inner, **settings)
        self.output = nnx.Linear(inner, width, **settings)
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array, train: TrainMode | None = None) -> jax.Array:
        gate, y = jnp.split(self.input(x), 2, axis=-1)
        return self.output(dropped(self.activation(gate) * y, train, 2))


class ModernBertLayer(nnx.Module):
    """A pre-layer-norm layer: attention, then gated units."""

    def __init__(self, config: ModernBertConfig, *, first: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = partial(layer_norm, config, config.hidden_size, use_bias=config.norm_bias, rngs=rngs)
        self.attention_norm = None if first else norm()  # the embeddings are normalised already
        self.attention = ModernBertAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = ModernBertMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, attended, rotation, reach, train=None) -> jax.Array:
        y = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.attention(y, attended, rotation, reach, train)
        return x + self.mlp(self.mlp_norm(x), train)


class ModernBert(nnx.Module):
    """ModernBERT's encoder; arguments as for `bert.Bert`."""

    def __init__(self, config: ModernBertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = ModernBertEmbeddings(config, rngs=rngs)
        self.layers = nnx.List(
            [
                ModernBertLayer(config, first=i == 0, dtype=dtype, rngs=rngs)
                for i in range(config.num_hidden_layers)
            ]
        )
        self.final_norm = layer_norm(
            config, config.hidden_size, use_bias=config.norm_bias, rngs=rngs
        )

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `bert.Bert`."""
        config, length = self.config, ids.shape[1]
        rotations = {
            kind: rotary_tables(length, config.head_dim, config.rope_theta(kind))
            for kind in set(config.layer_types)
        }
        window = config.local_attention // 2, config.local_attention // 2

        def call(i: int, layer: ModernBertLayer, x: jax.Array, train: TrainMode | None):
            kind = config.layer_types[i]
            return layer(x, attended, rotations[kind], window if kind == SLIDING else None, train)

        x = dropped(self.embeddings(ids), train, 0)
        return self.final_norm(run_layers(self.layers, call, x, train))


ARCHITECTURES = (
    Architecture(
        "modernbert",
        ModernBertConfig,
        ModernBert,
        {
            "embeddings.word": "embeddings.tok_embeddings",
            "embeddings.norm": "embeddings.norm",
            "layers.*.attention_norm": "layers.*.attn_norm",
            "layers.*.attention.qkv": "layers.*.attn.Wqkv",
            "layers.*.attention.output": "layers.*.attn.Wo",
            "layers.*.mlp_norm": "layers.*.mlp_norm",
            "layers.*.mlp.input": "layers.*.mlp.Wi",
            "layers.*.mlp.output": "layers.*.mlp.Wo",
            "final_norm": "final_norm",
        },
        prefix="model.",
        model_class="ModernBertModel",
        unused=(".head.", ".decoder."),
    ),
)
