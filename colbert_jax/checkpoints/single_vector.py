"""sentence-transformers folders of single-vector models, read for their token embeddings.

`bi_encoder` reads the same folders with their pooling.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.checkpoints.huggingface import new_projection, untrained_text
from colbert_jax.checkpoints.modules import (
    has_dense,
    has_modules,
    read_encoder,
    read_modules,
    read_settings,
)
from colbert_jax.checkpoints.sentence_transformers import prompt
from colbert_jax.models.colbert import EncoderConfig


def detect(folder: Path) -> bool:
    """Whether this is a folder of modules."""
    return has_modules(folder)


def read(folder: Path, *, dim: int | None = None, seed: int = 0, **_: Any) -> Checkpoint:
    """Read a model without its pooling; arguments and errors as for `checkpoints.read_checkpoint`.

    Dense modules become the head, as PyLate and sentence-transformers 6 convert them; without one,
    `dim` adds a projection drawn from `seed`.
    """
    settings = read_settings(folder)
    ignored = ("Pooling", "Normalize", "Dropout")
    expected = dim if has_dense(folder) else None
    checkpoint, transformer = read_encoder(folder, read_modules(folder), ignored, expected)
    text = dataclasses.replace(
        untrained_text(checkpoint.encoder.backbone),
        lowercase=bool(transformer.get("do_lower_case")),
        query_prompt=prompt(settings, "query"),
        doc_prompt=prompt(settings, "document"),
    )
    checkpoint = checkpoint.with_text_config(text)
    if dim is None or checkpoint.encoder.head:
        return checkpoint
    encoder = EncoderConfig.projecting(checkpoint.encoder.backbone, dim)
    params = checkpoint.params | {"head": {0: new_projection(encoder, seed)}}
    return dataclasses.replace(checkpoint, encoder=encoder, params=params)
