"""Stanford ColBERT(v2) folders: `HF_ColBERT` weights and `artifact.metadata`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints.common import (
    Checkpoint,
    Tensors,
    fill_params,
    read_backbone_config,
    refuse_unknown,
)
from colbert_jax.checkpoints.huggingface import IGNORED, bert_names, find_prefix
from colbert_jax.config import ColBERTConfig, IndexConfig, SearchConfig, TextConfig
from colbert_jax.files import read_json

METADATA = "artifact.metadata"
PROJECTION = "linear.weight"

# Settings that would change the numbers and that this library does not have, with the one value
# that means "not used".
_UNSUPPORTED = {
    "interaction": "colbert",
    "pool_factor": 1,
    "protected_tokens": 0,
    "reranker": False,
}


def detect(folder: Path) -> bool:
    """Whether Stanford's metadata file is there, or its projection among the weights."""
    if (folder / METADATA).is_file():
        return True
    return (folder / "model.safetensors").is_file() and PROJECTION in Tensors(folder).names()


def read(folder: Path, *, dim: int | None = None) -> Checkpoint:
    """Read weights and settings. The projection's width comes from the weights."""
    backbone = read_backbone_config(folder)
    tensors = Tensors(folder)
    if PROJECTION not in tensors.names():
        raise ValueError(f"{tensors.file}: tensor {PROJECTION!r} is missing")
    shape = tensors.shape(PROJECTION)
    if len(shape) != 2:
        raise ValueError(f"{tensors.file}: tensor {PROJECTION!r} has shape {list(shape)}, not 2-D")
    file = folder / METADATA
    config = read_config(file) if file.is_file() else ColBERTConfig(dim=shape[0])
    for asked, where in ((config.dim, f"{METADATA} has dim"), (dim, "dim was given as")):
        if asked is not None and asked != shape[0]:
            raise ValueError(
                f"{folder}: {where} {asked}, but {PROJECTION} projects to {shape[0]} dimensions"
            )
    names = bert_names(backbone, find_prefix(tensors))
    names["projection", "kernel"] = PROJECTION
    refuse_unknown(tensors, names.values(), IGNORED)
    params = fill_params(backbone, shape[0], tensors, names)
    return Checkpoint(folder, backbone, config, params)


def read_config(file: Path) -> ColBERTConfig:
    """Settings from an `artifact.metadata`: Stanford's defaults where a field is absent or null."""
    fields = read_json(file)
    if isinstance(fields, dict) and isinstance(fields.get("config"), dict):
        fields = fields["config"]
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object of settings")
    fields = {key: value for key, value in fields.items() if value is not None}
    for name, only in _UNSUPPORTED.items():
        if fields.get(name, only) != only:
            raise ValueError(
                f"{file}: {name} {fields[name]!r} is not supported; supported: {only!r}"
            )
    defaults = {"nbits": 1}  # Stanford's own, where ours is 2
    try:
        config = ColBERTConfig(
            dim=fields.pop("dim", 128),
            similarity=fields.pop("similarity", "cosine"),
            text=_take(TextConfig, fields),
            index=_take(IndexConfig, defaults | fields),
            search=_take(SearchConfig, fields),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    known = {
        f.name for cls in (TextConfig, IndexConfig, SearchConfig) for f in dataclasses.fields(cls)
    }
    rest = {key: value for key, value in fields.items() if key not in known}
    return dataclasses.replace(config, metadata=rest)


def _take(cls: type, fields: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in fields.items() if key in names})
