"""Plain Hugging Face encoders: BERT, with or without the `bert.` prefix, without a head."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from colbert_jax.checkpoints.common import (
    Checkpoint,
    Tensors,
    fill_params,
    read_backbone_config,
    refuse_unknown,
)
from colbert_jax.config import BertConfig, ColBERTConfig, TextConfig

# Parts of a BERT checkpoint that token embeddings do not use: pooler, pre-training heads, and a
# buffer of old releases.
IGNORED = (".pooler.", ".cls.", ".position_ids")

_EMBEDDINGS: dict[tuple[str, ...], str] = {
    ("word", "embedding"): "word_embeddings.weight",
    ("position", "embedding"): "position_embeddings.weight",
    ("token_type", "embedding"): "token_type_embeddings.weight",
    ("norm", "scale"): "LayerNorm.weight",
    ("norm", "bias"): "LayerNorm.bias",
}
_DENSE: dict[tuple[str, ...], str] = {
    ("attention", "query"): "attention.self.query",
    ("attention", "key"): "attention.self.key",
    ("attention", "value"): "attention.self.value",
    ("attention", "output"): "attention.output.dense",
    ("intermediate",): "intermediate.dense",
    ("output",): "output.dense",
}
_NORMS: dict[tuple[str, ...], str] = {
    ("attention_norm",): "attention.output.LayerNorm",
    ("output_norm",): "output.LayerNorm",
}


def bert_names(backbone: BertConfig, prefix: str) -> dict[tuple, str]:
    """Path in the state of a TokenEncoder -> Hugging Face name of the tensor."""
    names: dict[tuple, str] = {}
    for path, name in _EMBEDDINGS.items():
        names["backbone", "embeddings", *path] = f"{prefix}embeddings.{name}"
    for i in range(backbone.num_hidden_layers):
        layer, ours = f"{prefix}encoder.layer.{i}", ("backbone", "layers", i)
        for path, name in _DENSE.items():
            names[*ours, *path, "kernel"] = f"{layer}.{name}.weight"
            names[*ours, *path, "bias"] = f"{layer}.{name}.bias"
        for path, name in _NORMS.items():
            names[*ours, *path, "scale"] = f"{layer}.{name}.weight"
            names[*ours, *path, "bias"] = f"{layer}.{name}.bias"
    return names


def find_prefix(tensors: Tensors) -> str:
    """The prefix of the backbone's tensors: "bert." or none."""
    for prefix in ("bert.", ""):
        if f"{prefix}embeddings.word_embeddings.weight" in tensors.names():
            return prefix
    raise ValueError(
        f"{tensors.file}: no BERT encoder in it: 'embeddings.word_embeddings.weight' is missing"
    )


def read(folder: Path, *, dim: int | None, seed: int) -> Checkpoint:
    """Read a plain encoder; `dim` adds a projection drawn from `seed`."""
    backbone = read_backbone_config(folder)
    tensors = Tensors(folder)
    names = bert_names(backbone, find_prefix(tensors))
    refuse_unknown(tensors, names.values(), IGNORED)
    config = ColBERTConfig(
        dim=dim,
        text=TextConfig.untrained(
            query_maxlen=min(128, backbone.max_position_embeddings),
            doc_maxlen=min(512, backbone.max_position_embeddings),
        ),
    )
    params = fill_params(backbone, dim, tensors, names)
    if dim is not None:
        shape = (backbone.hidden_size, dim)
        kernel = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        params["projection"] = {"kernel": kernel * backbone.initializer_range}
    return Checkpoint(folder, backbone, config, params)
