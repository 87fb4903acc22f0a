"""sentence-transformers folders of multi-vector models: `MultiVectorEncoder` (version 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from colbert_jax.checkpoints.common import (
    Checkpoint,
    one_encoder,
    refuse_text,
    skipped_tokens,
    write_base,
)
from colbert_jax.checkpoints.modules import (
    LENGTHS,
    MODULES,
    SETTINGS,
    Module,
    expect_lengths,
    has_modules,
    kept_settings,
    prompts_of,
    read_encoder,
    read_modules,
    read_settings,
    write_encoder,
    write_modules,
)
from colbert_jax.checkpoints.warn import expect_any
from colbert_jax.config import ColBERTConfig, TextConfig, check_pooling
from colbert_jax.files import check_types, present, read_object, write_json
from colbert_jax.models.backbones import architecture
from colbert_jax.text import ModelTokenizer, TextTokenizer

_MASK, _NORMALIZE, _POOLING = "MultiVectorMask", "Normalize", "HierarchicalTokenPooling"
_DENSE_TYPE = "sentence_transformers.base.modules.dense.Dense"
_MASK_TYPES = {"skiplist_words": [str], "keep_only_token_ids": [int]}
_POOLING_TYPES = {
    "pool_factor": (int, float),
    "num_protected_tokens": int,
    "normalize_embeddings": bool,
}
_SIMILARITIES = ("maxsim", "meanmaxsim")
_PACKAGE = "sentence_transformers"
# Texts that markers and prompts are compared on. None has space around it: PyLate strips it and
# sentence-transformers does not.
_TRIALS = ("What is it?", "Überall, naïve co-operation (2nd) 日本", "a " * 2000)


def detect(folder: Path) -> bool:
    """Whether a folder of modules is a MultiVectorEncoder."""
    if not has_modules(folder):
        return False
    named = read_settings(folder).get("model_type") == "MultiVectorEncoder"
    return named or any(module.kind == _MASK for module in read_modules(folder))


def read(folder: Path, *, dim: int | None = None, **_: Any) -> Checkpoint:
    """Read a folder; arguments and errors as for `checkpoints.read_checkpoint`."""
    modules, settings = read_modules(folder), read_settings(folder)
    where = folder / MODULES
    kinds = [module.kind for module in modules]
    normalized = _NORMALIZE in kinds
    if normalized and kinds.index(_NORMALIZE) < max(
        (i for i, k in enumerate(kinds) if k == "Dense"), default=0
    ):
        raise ValueError(f"{where}: Normalize before a Dense module is not supported")
    similarity = str(settings.get("similarity_fn_name") or "maxsim").lower()
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"{folder / SETTINGS}: similarity_fn_name {similarity!r} is not supported; "
            f"supported: {', '.join(map(repr, _SIMILARITIES))}"
        )
    mask: dict[str, Any] = {}
    pooling: dict[str, Any] = {}
    for module in modules:
        if module.kind == _MASK:
            mask = read_object(module.folder / "config.json")
            check_types(module.folder / "config.json", mask, _MASK_TYPES)
            expect_any(
                module.folder / "config.json",
                mask,
                (*_MASK_TYPES, "skiplist_tasks"),
                "documents keep every token",
            )
        elif module.kind == _POOLING:
            if pooling or not normalized or kinds.index(_POOLING) < kinds.index(_NORMALIZE):
                raise ValueError(f"{where}: expected one {_POOLING}, after {_NORMALIZE}")
            pooling = _read_pooling(module.folder / "config.json")
    ignored = (_MASK, _NORMALIZE, _POOLING, "Dropout")
    checkpoint, transformer = read_encoder(folder, modules, ignored, dim)
    if not transformer:
        expect_lengths(modules[0].folder, transformer)
    tokenizer = checkpoint.tokenizer
    if transformer.get("do_lower_case"):
        tokenizer = dataclasses.replace(tokenizer, tokenizer=_lowercasing(tokenizer.tokenizer))
    longest = longest_text(checkpoint, modules, transformer)
    lengths = modules[0].folder / LENGTHS
    try:
        text = read_text(settings, transformer, mask, tokenizer, longest)
        text = dataclasses.replace(text, **pooling)
    except ValueError as error:
        raise ValueError(f"{lengths}: {error}") from None
    checkpoint = dataclasses.replace(
        checkpoint,
        tokenizer=tokenizer,
        encoder=dataclasses.replace(checkpoint.encoder, normalized=normalized),
        config=dataclasses.replace(checkpoint.config, text=text, interaction=similarity),
    )
    positions = checkpoint.encoder.backbone.max_length
    for name in ("query_maxlen", "doc_maxlen"):
        if getattr(text, name) > positions:
            raise ValueError(
                f"{lengths}: {name} is {getattr(text, name)}, the encoder has {positions} positions"
            )
    try:
        return prompts_as_markers(checkpoint)
    except ValueError as error:
        raise ValueError(f"{tokenizer.file}: {error}") from None


def _read_pooling(file: Path) -> dict[str, Any]:
    """The fields of `TextConfig` that a HierarchicalTokenPooling module holds."""
    fields = read_object(file)
    check_types(file, fields, _POOLING_TYPES)
    tasks = fields.get("tasks", ["document"])
    if tasks not in ("document", ["document"]):
        raise ValueError(f"{file}: tasks {tasks!r} is not supported; supported: ['document']")
    read = {
        "pool_factor": fields.get("pool_factor", 1.0),
        "pool_protected": fields.get("num_protected_tokens", 1),
        "pool_normalize": fields.get("normalize_embeddings", False),
    }
    try:
        check_pooling(read["pool_factor"], read["pool_protected"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    # At 1 nothing is pooled, and embeddings have unit length already.
    return read if read["pool_factor"] > 1 else {}


def read_text(
    settings: dict[str, Any],
    transformer: dict[str, Any],
    mask: dict[str, Any],
    tokenizer: ModelTokenizer,
    longest: int,
) -> TextConfig:
    """Read text settings; markers stay part of the prompts (see `prompts_as_markers`)."""
    expansion = transformer.get("query_expansion") or {}
    query_length = transformer.get("query_length")
    floor: int | None = None
    if expansion:
        floor, strategy = expansion.get("length"), expansion.get("strategy")
        if strategy not in ("fixed", "min") or not isinstance(floor, int):
            raise ValueError(
                "query_expansion must have strategy 'fixed' or 'min' and an int length, got "
                f"{expansion!r}"
            )
        query_length = floor if strategy == "fixed" else max(query_length or longest, floor)
        floor = None if strategy == "fixed" else floor
    tasks = mask.get("skiplist_tasks")
    tasks = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    words = [word for word in mask.get("skiplist_words") or () if tokenizer.has(word)]
    named = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
    if not named or (words and tasks == ["query"]):
        raise ValueError(f"skiplist_tasks {tasks!r} of MultiVectorMask is not supported")
    words = words if "document" in tasks else []
    keep = mask.get("keep_only_token_ids")
    return TextConfig(
        query_maxlen=query_length or longest,
        doc_maxlen=transformer.get("document_length") or longest,
        query_token_id=None,
        doc_token_id=None,
        query_expansion=bool(expansion),
        query_minlen=floor,
        attend_to_mask_tokens=bool(expansion.get("attend", False)),
        expansion_token=expansion.get("token"),
        skiplist_words=tuple(words),
        skiplist_in_queries="query" in tasks,
        keep_only_token_ids=None if not keep else tuple(keep),
        query_prompt=prompt(settings, "query"),
        doc_prompt=prompt(settings, "document"),
    )


def prompt(settings: dict[str, Any], name: str) -> str:
    """Return the prompt of this name, or an empty one.

    sentence-transformers fills in an empty prompt where there is none, so its default prompt and
    its "passage" never reach `encode_query` and `encode_document`.
    """
    return (settings.get("prompts") or {}).get(name) or ""


def longest_text(
    checkpoint: Checkpoint, modules: Sequence[Module], transformer: dict[str, Any]
) -> int:
    """Return the maximum length for texts, in tokens, at most the positions of the encoder.

    It is the transformer's setting, else the tokenizer's, else all positions.
    """
    positions = checkpoint.encoder.backbone.max_length
    given = transformer.get("max_seq_length")
    file = modules[0].folder / "tokenizer_config.json"
    if given is None and present(file):
        fields = read_object(file)
        check_types(file, fields, {"model_max_length": (int, float)})
        given = fields.get("model_max_length")
    return positions if given is None else int(min(given, positions))


def _lowercasing(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Lowercase before the model's normalizer, so that added tokens keep their case."""
    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def kept(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: those of texts, prompts, and MaxSim or its mean."""
    interaction = config.interaction if config.interaction in _SIMILARITIES else "maxsim"
    return dataclasses.replace(kept_settings(config), interaction=interaction)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that sentence-transformers 6 loads as a MultiVectorEncoder.

    Markers become prompts: a marker is registered as a special token and put before the text.

    Raises ValueError for a checkpoint that the layout cannot store: FLMR's instructions, a second
    encoder for queries, a marker that gives other tokens when it is put before the text.
    """
    one_encoder(checkpoint, "sentence-transformers")
    text = checkpoint.config.text
    supported = {f.name for f in dataclasses.fields(TextConfig)} - {"mask_instruction_token"}
    refuse_text(text, supported, "sentence-transformers")
    words = skipped_tokens(checkpoint)
    prompted = markers_as_prompts(checkpoint)
    entries = [{"path": "", "type": f"{_PACKAGE}.base.modules.transformer.Transformer"}]
    entries += write_encoder(
        prompted,
        folder,
        _DENSE_TYPE,
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
    )
    tasks = ["query", "document"] if text.skiplist_in_queries else ["document"]
    keep = text.keep_only_token_ids
    for kind, place, fields in (
        (
            f"{_PACKAGE}.multi_vector_encoder.modules.multi_vector_mask.{_MASK}",
            f"{len(entries)}_{_MASK}",
            {
                "skiplist_words": words,
                "skiplist_tasks": tasks,
                "keep_only_token_ids": None if keep is None else list(keep),
            },
        ),
        (
            f"{_PACKAGE}.base.modules.normalize.{_NORMALIZE}",
            f"{len(entries) + 1}_{_NORMALIZE}",
            {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"},
        ),
        (
            f"{_PACKAGE}.multi_vector_encoder.modules.token_pooling.{_POOLING}",
            f"{len(entries) + 2}_{_POOLING}",
            {
                "pool_factor": text.pool_factor,
                "num_protected_tokens": text.pool_protected,
                "normalize_embeddings": text.pool_normalize,
                "tasks": ["document"],
            },
        ),
    ):
        if kind.endswith(_POOLING) and text.pool_factor == 1:
            continue
        if kind.endswith(_NORMALIZE) and not checkpoint.encoder.normalized:
            continue
        (folder / place).mkdir()
        write_json(folder / place / "config.json", fields)
        entries.append({"path": place, "type": kind})
    model_class = architecture(checkpoint.encoder.backbone).model_class
    write_base(prompted, folder, [model_class])
    write_modules(folder, entries)
    embeddings = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": embeddings},
        "module_output_name": "token_embeddings",
        "document_length": text.doc_maxlen,
    }
    if text.query_expansion:
        floor = text.query_minlen or text.query_maxlen
        fixed = floor == text.query_maxlen
        settings["query_expansion"] = {
            "strategy": "fixed" if fixed else "min",
            "attend": text.attend_to_mask_tokens,
            "token": text.expansion_token,
            "length": floor,
        }
    settings["query_length"] = text.query_maxlen
    write_json(folder / LENGTHS, settings)
    write_json(
        folder / SETTINGS,
        {
            "model_type": "MultiVectorEncoder",
            "prompts": prompts_of(prompted.config.text, checkpoint.config),
            "default_prompt_name": None,
            "similarity_fn_name": kept(checkpoint.config).interaction,
        },
    )


def markers_as_prompts(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with each marker turned into text before the prompt.

    Raises ValueError if that gives other token ids for one of a few texts.
    """
    text = checkpoint.config.text
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer.to_str())
    markers = [m for m in (text.query_token_id, text.doc_token_id) if m is not None]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(m, normalized=False, special=True) for m in dict.fromkeys(markers)]
    )
    if text.lowercase:
        tokenizer = _lowercasing(tokenizer)
    changed = dataclasses.replace(
        text,
        query_token_id=None,
        doc_token_id=None,
        query_prompt=(text.query_token_id or "") + text.query_prompt,
        doc_prompt=(text.doc_token_id or "") + text.doc_prompt,
        lowercase=False,
        strip=False,
    )
    model = dataclasses.replace(checkpoint.tokenizer, tokenizer=tokenizer)
    after = dataclasses.replace(checkpoint, tokenizer=model).with_text_config(changed)
    if (trial := _differing(checkpoint, after, _TRIALS)) is not None:
        raise ValueError(
            "the sentence-transformers layout puts markers before the text; with this tokenizer "
            f"that gives other tokens for {trial[:40]!r}"
        )
    return after


def prompts_as_markers(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the added token at the start of each prompt turned into a marker.

    The other layouts have markers. Nothing is changed if that would give other token ids.
    """
    text = checkpoint.config.text
    added = checkpoint.tokenizer.tokenizer.get_added_tokens_decoder().values()
    tokens = sorted((token.content for token in added), key=len, reverse=True)

    def split(prompt: str) -> tuple[str | None, str]:
        marker = next((token for token in tokens if token and prompt.startswith(token)), None)
        rest = prompt[len(marker or "") :]
        return marker, rest if rest.strip() else ""

    (query, query_rest), (doc, doc_rest) = split(text.query_prompt), split(text.doc_prompt)
    if query is None and doc is None:
        return checkpoint
    try:
        after = checkpoint.with_text(
            query_token_id=query, query_prompt=query_rest, doc_token_id=doc, doc_prompt=doc_rest
        )
    except ValueError:  # too short for a marker
        return checkpoint
    exact = _differing(checkpoint, after, (*_TRIALS, "", " b")) is None
    return after if exact else checkpoint


def _differing(before: Checkpoint, after: Checkpoint, texts: Sequence[str]) -> str | None:
    """The first text for which the two give different token ids, or None."""
    old, new = (TextTokenizer(c.tokenizer, c.config.text) for c in (before, after))
    for trial in texts:
        for kind in ("queries", "documents"):
            ids = [getattr(t, kind)([trial]).ids[0].tolist() for t in (old, new)]
            if ids[0] != ids[1]:
                return trial
    return None
