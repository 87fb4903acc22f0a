"""The register of backbones, and what is done alike for all of them.

To add a backbone: write one module with its configuration, its NNX module and its
`ARCHITECTURES`, and name it in `_MODULES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models import (
    bert,
    eurobert,
    jina,
    lfm2,
    modernbert,
    mpnet,
    qwen3,
    rotary_bert,
    xmod,
)
from colbert_jax.models.config import Architecture, BackboneConfig, named_tensors

_MODULES: tuple[Any, ...] = (
    bert,
    mpnet,
    modernbert,
    jina,
    lfm2,
    qwen3,
    eurobert,
    rotary_bert,
    xmod,
)

_REGISTER: dict[str, Architecture] = {
    entry.model_type: entry for module in _MODULES for entry in module.ARCHITECTURES
}
MODEL_TYPES = tuple(_REGISTER)

_EMBEDDINGS = ("word", "position", "token_type", "relative_position")
# Poolers, heads, and a buffer of old releases; see `Architecture.unused`.
_UNUSED = (".pooler.", ".classifier.", ".qa_outputs.", ".position_ids")
_NOT_IMPLEMENTED = ("is_decoder", "add_cross_attention", "pruned_heads", "rope_scaling")


def architecture(config: BackboneConfig) -> Architecture:
    """Return the register's entry for a configuration."""
    return _REGISTER[config.model_type]


def make_backbone(
    config: BackboneConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
) -> nnx.Module:
    """Make the module of an architecture; arguments as for `bert.Bert`.

    Its call takes ids int32[B, L] and attended bool[B, L] and gives float32[B, L, hidden_size].
    """
    module: Any = architecture(config).module
    return module(config, dtype=dtype, rngs=rngs)


def config_from_huggingface(fields: Mapping[str, Any]) -> BackboneConfig:
    """Read the architecture from a parsed `config.json`.

    Raises ValueError, naming the field, for an unknown `model_type`, missing sizes, values that do
    not fit together, and settings that would change the numbers and are not implemented.
    """
    model_type = fields.get("model_type")
    for entry in _REGISTER.values():
        if entry.also is not None and entry.also(fields):
            model_type = entry.model_type
    supported = ", ".join(map(repr, MODEL_TYPES))
    require(
        model_type in MODEL_TYPES,
        f"model_type {model_type!r} is not supported; supported: {supported}",
    )
    kind = _REGISTER[str(model_type)].config
    for name in _NOT_IMPLEMENTED:
        read = name == "rope_scaling" and kind.scales_rotation
        known = read or not fields.get(name)
        require(known, f"{name} {fields.get(name)!r} is not supported; leave it out")
    fields = kind.usual_fields(fields)
    theirs = _field_names(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    missing = sorted(theirs[name] for name in required if fields.get(theirs[name]) is None)
    require(not missing, f"missing fields: {', '.join(missing)}")
    given = {name: fields[key] for name, key in theirs.items() if fields.get(key) is not None}
    return kind(**given | kind.read_fields(fields) | {"model_type": model_type})


def to_huggingface(config: BackboneConfig) -> dict[str, Any]:
    """Return the fields of `config.json` for an architecture, all but `architectures`."""
    theirs = _field_names(type(config))
    fields = {key: getattr(config, name) for name, key in theirs.items()}
    return fields | config.written_fields()


def _field_names(kind: type[BackboneConfig]) -> dict[str, str]:
    """Our field -> the field of that architecture's `config.json`."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in kind.fixed]
    return {name: kind.renamed.get(name, name) for name in names}


def tensor_names(config: BackboneConfig, prefix: str = "") -> dict[tuple, str]:
    """Map paths in the NNX state of a backbone to names of Hugging Face's tensors, after `prefix`.

    A `kernel` is the transpose of its tensor: torch keeps [out, in], Flax [in, out].
    """

    def leaves(module: str) -> dict[str, str]:
        return _leaves(config, module) if config.has_module(module) else {}

    table = {ours: config.tensor(name) for ours, name in architecture(config).tensors.items()}
    return named_tensors(table, config.num_hidden_layers, leaves, prefix)


def transformers_names(config: BackboneConfig, tensor: str) -> list[str]:
    """Return transformers' name of a tensor that another library may have named.

    Several names: the tensor holds as many of theirs, one above the other.
    """
    names = [f".{tensor}"]
    for theirs, usual in architecture(config).other_names.items():
        parts = usual.split("|") if f".{theirs}." in names[0] else [theirs]
        names = [name.replace(f".{theirs}.", f".{part}.") for name in names for part in parts]
    return [name[1:] for name in names]


def _leaves(config: BackboneConfig, module: str) -> dict[str, str]:
    """Our and their name of each parameter of a module."""
    last = module.split(".")[-1]
    if last in _EMBEDDINGS:
        return {"embedding": "weight"}
    leaves = {("scale" if last.endswith("norm") else "kernel"): "weight"}
    return leaves | ({"bias": "bias"} if config.has_bias(module) else {})


def is_unused(config: BackboneConfig, tensor: str) -> bool:
    """Whether a tensor, named with or without a prefix, has no part in token embeddings."""
    parts = (*_UNUSED, *architecture(config).unused)
    return any(part in f".{tensor}" for part in parts) or config.is_unused(tensor)
