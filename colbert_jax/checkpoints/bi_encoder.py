"""Single-vector models: sentence-transformers folders with pooling, and plain encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints import huggingface, modules, single_vector
from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.checkpoints.modules import MODULES, SETTINGS, Module
from colbert_jax.checkpoints.sentence_transformers import longest_text
from colbert_jax.files import check_types, read_object
from colbert_jax.models.pooling import POOLINGS

# sentence-transformers 5 and before have one field for each way of pooling.
_OLD_FIELDS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class SingleVector:
    """How a checkpoint's token embeddings become one vector, and how two vectors are compared.

    pooling, normalized: as for `models.pooling.sentence_embeddings`.
    similarity: "cosine" or "dot".
    """

    pooling: str = "mean"
    normalized: bool = True
    similarity: str = "cosine"


def read(folder: Path) -> tuple[Checkpoint, SingleVector]:
    """Read a single-vector model of sentence-transformers, Dense modules as the head.

    Texts are cut to the folder's maximum length.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    listed, settings = modules.read_modules(folder), modules.read_settings(folder)
    checkpoint = single_vector.read(folder)
    kinds = [module.kind for module in listed if module.kind != "Dropout"]
    usual = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense")]
    if kinds not in (usual, [*usual, "Normalize"]):
        raise ValueError(
            f"{folder / MODULES}: modules {', '.join(kinds)} in this order are not supported; "
            "supported: Transformer, Pooling, then Dense modules and Normalize if any"
        )
    similarity = str(settings.get("similarity_fn_name") or "cosine").lower()
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"{folder / SETTINGS}: similarity_fn_name {similarity!r} is not supported; "
            f"supported: {', '.join(_SIMILARITIES)}"
        )
    text = checkpoint.config.text
    prompted = bool(text.query_prompt or text.doc_prompt)
    pooling = _read_pooling(listed, prompted)
    longest = longest_text(checkpoint, listed, modules.transformer_settings(listed[0]))
    checkpoint = checkpoint.with_text(query_maxlen=longest, doc_maxlen=longest)
    return checkpoint, SingleVector(pooling, "Normalize" in kinds, similarity)


def read_plain(folder: Path) -> tuple[Checkpoint, SingleVector]:
    """Read a plain encoder, to be pooled by the mean and normalised: its files have no setting.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    checkpoint = huggingface.read(folder)
    root = Module("", "Transformer", folder)
    longest = longest_text(checkpoint, [root], modules.transformer_settings(root))
    return checkpoint.with_text(query_maxlen=longest, doc_maxlen=longest), SingleVector()


def _read_pooling(listed: Sequence[Module], prompted: bool) -> str:
    folder = next(module.folder for module in listed if module.kind == "Pooling")
    file = folder / "config.json"
    fields: dict[str, Any] = read_object(file)
    check_types(file, fields, {"include_prompt": bool} | dict.fromkeys(_OLD_FIELDS, bool))
    named = fields.get("pooling_mode")
    if named is None:
        named = [name for field, name in _OLD_FIELDS.items() if fields.get(field)] or "mean"
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{file}: pooling {named!r} is not supported; supported: one of {', '.join(POOLINGS)}"
        )
    if prompted and fields.get("include_prompt") is False:
        raise ValueError(f"{file}: pooling without the prompt (include_prompt) is not supported")
    return modes[0]
