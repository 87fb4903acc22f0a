"""Cross-encoders: Hugging Face's `BertForSequenceClassification` with one class."""

from __future__ import annotations

from pathlib import Path

from colbert_jax.checkpoints.common import (
    Checkpoint,
    backbone_paths,
    fill_params,
    read_backbone,
    refuse_unknown,
)
from colbert_jax.checkpoints.modules import Module
from colbert_jax.checkpoints.sentence_transformers import longest_text
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import present, read_object
from colbert_jax.models.backbones import architecture
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.cross_encoder import cross_encoder_config
from colbert_jax.tensors.weights import find_tensors

_CLASS = "BertForSequenceClassification"
_KIND = "ForSequenceClassification"
_CLASSIFIER = "classifier"


def detect(folder: Path) -> bool:
    """Whether the `config.json` of a folder names a sequence classifier."""
    return any(name.endswith(_KIND) for name in _architectures(folder))


def _architectures(folder: Path) -> list[str]:
    file = folder / "config.json"
    names = read_object(file).get("architectures") if present(file) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def read(folder: Path) -> Checkpoint:
    """Read a cross-encoder; the head of its encoder is the pooler and the classifier.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it: another
        architecture, more than one class, tensors that are missing, unknown or of another shape.
    """
    file = folder / "config.json"
    names = _architectures(folder)
    if names != [_CLASS]:
        raise ValueError(
            f"{file}: architectures is {', '.join(names) or 'missing'}; supported as a "
            f"cross-encoder: {_CLASS}"
        )
    backbone = read_backbone(file)
    if not isinstance(backbone, BertConfig):
        raise ValueError(f"{file}: {_CLASS} with model_type {backbone.model_type!r}")
    if backbone.type_vocab_size < 2:
        raise ValueError(
            f"{file}: type_vocab_size is {backbone.type_vocab_size}; a cross-encoder needs token "
            "type 0 for the query and 1 for the document"
        )
    encoder = cross_encoder_config(backbone)
    tensors = find_tensors(folder)
    classes = tensors.shape(f"{_CLASSIFIER}.weight")[0]
    if classes != 1:
        raise ValueError(
            f"{tensors.file}: the classifier has {classes} classes; a cross-encoder that scores "
            "pairs has one (num_labels=1)"
        )
    prefix = architecture(backbone).prefix
    paths = backbone_paths(backbone, prefix)
    for i, name in enumerate((f"{prefix}pooler.dense", _CLASSIFIER)):
        paths["head", i, "linear", "kernel"] = f"{name}.weight"
        paths["head", i, "linear", "bias"] = f"{name}.bias"
    refuse_unknown(tensors, backbone, paths.values())
    params = fill_params(encoder, [(tensors, paths)])
    tokenizer = read_tokenizer(folder)
    checkpoint = Checkpoint(
        folder, encoder, ColBERTConfig(), tokenizer, params, weights=tensors.file
    )
    longest = longest_text(checkpoint, [Module("", "Transformer", folder)], {})
    text = TextConfig.untrained(query_maxlen=longest, doc_maxlen=longest)
    return checkpoint.with_text_config(text)


def check_pairs(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the tokenizer turns a pair into `[CLS] a [SEP] b [SEP]`."""
    model = checkpoint.tokenizer
    pair, first, second = (
        model.tokenizer.encode("a", "b"),
        *(model.tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b")),
    )
    cls, sep = (model.tokenizer.token_to_id(model.special.get(r, "")) for r in _PAIR_ROLES)
    ids = [cls, *first.ids, sep, *second.ids, sep]
    types = [0] * (len(first.ids) + 2) + [1] * (len(second.ids) + 1)
    if pair.ids != ids or pair.type_ids != types:
        raise ValueError(
            f"{checkpoint.folder}: the tokenizer turns a pair into {' '.join(pair.tokens)} with "
            f"token types {pair.type_ids}; a BERT cross-encoder needs [CLS] a [SEP] b [SEP] with "
            f"{types}"
        )


_PAIR_ROLES = ("cls_token", "sep_token")
