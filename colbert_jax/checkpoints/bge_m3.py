"""BAAI/bge-m3 and models trained like it: XLM-RoBERTa with heads in files of their own.

`colbert_linear.pt` projects hidden states, with a bias, to token embeddings; `sparse_linear.pt`
gives each token a weight for lexical matching. Queries and documents are alike: no markers, no
expansion, and no embedding of the first token, whose state is the vector of the whole text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import present
from colbert_jax.models.colbert import DenseConfig, EncoderConfig
from colbert_jax.models.config import BackboneConfig
from colbert_jax.tensors.weights import open_tensors
from colbert_jax.text import ModelTokenizer

HEAD, SPARSE = "colbert_linear.pt", "sparse_linear.pt"
_HEAD_PATHS: dict[tuple, str] = {
    ("head", 0, "linear", "kernel"): "weight",
    ("head", 0, "linear", "bias"): "bias",
}


def detect(folder: Path) -> bool:
    """Whether `colbert_linear.pt` lies beside a `config.json`."""
    return present(folder / HEAD) and present(folder / "config.json")


def read(folder: Path, *, dim: int | None = None, **_: Any) -> Checkpoint:
    """Read a folder; arguments and errors as for `checkpoints.read_checkpoint`.

    Queries are cut to 512 tokens, as FlagEmbedding does; documents to 8192.
    """
    backbone = read_backbone(folder / "config.json")
    tokenizer = read_tokenizer(folder)
    tensors, head = open_backbone(folder, backbone), open_tensors(folder / HEAD)
    extra = sorted(set(head.names()) - set(_HEAD_PATHS.values()))
    if extra:
        raise ValueError(f"{head.file}: expected 'weight' and 'bias' only, found {extra[:5]}")
    shape = head.shape("weight")
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"{head.file}: tensor 'weight' has shape {list(shape)}: no projection")
    width = shape[0]
    if dim is not None and dim != width:
        raise ValueError(f"{folder}: dim was given as {dim}, but {HEAD} projects to {width}")
    encoder = EncoderConfig(backbone, (DenseConfig(backbone.hidden_size, width, bias=True),))
    prefix = find_prefix(tensors, backbone)
    names = backbone_paths(backbone, prefix)
    refuse_unknown(tensors, backbone, names.values())
    return Checkpoint(
        folder,
        encoder,
        ColBERTConfig(text=_text(tokenizer, backbone)),
        tokenizer,
        fill_params(encoder, [(tensors, names), (head, _HEAD_PATHS)]),
        pooler=read_pooler(tensors, prefix),
        sparse=_read_sparse(folder / SPARSE, backbone) if present(folder / SPARSE) else {},
        weights=tensors.file,
    )


def _text(tokenizer: ModelTokenizer, backbone: BackboneConfig) -> TextConfig:
    first = tokenizer.special.get("cls_token") or tokenizer.special.get("bos_token")
    if first is None:
        raise ValueError(
            f"{tokenizer.file}: has neither a cls_token nor a bos_token: the token whose embedding "
            "bge-m3 drops"
        )
    return TextConfig.untrained(
        query_maxlen=min(512, backbone.max_length),
        doc_maxlen=min(8192, backbone.max_length),
        skiplist_words=(first,),
        skiplist_in_queries=True,
    )


def _read_sparse(file: Path, backbone: BackboneConfig) -> dict[str, np.ndarray]:
    tensors = open_tensors(file)
    tensors.check_shape("weight", (1, backbone.hidden_size))
    tensors.check_shape("bias", (1,))
    return {name: tensors.read(name) for name in ("weight", "bias")}
