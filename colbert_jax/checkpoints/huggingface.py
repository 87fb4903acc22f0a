"""Plain Hugging Face encoders; the head of another task is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.checkpoints.common import (
    Checkpoint,
    backbone_paths,
    fill_params,
    find_prefix,
    open_backbone,
    read_backbone,
    read_pooler,
    refuse_unknown,
)
from colbert_jax.checkpoints.modules import warn_without_modules
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import present
from colbert_jax.models.colbert import EncoderConfig
from colbert_jax.models.config import BackboneConfig


def detect(folder: Path) -> bool:
    """Whether there is a `config.json`."""
    return present(folder / "config.json")


def read(
    folder: Path,
    *,
    dim: int | None = None,
    seed: int = 0,
    language: str | None = None,
    **_: Any,
) -> Checkpoint:
    """Read a plain encoder; arguments and errors as for `checkpoints.read_checkpoint`."""
    warn_without_modules(folder)
    backbone = read_backbone(folder / "config.json", language)
    encoder = EncoderConfig.projecting(backbone, dim)
    tensors = open_backbone(folder, backbone)
    prefix = find_prefix(tensors, backbone)
    names = backbone_paths(backbone, prefix)
    refuse_unknown(tensors, backbone, names.values())
    params = fill_params(encoder, [(tensors, names)])
    if dim is not None:
        params["head"] = {0: new_projection(encoder, seed)}
    return Checkpoint(
        folder,
        encoder,
        ColBERTConfig(text=untrained_text(backbone)),
        read_tokenizer(folder),
        params,
        pooler=read_pooler(tensors, prefix),
        weights=tensors.file,
    )


def new_projection(encoder: EncoderConfig, seed: int) -> dict:
    """Draw the parameters of a one-layer head, to be trained."""
    shape = (encoder.backbone.hidden_size, encoder.dim)
    kernel = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return {"linear": {"kernel": np.asarray(kernel * encoder.backbone.initializer_range)}}


def untrained_text(backbone: BackboneConfig) -> TextConfig:
    """Return text settings for an encoder that was not trained for late interaction."""
    longest = backbone.max_length
    return TextConfig.untrained(query_maxlen=min(128, longest), doc_maxlen=min(512, longest))
