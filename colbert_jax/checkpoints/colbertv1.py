"""ColBERTv1 checkpoints: a torch file `.dnn`, with the configuration of a base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.checkpoints import stanford
from colbert_jax.checkpoints.common import (
    Checkpoint,
    backbone_tensors,
    fold_head,
    one_encoder,
    read_backbone,
    refuse_text,
    write_base,
)
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import ColBERTConfig
from colbert_jax.files import present
from colbert_jax.models.backbones import architecture
from colbert_jax.tensors.torch_file import read_torch_file, write_torch_file
from colbert_jax.tensors.weights import WEIGHT_FILES, Tensors, state_dict

SUFFIX = ".dnn"
NAME = "colbert.dnn"
DEFAULT_BASE = "bert-base-uncased"

# Text settings that version 1 does not have.
_FIXED = ("query_token_id", "doc_token_id", "attend_to_mask_tokens")
# Defaults of its command line.
_DEFAULTS: dict[str, Any] = dict(
    query_maxlen=32, doc_maxlen=180, mask_punctuation=False, similarity="cosine"
)


def detect(path: Path) -> bool:
    """Whether this is a file, or a folder with the base model's files and one `.dnn` file as its
    only weights.
    """
    if path.is_file():
        return True
    if not present(path / "config.json"):
        return False
    weights = any(present(path / name) for name in WEIGHT_FILES)
    return not weights and len(list(path.glob(f"*{SUFFIX}"))) == 1


def base_name(file: Path) -> str:
    """Return the base model that a `.dnn` file names. Raises ValueError unless it is a hub id."""
    name = _arguments(read_torch_file(file)).get("model") or DEFAULT_BASE
    if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{file}: its base model {name!r:.80} is not a hub id; pass base=")
    return name


def _arguments(value: Any) -> dict[str, Any]:
    """The command line's arguments in a `.dnn` file; {} if there are none."""
    arguments = value.get("arguments") if isinstance(value, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def read(path: Path, *, dim: int | None = None, base: Path | None = None, **_: Any) -> Checkpoint:
    """Read a `.dnn` file, or a folder's; arguments and errors as for `checkpoints.read_checkpoint`.

    Args:
      base: folder with the `config.json` and the tokenizer of the model it was trained from. If
        None, the file's folder.
    """
    file = path if path.is_file() else next(path.glob(f"*{SUFFIX}"))
    base = base or file.parent
    value = read_torch_file(file)
    given = {
        key: v
        for key, v in _arguments(value).items()
        if key in (*_DEFAULTS, "dim") and v is not None
    }
    config, width = stanford.config_from_fields(_DEFAULTS | given, file)
    # DistributedDataParallel puts a prefix before the names.
    tensors = Tensors(file, state_dict(file, value)).renamed(lambda n: n.removeprefix("module."))
    return stanford.from_tensors(
        file,
        read_backbone(base / "config.json"),
        tensors,
        read_tokenizer(base),
        config,
        width,
        dim,
    )


def kept(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: those of texts, and the similarity."""
    plain, _ = stanford.config_from_fields({}, Path())
    return dataclasses.replace(plain, text=config.text, similarity=config.similarity)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `colbert.dnn`, and the configuration and tokenizer of the base model beside it.

    Raises ValueError for settings that the layout cannot store, as for `stanford.write`.
    """
    one_encoder(checkpoint, "colbertv1")
    fields = stanford.stanford_fields(checkpoint, "colbertv1")
    supported = {*stanford.TEXT_FIELDS, "skiplist_words", "strip", "query_minlen"} - set(_FIXED)
    refuse_text(checkpoint.config.text, supported, "colbertv1")
    projection = fold_head(checkpoint.encoder, checkpoint.params, "colbertv1")
    prefix = architecture(checkpoint.encoder.backbone).prefix
    tensors: dict[str, np.ndarray] = backbone_tensors(
        checkpoint, checkpoint.params, prefix, pooler=True
    )
    arguments = {name: fields[name] for name in _DEFAULTS if name in fields}
    write_base(checkpoint, folder, ["ColBERT"])
    write_torch_file(
        folder / NAME,
        {
            "epoch": 0,
            "batch": 0,
            "model_state_dict": tensors | {stanford.PROJECTION: projection},
            "optimizer_state_dict": {},
            "arguments": arguments | {"dim": len(projection), "model": DEFAULT_BASE},
        },
    )
