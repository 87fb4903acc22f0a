"""Stanford ColBERT(v2) folders: `HF_ColBERT` weights and `artifact.metadata`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints.common import (
    Checkpoint,
    backbone_paths,
    backbone_tensors,
    fill_params,
    find_prefix,
    fixed_expansion,
    fold_head,
    head_paths,
    masks_punctuation,
    one_encoder,
    open_backbone,
    read_backbone,
    read_pooler,
    refuse_text,
    refuse_unknown,
    save_tensors,
    write_base,
)
from colbert_jax.checkpoints.modules import has_dense
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.checkpoints.warn import expect_any
from colbert_jax.config import ColBERTConfig, IndexConfig, SearchConfig, TextConfig
from colbert_jax.files import check_types, present, read_object, write_json
from colbert_jax.models.backbones import architecture
from colbert_jax.models.colbert import EncoderConfig
from colbert_jax.models.config import BackboneConfig
from colbert_jax.tensors.weights import SAFETENSORS, WEIGHT_FILES, Tensors, find_tensors
from colbert_jax.text import ModelTokenizer

METADATA = "artifact.metadata"
PROJECTION = "linear.weight"

# The text settings of artifact.metadata, under the same names as in TextConfig.
TEXT_FIELDS = (
    "query_maxlen",
    "doc_maxlen",
    "query_token_id",
    "doc_token_id",
    "mask_punctuation",
    "attend_to_mask_tokens",
)
_INDEX_FIELDS = ("nbits", "kmeans_niters")
_SEARCH_FIELDS = ("ncells", "centroid_score_threshold", "ndocs")
_INSTEAD = "Stanford's default settings are used"
_INTERACTIONS = {"colbert": "maxsim", "flipr": "flipr"}
# Settings that would change the embeddings or scores and are not implemented, with the value that
# means "not used".
_UNSUPPORTED = {"clustering_mode": "hierarchical", "reranker": False}
# Stanford's pooled embeddings keep their length. An index normalises what it decompresses.
_POOLING = {"pool_factor": "pool_factor", "protected_tokens": "pool_protected"}


def detect(folder: Path) -> bool:
    """Whether Stanford's metadata file is there, or its projection among the weights.

    A folder with a list of modules is Stanford's only if none of them is a Dense module.
    """
    if not present(folder / "config.json") or has_dense(folder):
        return False
    if present(folder / METADATA):
        return True
    found = any(present(folder / name) for name in WEIGHT_FILES)
    return found and PROJECTION in find_tensors(folder)


def read(
    folder: Path, *, dim: int | None = None, language: str | None = None, **_: Any
) -> Checkpoint:
    """Read weights and settings; arguments and errors as for `checkpoints.read_checkpoint`.

    The projection's width is that of the weights.
    """
    backbone = read_backbone(folder / "config.json", language)
    tokenizer = read_tokenizer(folder)
    file = folder / METADATA
    if not present(file):
        expect_any(file, {}, (), _INSTEAD)
    config, width = read_config(file) if present(file) else (ColBERTConfig(), None)
    return from_tensors(
        folder, backbone, open_backbone(folder, backbone), tokenizer, config, width, dim
    )


def from_tensors(
    folder: Path,
    backbone: BackboneConfig,
    tensors: Tensors,
    tokenizer: ModelTokenizer,
    config: ColBERTConfig,
    width: int | None,
    dim: int | None,
) -> Checkpoint:
    """Read a checkpoint from tensors with Stanford's names.

    Args:
      width, dim: the width of the projection according to the settings, and to the caller. If
        None, any.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    shape = tensors.shape(PROJECTION)
    if len(shape) != 2:
        raise ValueError(
            f"{tensors.file}: tensor {PROJECTION!r} has shape {list(shape)}, not two sizes"
        )
    for asked, where in ((width, "the settings have dim"), (dim, "dim was given as")):
        if asked is not None and asked != shape[0]:
            raise ValueError(
                f"{tensors.file}: {where} {asked}, but {PROJECTION} projects to {shape[0]} "
                "dimensions"
            )
    encoder = EncoderConfig.projecting(backbone, shape[0])
    prefix = find_prefix(tensors, backbone)
    names = backbone_paths(backbone, prefix) | head_paths(encoder, 0)
    refuse_unknown(tensors, backbone, names.values())
    params = fill_params(encoder, [(tensors, names)])
    config = dataclasses.replace(config, text=known_markers(config.text, tokenizer))
    pooler = read_pooler(tensors, prefix)
    return Checkpoint(
        folder, encoder, config, tokenizer, params, pooler=pooler, weights=tensors.file
    )


def known_markers(text: TextConfig, tokenizer: ModelTokenizer) -> TextConfig:
    """Replace markers that the vocabulary lacks by the unknown token, as the original does."""
    unknown = tokenizer.special.get("unk_token")
    changes: dict[str, Any] = {
        name: unknown
        for name in ("query_token_id", "doc_token_id")
        if not tokenizer.has(getattr(text, name)) and tokenizer.has(unknown)
    }
    return dataclasses.replace(text, **changes)


def read_config(file: Path) -> tuple[ColBERTConfig, int | None]:
    """Read the settings and `dim` of an `artifact.metadata`; defaults are Stanford's."""
    fields = read_object(file)
    if isinstance(fields.get("config"), dict):
        fields = fields["config"]
    expect_any(file, fields, (*TEXT_FIELDS, *_INDEX_FIELDS, "dim", "checkpoint"), _INSTEAD)
    return config_from_fields(fields, file)


def config_from_fields(fields: dict[str, Any], file: Path) -> tuple[ColBERTConfig, int | None]:
    """Read settings with Stanford's names; unknown ones are kept as metadata.

    Args:
      fields: the settings, null for those that are not set.
      file: for error messages.

    Returns:
      the settings, and the width `dim`; None if it is not set.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    for name, only in _UNSUPPORTED.items():
        if fields.get(name, only) != only:
            raise ValueError(
                f"{file}: {name} {fields[name]!r} is not supported; supported: {only!r}"
            )
    check_types(file, fields, {"dim": int})
    dim = fields.pop("dim", None)
    parts = {
        "text": (TextConfig, TEXT_FIELDS),
        "index": (IndexConfig, _fields(IndexConfig)),
        "search": (SearchConfig, _SEARCH_FIELDS),
    }
    fields = {"nbits": 1} | fields  # Stanford's default; ours is 2
    check_types(file, fields, dict.fromkeys(_POOLING, int))
    pooling = {ours: fields.pop(name) for name, ours in _POOLING.items() if name in fields}
    try:
        settings = {
            part: cls(**{name: fields[name] for name in names if name in fields})
            for part, (cls, names) in parts.items()
        }
        if pooling.get("pool_factor", 1) != 1:
            unpooled = {"pool_protected": 0, "pool_normalize": False}
            settings["text"] = dataclasses.replace(settings["text"], **unpooled | pooling)
        similarity = fields.pop("similarity", "cosine")
        interaction = _INTERACTIONS.get(str(fields.get("interaction", "colbert")))
        if interaction is None:
            raise ValueError(
                f"interaction {fields['interaction']!r} is not supported; supported: "
                f"{', '.join(_INTERACTIONS)}"
            )
        config = ColBERTConfig(similarity=similarity, interaction=interaction, **settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    known = {name for _, names in parts.values() for name in names}
    rest = {key: value for key, value in fields.items() if key not in known}
    return dataclasses.replace(config, metadata=rest), dim


def _fields(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that colbert-ai loads.

    Raises ValueError for a checkpoint that the layout cannot store: no query expansion, no marker,
    prompts, a head with a bias or an activation, a second encoder for queries.
    """
    one_encoder(checkpoint, "stanford")
    backbone = checkpoint.encoder.backbone
    fields = stanford_fields(checkpoint, "stanford")
    projection = fold_head(checkpoint.encoder, checkpoint.params, "stanford")
    prefix = architecture(backbone).prefix
    tensors = backbone_tensors(checkpoint, checkpoint.params, prefix, pooler=True)
    save_tensors(folder / SAFETENSORS, tensors | {PROJECTION: projection})
    write_base(checkpoint, folder, ["HF_ColBERT"])
    write_json(folder / METADATA, fields | {"dim": len(projection)})


def stanford_fields(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """Return the settings with Stanford's names. Raises ValueError as `write` does."""
    config = checkpoint.config
    text = config.text
    # Stripping changes nothing for WordPiece and SentencePiece, so Stanford's layout need not store
    # it. A query_minlen equal to query_maxlen is fixed expansion.
    pooled = text.pool_factor != 1 and text.pool_factor % 1 == 0 and not text.pool_normalize
    supported = [*TEXT_FIELDS, "skiplist_words", "strip", "query_minlen"]
    if pooled or text.pool_factor == 1:
        supported += ["pool_factor", "pool_protected", "pool_normalize"]
    refuse_text(text, supported, layout)
    fixed_expansion(text, layout)
    for name in ("query_token_id", "doc_token_id"):
        if getattr(text, name) is None:
            raise ValueError(f"the {layout} layout needs a marker; {name} is None")
    if "mask_token" not in checkpoint.tokenizer.special:
        raise ValueError(
            f"the {layout} layout fills queries with the mask token; the tokenizer has none"
        )
    fields = {name: getattr(text, name) for name in TEXT_FIELDS}
    fields["mask_punctuation"] = masks_punctuation(checkpoint, layout)
    if pooled:
        fields |= {name: int(getattr(text, ours)) for name, ours in _POOLING.items()}
    rest = dataclasses.asdict(config.index) | dataclasses.asdict(config.search)
    known = {*_INDEX_FIELDS, *_SEARCH_FIELDS}
    return (
        {key: value for key, value in config.metadata.items() if _is_plain(value)}
        | {key: value for key, value in rest.items() if key in known}
        | fields
        | {"similarity": config.similarity}
        | {"interaction": "flipr" if config.interaction == "flipr" else "colbert"}
    )


def kept(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: all but some of an index's."""
    index = IndexConfig(**{name: getattr(config.index, name) for name in _INDEX_FIELDS})
    search = dataclasses.replace(config.search, candidates=None)
    interaction = config.interaction if config.interaction == "flipr" else "maxsim"
    return dataclasses.replace(config, index=index, search=search, interaction=interaction)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, dict, type(None)))
