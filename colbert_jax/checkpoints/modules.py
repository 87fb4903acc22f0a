"""What PyLate and sentence-transformers folders share: `modules.json` and its Dense modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.checkpoints.common import (
    Checkpoint,
    backbone_paths,
    backbone_tensors,
    fill_params,
    find_prefix,
    head_paths,
    open_backbone,
    read_backbone,
    read_pooler,
    refuse_unknown,
    save_tensors,
    tensors_of,
)
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.checkpoints.warn import expect_any
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import check_types, present, read_json, read_object, write_json
from colbert_jax.models.colbert import HEAD_ACTIVATIONS, DenseConfig, EncoderConfig
from colbert_jax.models.config import BackboneConfig
from colbert_jax.runtime import warn
from colbert_jax.tensors.weights import SAFETENSORS, find_tensors
from colbert_jax.text import ModelTokenizer

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"

# Settings of the Transformer module: older releases named the file after the architecture.
_TRANSFORMER_SETTINGS = (
    LENGTHS,
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_mpnet_config.json",
)
_SETTINGS_TYPES = {
    "prompts": dict,
    "default_prompt_name": str,
    "similarity_fn_name": str,
    "query_prefix": str,
    "document_prefix": str,
    "query_length": int,
    "document_length": int,
    "do_query_expansion": bool,
    "attend_to_expansion_tokens": bool,
    "skiplist_words": [str],
}
_TRANSFORMER_TYPES = {
    "max_seq_length": int,
    "do_lower_case": bool,
    "query_length": int,
    "document_length": int,
    "query_expansion": dict,
}
_EXPANSION_TYPES = {"strategy": str, "attend": bool, "token": str, "length": int}
_TORCH_CLASSES = {name: f"torch.nn.modules.activation.{name}" for name in HEAD_ACTIVATIONS}
_TORCH_CLASSES["Identity"] = "torch.nn.modules.linear.Identity"


class Module(NamedTuple):
    """An entry of modules.json: class path, its last part, and the module's folder."""

    type: str
    kind: str
    folder: Path


def read_modules(folder: Path) -> list[Module]:
    """Read the list of modules. Raises ValueError for a path that leads out of the folder."""
    file = folder / MODULES
    if not present(file):
        raise FileNotFoundError(f"{folder}: {MODULES} is missing")
    entries = read_json(file)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("path"), str) and isinstance(e.get("type"), str)
        for e in entries
    ):
        raise ValueError(f"{file}: expected a list of objects with 'path' and 'type'")
    modules = []
    for entry in entries:
        place = folder / entry["path"].replace("\0", "?")
        if not place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file}: module path {entry['path']!r} leads out of the folder")
        modules.append(Module(entry["type"], entry["type"].rpartition(".")[2], place))
    return modules


def has_modules(folder: Path) -> bool:
    """Whether a folder has a `modules.json`."""
    return present(folder / MODULES)


def warn_without_modules(folder: Path) -> None:
    """Warn if a folder has settings of sentence-transformers and no `modules.json`."""
    for name in (SETTINGS, *_TRANSFORMER_SETTINGS):
        if present(folder / name) and not has_modules(folder):
            warn(
                f"{folder / MODULES}: is missing beside {name}: read as a plain encoder, without "
                "what the modules add"
            )
            return


def has_dense(folder: Path) -> bool:
    """Whether a folder's `modules.json` lists a Dense module."""
    return has_modules(folder) and any(m.kind == "Dense" for m in read_modules(folder))


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `config_sentence_transformers.json`; {} if there is none."""
    file = folder / SETTINGS
    fields = read_object(file) if present(file) else {}
    check_types(file, fields, _SETTINGS_TYPES)
    for name, text in (fields.get("prompts") or {}).items():
        check_types(file, {f"prompt {name!r}": text}, {f"prompt {name!r}": str})
    return fields


def _other_prompts(prompts: Any) -> dict[str, Any]:
    """The prompts that this library does not use, as metadata."""
    prompts = prompts if isinstance(prompts, dict) else {}
    others = {name: text for name, text in prompts.items() if name not in ("query", "document")}
    return {"prompts": others} if others else {}


def prompts_of(text: TextConfig, config: ColBERTConfig) -> dict[str, str]:
    """Return the prompts to write: those of `text`, and those that the checkpoint brought."""
    others = kept_settings(config).metadata.get("prompts", {})
    return {**others, "query": text.query_prompt, "document": text.doc_prompt}


def kept_settings(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: those of texts, and prompts."""
    metadata = _other_prompts(config.metadata.get("prompts"))
    return ColBERTConfig(text=config.text, metadata=metadata)


def transformer_settings(module: Module) -> dict[str, Any]:
    """Read the settings of a Transformer module; {} if there are none."""
    for name in _TRANSFORMER_SETTINGS:
        if present(module.folder / name):
            fields = read_object(module.folder / name)
            file = module.folder / name
            check_types(file, fields, _TRANSFORMER_TYPES)
            check_types(file, fields.get("query_expansion") or {}, _EXPANSION_TYPES)
            return fields
    return {}


def expect_lengths(root: Path, transformer: dict[str, Any]) -> None:
    """Warn if the settings of a Transformer module hold no length."""
    known = (*(_TRANSFORMER_TYPES.keys() - {"do_lower_case"}), "transformer_task")
    expect_any(root / LENGTHS, transformer, known, "lengths and query expansion are the defaults")


def read_encoder(
    folder: Path, modules: Sequence[Module], ignored: Sequence[str], dim: int | None
) -> tuple[Checkpoint, dict[str, Any]]:
    """Read the transformer and the dense modules of a folder.

    The text settings of the checkpoint are the library's defaults; the caller replaces them.

    Args:
      modules: as `read_modules` gives them.
      ignored: kinds of modules that the caller handles.
      dim: the width that the head must have. If None, any.

    Returns:
      the checkpoint, and the settings of the transformer.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    known = {"Transformer", "Dense", *ignored}
    for module in modules:
        if module.kind not in known:
            raise ValueError(
                f"{folder / MODULES}: module {module.type} is not supported; supported: "
                f"{', '.join(sorted(known))}"
            )
    transformers = [m for m in modules if m.kind == "Transformer"]
    if len(transformers) != 1 or modules[0] is not transformers[0]:
        raise ValueError(
            f"{folder / MODULES}: expected one Transformer module, as the first module"
        )
    root = transformers[0].folder
    backbone = read_backbone(root / "config.json")
    dense = [m.folder for m in modules if m.kind == "Dense"]
    try:
        encoder = EncoderConfig(backbone, tuple(map(read_dense, dense)))
    except ValueError as error:
        raise ValueError(f"{folder / MODULES}: {error}") from None
    if dim is not None and dense and dim != encoder.dim:
        raise ValueError(f"{folder}: dim was given as {dim}, but the head gives {encoder.dim}")
    tensors = open_backbone(root, backbone)
    prefix = find_prefix(tensors, backbone)
    names = backbone_paths(backbone, prefix)
    refuse_unknown(tensors, backbone, names.values())
    sources = [(tensors, names)]
    for i, place in enumerate(dense):
        head, names = find_tensors(place), head_paths(encoder, i)
        extra = sorted(set(head.names()) - set(names.values()))
        if extra:
            raise ValueError(
                f"{head.file}: tensors that its config.json does not describe: {extra}"
            )
        sources.append((head, names))
    params = fill_params(encoder, sources)
    pooler = read_pooler(tensors, prefix)
    settings, transformer = read_settings(folder), transformer_settings(transformers[0])
    if settings or not (folder / SETTINGS).exists():  # {} sets nothing, as it says
        usual = (*_SETTINGS_TYPES, "model_type", "__version__")
        expect_any(folder / SETTINGS, settings, usual, "its settings are the defaults, no prompts")
    if transformer:
        expect_lengths(root, transformer)
    config = ColBERTConfig(metadata=_other_prompts(settings.get("prompts")))
    tokenizer = _read_tokenizer(root, backbone)
    checkpoint = Checkpoint(
        folder, encoder, config, tokenizer, params, pooler=pooler, weights=tensors.file
    )
    return checkpoint, transformer


def _read_tokenizer(folder: Path, backbone: BackboneConfig) -> ModelTokenizer:
    """The tokenizer, its padding token that of the encoder.

    PyLate saves [MASK] or the end of the sequence as the padding token, and other layouts would
    drop these as padding.
    """
    model = read_tokenizer(folder)
    special, padding = model.special, model.tokenizer.id_to_token(backbone.pad_token_id)
    fills = (special.get("mask_token"), special.get("eos_token"))
    if padding is None or special.get("pad_token") not in fills:
        return model
    return dataclasses.replace(model, special={**special, "pad_token": padding})


def read_dense(folder: Path) -> DenseConfig:
    """Read the configuration of a Dense module, with sentence-transformers' defaults."""
    file = folder / "config.json"
    fields = read_object(file)
    path = fields.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = str(path).rpartition(".")[2]
    if not str(path).startswith("torch.") or name not in HEAD_ACTIVATIONS:
        raise ValueError(
            f"{file}: activation_function {path!r} is not supported; supported: "
            f"{', '.join(_TORCH_CLASSES.values())}"
        )
    missing = [name for name in ("in_features", "out_features") if name not in fields]
    if missing:
        raise ValueError(f"{file}: missing fields: {', '.join(missing)}")
    try:
        return DenseConfig(
            fields["in_features"],
            fields["out_features"],
            bias=fields.get("bias", True),
            activation=name,
            residual=fields.get("use_residual", False),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def write_encoder(
    checkpoint: Checkpoint, folder: Path, dense_type: str, **extra: Any
) -> list[dict[str, str]]:
    """Write the weights of the transformer and of each dense module.

    A checkpoint without a head gets an identity projection: the originals would add a random one.

    Args:
      dense_type: class path of a dense module.
      **extra: more fields for the dense modules' configurations.

    Returns:
      the dense modules' entries for `modules.json`.
    """
    save_tensors(
        folder / SAFETENSORS, backbone_tensors(checkpoint, checkpoint.params, "", pooler=True)
    )
    checkpoint = with_head(checkpoint)
    entries = []
    for i, layer in enumerate(checkpoint.encoder.head):
        place = folder / f"{i + 1}_Dense"
        place.mkdir()
        fields = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias,
            "activation_function": _TORCH_CLASSES[layer.activation],
        }
        if layer.residual:
            fields["use_residual"] = True
        write_json(place / "config.json", fields | extra)
        names = head_paths(checkpoint.encoder, i)
        save_tensors(place / SAFETENSORS, tensors_of(checkpoint.params, names))
        entries.append({"path": place.name, "type": dense_type})
    return entries


def with_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint, with an identity projection if it has no head."""
    if checkpoint.encoder.head:
        return checkpoint
    backbone = checkpoint.encoder.backbone
    identity = np.eye(backbone.hidden_size, dtype=np.float32)
    return dataclasses.replace(
        checkpoint,
        encoder=EncoderConfig.projecting(backbone, backbone.hidden_size),
        params=checkpoint.params | {"head": {0: {"linear": {"kernel": identity}}}},
    )


def write_modules(folder: Path, entries: list[dict[str, str]]) -> None:
    """Write modules.json: the transformer in the root, then `entries`."""
    numbered = [{"idx": i, "name": str(i), **entry} for i, entry in enumerate(entries)]
    write_json(folder / MODULES, numbered)
