"""Queries and documents to token ids, as Stanford ColBERT makes them.

A query is `[CLS] marker tokens [SEP]`, filled up with [MASK] to `query_maxlen` (query expansion); a
document is `[CLS] marker tokens [SEP]`, at most `doc_maxlen` long. Both are cut from the right.
Rows stay ragged here: padding to a static shape is `batching`'s business.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from colbert_jax.config import TextConfig
from colbert_jax.files import read_json

_FILES = ("tokenizer.json", "vocab.txt")
_OTHER_FILES = ("vocab.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")


class TokenIds(NamedTuple):
    """Token ids of a list of texts.

    ids: one int32 array per text, the rows the encoder sees.
    attended: [N] how many leading rows take part in attention (the rest are [MASK] expansion).
    """

    ids: list[np.ndarray]
    attended: np.ndarray


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens and the markers; a marker that is not used is None."""

    pad: int
    mask: int
    query_marker: int | None
    doc_marker: int | None


class TextTokenizer:
    """Tokenizer of one model: `queries` and `documents` turn texts into token ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, names: dict[str, str], config: TextConfig):
        """
        Args:
          tokenizer: the model's tokenizer, whose post-processor adds [CLS] and [SEP].
          names: the strings of `pad_token` and `mask_token`.
          config: lengths, markers, expansion.
        """
        self.config = config
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        # Tells vocabularies apart.
        self.fingerprint = hashlib.sha256(
            json.dumps(sorted(vocabulary.items())).encode()
        ).hexdigest()
        self.special = SpecialTokens(
            pad=_token_id(tokenizer, names["pad_token"], "pad_token"),
            mask=_token_id(tokenizer, names["mask_token"], "mask_token"),
            query_marker=_marker_id(tokenizer, config.query_token_id, "query_token_id"),
            doc_marker=_marker_id(tokenizer, config.doc_token_id, "doc_token_id"),
        )
        # Two copies, since truncation is a state of the tokenizer. A marker takes one place.
        self._query = _truncating(tokenizer, config.query_maxlen, self.special.query_marker)
        self._doc = _truncating(tokenizer, config.doc_maxlen, self.special.doc_marker)
        if len(self._doc.encode("").ids) != 2:
            raise ValueError("the tokenizer does not put [CLS] before a text and [SEP] behind it")
        # [V] True where a document's token is dropped from the output.
        self.skiplist = np.zeros(self.vocab_size, bool)
        self.skiplist[self.special.pad] = True
        if config.mask_punctuation:
            for char in string.punctuation:
                self.skiplist[tokenizer.encode(char, add_special_tokens=False).ids[0]] = True

    @classmethod
    def from_folder(cls, folder: Path, config: TextConfig) -> TextTokenizer:
        """Read `tokenizer.json`, else `vocab.txt`, else whatever transformers can read."""
        return cls(*_read_folder(folder), config)

    def queries(self, texts: Sequence[str]) -> TokenIds:
        """Token ids of queries; with query expansion every row has `query_maxlen` of them."""
        rows = self._encode(self._query, texts, self.special.query_marker, "query")
        attended = np.fromiter(map(len, rows), np.int32, len(rows))
        if self.config.query_expansion:
            width = self.config.query_maxlen
            filled = np.full((len(rows), width), self.special.mask, np.int32)
            for row, ids in zip(filled, rows, strict=True):
                row[: len(ids)] = ids
            rows = list(filled)
            if self.config.attend_to_mask_tokens:
                attended = np.full(len(rows), width, np.int32)
        return TokenIds(rows, attended)

    def documents(self, texts: Sequence[str]) -> TokenIds:
        """Token ids of documents, each at most `doc_maxlen` long."""
        rows = self._encode(self._doc, texts, self.special.doc_marker, "document")
        return TokenIds(rows, np.fromiter(map(len, rows), np.int32, len(rows)))

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """Which rows of a document's ids become token embeddings: bool of the same shape."""
        return ~self.skiplist[ids]

    def labels(self, text: str, *, is_query: bool) -> list[str]:
        """A readable word for every row of the output: the source word of each token.

        Rows of one word share its label. [CLS], [SEP], the marker ("[Q]", "[D]") and [MASK] are
        labelled as such; rows that a document drops are left out.
        """
        tokenizer = self._query if is_query else self._doc
        marker = self.special.query_marker if is_query else self.special.doc_marker
        encoding = tokenizer.encode(text)
        labels = list(encoding.tokens)
        for i, word in enumerate(encoding.word_ids):
            if word is not None:
                spans = [
                    s for s, w in zip(encoding.offsets, encoding.word_ids, strict=True) if w == word
                ]
                labels[i] = text[spans[0][0] : spans[-1][1]]
        ids = list(encoding.ids)
        if marker is not None:
            labels.insert(1, "[Q]" if is_query else "[D]")
            ids.insert(1, marker)
        if not is_query:
            return [
                label for label, keep in zip(labels, self.kept(np.array(ids)), strict=True) if keep
            ]
        if self.config.query_expansion:
            labels += ["[MASK]"] * (self.config.query_maxlen - len(labels))
        return labels

    def _encode(
        self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str], marker: int | None, kind: str
    ) -> list[np.ndarray]:
        try:
            encodings = tokenizer.encode_batch_fast(list(texts))
        except (TypeError, UnicodeEncodeError) as error:
            raise _bad_text(texts, kind) from error
        rows = []
        for encoding in encodings:
            ids = encoding.ids
            if marker is not None:
                ids.insert(1, marker)
            rows.append(np.array(ids, np.int32))
        return rows


def as_texts(texts: str | Sequence[str], kind: str) -> list[str]:
    """A list of strings from what the caller passed; one string is a list of one."""
    if isinstance(texts, str):
        return [texts]
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise _bad_text(texts, kind)
    return texts


def _bad_text(texts: Sequence[Any], kind: str) -> Exception:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            return TypeError(f"{kind} {i} must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return ValueError(
                f"{kind} {i} is not valid Unicode: character {error.start} is a lone surrogate; "
                "decode the bytes with errors='replace'"
            )
    return RuntimeError(f"the tokenizer could not encode the {kind} batch")


def _token_id(tokenizer: tokenizers.Tokenizer, token: str, role: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"{role} {token!r} is not in the tokenizer's vocabulary")
    return token_id


def _marker_id(tokenizer: tokenizers.Tokenizer, marker: str | None, role: str) -> int | None:
    if marker is None:
        return None
    try:
        return _token_id(tokenizer, marker, role)
    except ValueError as error:
        raise ValueError(f"{error}: name another marker, or None for no marker") from None


def _truncating(
    tokenizer: tokenizers.Tokenizer, maxlen: int, marker: int | None
) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()  # published tokenizer files often have padding and truncation switched on
    copy.enable_truncation(max_length=maxlen - (marker is not None))
    return copy


def _read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            fields = read_json(file)
            if not isinstance(fields, dict):
                raise ValueError(f"{file}: expected a JSON object")
            settings |= fields
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    for key in names:
        value = settings.get(key)
        if isinstance(value, dict):  # an added token written out as an object
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{folder}: {key} of the tokenizer must be a string, got {value!r}")
        names[key] = value or names[key]
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file)), names
        file = folder / "vocab.txt"
        if file.is_file():
            lower = settings.get("do_lower_case", True)
            wordpiece = tokenizers.BertWordPieceTokenizer(str(file), lowercase=lower)
            return tokenizers.Tokenizer.from_str(wordpiece.to_str()), names
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{file}: not a readable tokenizer file: {error}") from error
    return _read_with_transformers(folder), names


def _read_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    if not any((folder / name).is_file() for name in _OTHER_FILES):
        raise ValueError(f"{folder}: no tokenizer: neither {' nor '.join(_FILES)} is there")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True).backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"{folder}: transformers could not read the tokenizer files that are there: {error}"
        ) from error
