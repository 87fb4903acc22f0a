"""Read a model's tokenizer from any files that Hugging Face tokenizers come in, and write it.

In memory it is one `tokenizers.Tokenizer` and the names of its special tokens; on disk
`tokenizer.json` and the two settings files that transformers reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from colbert_jax.checkpoints.warn import expect_any
from colbert_jax.files import present, read_json, read_object, write_json
from colbert_jax.text import ROLES, ModelTokenizer, without_padding

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
_OTHER_FILES = (
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
# What transformers reads beside one of these.
_BESIDE = ("merges.txt", "added_tokens.json", "config.json")
# Tokenizer classes whose vocab.txt is WordPiece with BERT's special tokens.
_WORDPIECE = ("Bert", "DistilBert", "Electra", "FLMR")
_CASE = ("do_lower_case", "tokenizer_class")
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SIDES = ("right", "left")


def read_tokenizer(folder: Path) -> ModelTokenizer:
    """Read `tokenizer.json`, else `vocab.txt`, else any files that transformers can read.

    Raises:
      ValueError: naming the file that is missing or damaged.
    """
    settings: dict[str, Any] = {}
    origin: dict[str, Path] = {}  # of each setting
    for name in _SETTINGS:
        if present(folder / name):
            fields = read_object(folder / name)
            settings |= fields
            origin |= dict.fromkeys(fields, folder / name)
    file, tokenizer = _read(folder, settings)
    tokenizer = without_padding(tokenizer)
    if file.name == "vocab.txt":
        config = folder / "tokenizer_config.json"
        expect_any(config, settings, _CASE, "texts become lower case, as for BERT's uncased models")
    side = settings.get("truncation_side") or "right"
    if side not in _SIDES:
        raise ValueError(f"{origin['truncation_side']}: truncation_side must be one of {_SIDES}")
    return ModelTokenizer(tokenizer, _special_tokens(origin, tokenizer, settings), side, file)


def write_tokenizer(
    folder: Path, model: ModelTokenizer, *, max_length: int, inputs: tuple[str, ...], **extra: Any
) -> bool:
    """Write the files that transformers 4 and 5 read with AutoTokenizer.

    Args:
      max_length: the longest input of the encoder.
      inputs: arguments of the encoder's forward, such as "input_ids" and "attention_mask".
      **extra: further fields of `tokenizer_config.json`.

    Returns:
      whether a `vocab.txt` was written, see `write_vocabulary`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", model.special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": list(inputs),
        "truncation_side": model.truncation_side,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | model.special | extra)
    return write_vocabulary(folder, model)


def write_vocabulary(folder: Path, model: ModelTokenizer) -> bool:
    """Write a WordPiece vocabulary as `vocab.txt`.

    Returns:
      False, writing nothing, if the vocabulary is not WordPiece or its ids have gaps.
    """
    fields = json.loads(model.tokenizer.to_str())["model"]
    if fields["type"] != "WordPiece":
        return False
    words = sorted(fields["vocab"], key=fields["vocab"].__getitem__)
    if sorted(fields["vocab"].values()) != list(range(len(words))):
        return False  # a line number is an id: it cannot have gaps
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return True


def _read(folder: Path, settings: dict[str, Any]) -> tuple[Path, tokenizers.Tokenizer]:
    """The file that was read, or the folder, and the tokenizer."""
    file = folder / "tokenizer.json"
    try:
        if present(file):
            return file, _follow_settings(tokenizers.Tokenizer.from_file(str(file)), settings)
        file = folder / "vocab.txt"
        family = str(settings.get("tokenizer_class") or "")
        if present(file) and (not family or family.startswith(_WORDPIECE)):
            return file, _add_tokens(_wordpiece(file, settings), folder, settings)
    except ValueError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{file}: not a readable tokenizer file: {error}") from error
    return folder, _read_with_transformers(folder)


def _wordpiece(file: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer around a `vocab.txt`."""
    wordpiece = tokenizers.BertWordPieceTokenizer(
        str(file),
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())


def _follow_settings(
    tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Let settings overrule tokenizer.json as transformers does.

    For BERT's classes the settings, and their defaults, overrule the file; generic classes follow
    the file alone.
    """
    family, normalizer = str(settings.get("tokenizer_class") or ""), tokenizer.normalizer
    named = family.startswith(_WORDPIECE)
    if (family and not named) or not isinstance(normalizer, normalizers.BertNormalizer):
        return tokenizer
    for ours, theirs, default in (
        ("lowercase", "do_lower_case", True),
        ("strip_accents", "strip_accents", None),
        ("handle_chinese_chars", "tokenize_chinese_chars", True),
    ):
        if named or theirs in settings:
            setattr(normalizer, ours, settings.get(theirs, default))
    tokenizer.normalizer = normalizer
    return tokenizer


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Add the tokens that the settings list beside a `vocab.txt`, with their ids."""
    try:
        added = {int(i): t for i, t in (settings.get("added_tokens_decoder") or {}).items()}
    except (ValueError, AttributeError):
        raise ValueError(f"{folder}: added_tokens_decoder must map ids to tokens") from None
    if present(folder / "added_tokens.json"):
        for content, i in read_json(folder / "added_tokens.json").items():
            added.setdefault(int(i), {"content": content, "special": True})
    for i, token in sorted(added.items()):
        flags = {
            key: token[key]
            for key in ("lstrip", "rstrip", "single_word", "normalized", "special")
            if key in token
        }
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != i:
            raise ValueError(
                f"{folder}: added token {token['content']!r} should have id {i}, but the "
                f"vocabulary puts it at {tokenizer.token_to_id(token['content'])}"
            )
    return tokenizer


def _read_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    found = [name for name in (*_OTHER_FILES, *_BESIDE) if present(folder / name)]
    if not any(name in _OTHER_FILES for name in found):
        raise ValueError(f"{folder}: no tokenizer: tokenizer.json and vocab.txt are missing")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"{folder}: there is no tokenizer.json, and transformers could not read "
            f"{', '.join(found)}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def _special_tokens(
    origin: dict[str, Path], tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]
) -> dict[str, str]:
    """Role -> token: from the settings, else BERT's or RoBERTa's name if it is a token."""
    usual: dict[str, tuple[str, ...]] = {
        role: (f"[{role[:-6].upper()}]", f"<{role[:-6]}>") for role in ROLES
    }
    if settings.get("tokenizer_class") in _GENERIC:
        usual["mask_token"] = ()  # these classes have a [MASK] only if the settings name it
    found = {}
    for role in ROLES:
        value = settings.get(role)
        if isinstance(value, dict):  # an added token written out as an object
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{origin[role]}: {role} must be a string, got {value!r:.80}")
        if not value:
            known = [t for t in usual[role] if tokenizer.token_to_id(t) is not None]
            value = known[0] if known else None
        if value:
            found[role] = value
    return found
