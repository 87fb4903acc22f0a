"""PyLate folders: `modules.json` with Dense modules, and PyLate's settings."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints.common import (
    Checkpoint,
    one_encoder,
    refuse_text,
    skipped_tokens,
    write_base,
)
from colbert_jax.checkpoints.modules import (
    MODULES,
    SETTINGS,
    has_modules,
    kept_settings,
    prompts_of,
    read_encoder,
    read_modules,
    read_settings,
    write_encoder,
    write_modules,
)
from colbert_jax.config import TextConfig
from colbert_jax.files import write_json
from colbert_jax.models.backbones import architecture
from colbert_jax.text import ModelTokenizer

_KEYS = (
    "query_prefix",
    "document_prefix",
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "skiplist_words",
)


def detect(folder: Path) -> bool:
    """Whether a folder of modules has PyLate's classes or any of its settings."""
    if not has_modules(folder):
        return False
    settings = read_settings(folder)
    return (
        settings.get("model_type") == "ColBERT"
        or any(module.type.startswith("pylate.") for module in read_modules(folder))
        or any(key in settings for key in _KEYS)
    )


def read(folder: Path, *, dim: int | None = None, **_: Any) -> Checkpoint:
    """Read a folder as PyLate does; arguments and errors as for `checkpoints.read_checkpoint`.

    Only transformer and Dense modules are used.
    """
    settings = read_settings(folder)
    used = [m for m in read_modules(folder) if m.kind in ("Transformer", "Dense")]
    checkpoint, transformer = read_encoder(folder, used, (), dim)
    try:
        text = read_text(settings, transformer, checkpoint.tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}") from None
    similarity = settings.get("similarity_fn_name") or "MaxSim"
    if similarity not in ("MaxSim", "maxsim"):
        raise ValueError(f"{folder / SETTINGS}: similarity_fn_name {similarity!r} is not MaxSim")
    if not checkpoint.encoder.head:
        raise ValueError(
            f"{folder / MODULES}: lists no Dense module, so PyLate would add a random projection"
        )
    return checkpoint.with_text_config(text)


def read_text(
    settings: dict[str, Any], transformer: dict[str, Any], tokenizer: ModelTokenizer
) -> TextConfig:
    """Read text settings, with PyLate's defaults for those that are absent or null.

    The prompt named "query" or "document" is put before every text, as PyLate does when called with
    that name; if there is none, the default prompt is.
    """

    def get(name: str, default: Any) -> Any:
        value = settings.get(name)
        return default if value is None else value

    markers: dict[str, Any] = {}
    for ours, theirs, usual in (
        ("query_token_id", "query_prefix", "[Q] "),
        ("doc_token_id", "document_prefix", "[D] "),
    ):
        prefix = get(theirs, usual)
        if prefix != "" and not tokenizer.has(prefix):
            raise ValueError(
                f"{theirs} {prefix!r} is not a token of the tokenizer; PyLate would add it with a "
                "random embedding. Save the model with PyLate first, or set it to an empty string"
            )
        markers[ours] = prefix or None
    expansion = get("do_query_expansion", True)
    unknown = tokenizer.special.get("unk_token")
    words = [
        word if tokenizer.has(word) else unknown  # so does convert_tokens_to_ids
        for word in get("skiplist_words", list(string.punctuation))
    ]
    return TextConfig(
        query_maxlen=get("query_length", 32),
        doc_maxlen=get("document_length", 180),
        query_expansion=expansion,
        attend_to_mask_tokens=expansion and get("attend_to_expansion_tokens", False),
        skiplist_words=tuple(dict.fromkeys(word for word in words if word is not None)),
        query_prompt=prompt(settings, "query"),
        doc_prompt=prompt(settings, "document"),
        strip=True,
        lowercase=bool(transformer.get("do_lower_case", False)),
        **markers,
    )


def prompt(settings: dict[str, Any], *names: str) -> str:
    """Return the first prompt with one of these names, else the default prompt, else "".

    Empty prompts are skipped: PyLate saves "query" and "document" as empty strings if none was set.
    """
    prompts = settings.get("prompts") or {}
    found = (prompts.get(name) for name in (*names, settings.get("default_prompt_name")))
    return next(filter(None, found), "")


kept = kept_settings


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that PyLate loads.

    Raises ValueError for a checkpoint that the layout cannot store: queries filled up to less than
    their maximum length, FLMR's instructions, a second encoder for queries.
    """
    one_encoder(checkpoint, "pylate")
    text = checkpoint.config.text
    supported = {f.name for f in dataclasses.fields(TextConfig)} - {
        "query_minlen",
        "skiplist_in_queries",
        "keep_only_token_ids",
        "mask_instruction_token",
        "pool_factor",
        "expansion_token",
    }
    refuse_text(text, supported | _harmless(checkpoint), "pylate")
    entries = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    entries += write_encoder(checkpoint, folder, "pylate.models.Dense.Dense")
    write_base(checkpoint, folder, [architecture(checkpoint.encoder.backbone).model_class])
    write_modules(folder, entries)
    write_json(
        folder / "sentence_bert_config.json",
        {
            "max_seq_length": text.doc_maxlen - (text.doc_token_id is not None),
            "do_lower_case": text.lowercase,
        },
    )
    write_json(
        folder / SETTINGS,
        {
            "model_type": "ColBERT",
            "prompts": prompts_of(text, checkpoint.config),
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": text.query_token_id or "",
            "document_prefix": text.doc_token_id or "",
            "query_length": text.query_maxlen,
            "document_length": text.doc_maxlen,
            "attend_to_expansion_tokens": text.attend_to_mask_tokens,
            "skiplist_words": skipped_tokens(checkpoint),
            "do_query_expansion": text.query_expansion,
        },
    )


def _harmless(checkpoint: Checkpoint) -> set[str]:
    """Settings that ask for what PyLate does anyway."""
    text, special = checkpoint.config.text, checkpoint.tokenizer.special
    harmless = set()
    if text.query_minlen == text.query_maxlen:
        harmless.add("query_minlen")
    if text.expansion_token == special.get("mask_token", special.get("eos_token")):
        harmless.add("expansion_token")
    return harmless
