"""Architectures of the backbones: what a Hugging Face `config.json` says, as frozen dataclasses.

Field names are BERT's, whatever an architecture's own `config.json` calls them; `renamed` gives its
name where it differs. Defaults are those that transformers applies to a field that is left out.
The sizes have no default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from colbert_jax.config import _require, _require_types
from colbert_jax.models.activations import activation

MOST_LAYERS = 1000  # no model has; a damaged file may claim to
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What every architecture has. Raises ValueError for values that do not fit together."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    model_types: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[frozenset[str]] = frozenset()  # fields that no config.json has

    def __post_init__(self) -> None:
        _require_types(self)
        _require(
            self.model_type in self.model_types,
            f"model_type {self.model_type!r} is not one of {', '.join(self.model_types)}",
        )
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _require(
            self.num_hidden_layers <= MOST_LAYERS,
            f"num_hidden_layers must be <= {MOST_LAYERS}, got {self.num_hidden_layers}",
        )
        for name in ("intermediate_size", "type_vocab_size", "embedding_size", "local_attention"):
            value = getattr(self, name, 1)
            _require(value >= 1, f"{name} must be >= 1, got {value}")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
            f"{self.num_attention_heads}",
        )
        _require(
            0 <= self.pad_token_id < self.vocab_size,
            f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        _require(
            self.max_length >= 1,
            f"max_position_embeddings {self.max_position_embeddings} leaves no position for a "
            "token",
        )
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def first_position(self) -> int:
        """Row of the position embeddings that the first token gets."""
        return 0

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the positions allow."""
        return self.max_position_embeddings - self.first_position


@dataclass(frozen=True, kw_only=True)
class BertConfig(BackboneConfig):
    model_type: str = "bert"
    type_vocab_size: int = 2

    model_types: ClassVar[tuple[str, ...]] = ("bert",)


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BackboneConfig):
    model_type: str = "roberta"
    type_vocab_size: int = 2
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta")

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BackboneConfig):
    model_type: str = "distilbert"

    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    renamed: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }
    fixed: ClassVar[frozenset[str]] = frozenset({"layer_norm_eps"})


@dataclass(frozen=True, kw_only=True)
class ElectraConfig(BackboneConfig):
    model_type: str = "electra"
    type_vocab_size: int = 2
    embedding_size: int = 128

    model_types: ClassVar[tuple[str, ...]] = ("electra",)


@dataclass(frozen=True, kw_only=True)
class MPNetConfig(BackboneConfig):
    model_type: str = "mpnet"
    relative_attention_num_buckets: int = 32
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("mpnet",)
    # transformers uses these two numbers whatever config.json says of them, so the published
    # weights were trained with them.
    position_padding_id: ClassVar[int] = 1
    num_buckets: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        buckets = self.relative_attention_num_buckets
        _require(
            buckets >= self.num_buckets,
            f"relative_attention_num_buckets must be >= {self.num_buckets}, got {buckets}",
        )

    @property
    def first_position(self) -> int:
        return self.position_padding_id + 1


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(BackboneConfig):
    """ModernBERT. `layer_types` says of each layer whether it attends to all tokens or to those
    within `local_attention // 2` of each; left out, every third layer attends to all, from the
    first on.
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
        layers = self.num_hidden_layers
        _require(
            isinstance(self.layer_types, tuple | list),
            f"layer_types must be a list, got {self.layer_types!r}",
        )
        types = tuple(self.layer_types) or _every(3, layers)
        object.__setattr__(self, "layer_types", types)
        unknown = sorted({str(kind) for kind in types} - {FULL, SLIDING})
        _require(not unknown, f"layer_types {', '.join(unknown)}: expected {FULL} or {SLIDING}")
        _require(len(types) == layers, f"layer_types has {len(types)} entries for {layers} layers")
        _require(self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}")
        for name in ("global_rope_theta", "local_rope_theta"):
            _require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")

    def rope_theta(self, layer_type: str) -> float:
        return self.global_rope_theta if layer_type == FULL else self.local_rope_theta


_CLASSES: dict[str, type[BackboneConfig]] = {
    model_type: kind
    for kind in (
        BertConfig,
        RobertaConfig,
        DistilBertConfig,
        ElectraConfig,
        MPNetConfig,
        ModernBertConfig,
    )
    for model_type in kind.model_types
}
MODEL_TYPES = tuple(_CLASSES)


def config_from_huggingface(config: Mapping[str, Any]) -> BackboneConfig:
    """The architecture of a parsed `config.json`.

    Raises ValueError, with what is at fault, for another `model_type`, missing sizes, values that
    do not fit together, and settings that would change the numbers and are not implemented.
    """
    model_type = config.get("model_type")
    supported = ", ".join(map(repr, MODEL_TYPES))
    _require(
        model_type in MODEL_TYPES,
        f"model_type {model_type!r} is not supported; supported: {supported}",
    )
    kind = _CLASSES[str(model_type)]
    _refuse_unimplemented(kind, config)
    theirs = _names(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    missing = sorted(theirs[name] for name in required if config.get(theirs[name]) is None)
    _require(not missing, f"missing fields: {', '.join(missing)}")
    given = {name: config[key] for name, key in theirs.items() if config.get(key) is not None}
    if kind is ModernBertConfig:
        given |= _read_modernbert(config)
    return kind(**given)


def to_huggingface(config: BackboneConfig) -> dict[str, Any]:
    """The fields of `config.json` that say the same; `architectures` is left to the caller.

    ModernBERT's attention pattern and thetas are written as transformers 4 and as transformers 5
    read them. A pattern other than "every n-th layer from the first on" exists in 5 only.
    """
    fields = {theirs: getattr(config, name) for name, theirs in _names(type(config)).items()}
    if isinstance(config, ModernBertConfig):
        fields |= _write_modernbert(config)
    return fields


def _names(kind: type[BackboneConfig]) -> dict[str, str]:
    """Our field -> the field of that architecture's `config.json`."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in kind.fixed]
    return {name: kind.renamed.get(name, name) for name in names}


def _refuse_unimplemented(kind: type[BackboneConfig], config: Mapping[str, Any]) -> None:
    # Elsewhere the field means nothing: ModernBERT checkpoints carry several values of it.
    if kind in (BertConfig, RobertaConfig, ElectraConfig):
        positions = config.get("position_embedding_type") or "absolute"
        _require(
            positions == "absolute",
            f"position_embedding_type {positions!r} is not supported; supported: 'absolute'",
        )
    for name in ("is_decoder", "add_cross_attention", "pruned_heads", "rope_scaling"):
        _require(
            not config.get(name), f"{name} {config.get(name)!r} is not supported; leave it out"
        )


def _every(n: int, layers: int) -> tuple[str, ...]:
    return tuple(SLIDING if i % n else FULL for i in range(layers))


def _read_modernbert(config: Mapping[str, Any]) -> dict[str, Any]:
    """Attention pattern and thetas, in the words of transformers 5 or 4; 5's go first."""
    given: dict[str, Any] = {}
    every, layers = config.get("global_attn_every_n_layers"), config["num_hidden_layers"]
    if config.get("layer_types") is None and every is not None and isinstance(layers, int):
        _require(
            isinstance(every, int) and every >= 1,
            f"global_attn_every_n_layers must be an int >= 1, got {every!r}",
        )
        given["layer_types"] = _every(every, layers)
    if "local_rope_theta" in config and config["local_rope_theta"] is None:
        # transformers 4: no theta of their own means that of the global layers.
        given["local_rope_theta"] = config.get("global_rope_theta") or 160_000.0
    parameters = config.get("rope_parameters") or {}
    _require(
        isinstance(parameters, Mapping) and set(parameters) <= {FULL, SLIDING},
        f"rope_parameters must hold {FULL} and {SLIDING}, got {parameters!r}",
    )
    for layer_type, name in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
        rope = dict(parameters.get(layer_type) or {})
        theta = rope.pop("rope_theta", None)
        # What is left says how the frequencies are scaled.
        scaled = {k: v for k, v in rope.items() if v not in (None, "default")}
        _require(
            not scaled,
            f"rope_parameters of {layer_type}: {scaled!r} is not supported; leave it out",
        )
        if theta is not None:
            given[name] = theta
    return given


def _write_modernbert(config: ModernBertConfig) -> dict[str, Any]:
    layers = config.num_hidden_layers
    thetas = {FULL: float(config.global_rope_theta), SLIDING: float(config.local_rope_theta)}
    fields: dict[str, Any] = {
        "layer_types": list(config.layer_types),
        "global_rope_theta": thetas[FULL],
        "local_rope_theta": thetas[SLIDING],
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": theta}
            for layer_type, theta in thetas.items()
        },
    }
    for n in range(1, layers + 1):
        if config.layer_types == _every(n, layers):
            fields["global_attn_every_n_layers"] = n
            break
    return fields
