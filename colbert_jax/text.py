"""Queries and documents to token ids, as the checkpoint's own library makes them.

A query is `[CLS] marker tokens [SEP]`, filled up with [MASK] (query expansion); a document is
`[CLS] marker tokens [SEP]`. Both are cut to their maximum length. Rows stay ragged here: padding to
a static shape is `batching`'s business.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from colbert_jax.config import TextConfig

ROLES = ("pad_token", "mask_token", "cls_token", "sep_token", "unk_token", "bos_token", "eos_token")


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a checkpoint.

    special: role ("pad_token", ...) -> token, for the roles that the model has.
    truncation_side: "right" or "left".
    """

    tokenizer: tokenizers.Tokenizer
    special: dict[str, str]
    truncation_side: str = "right"

    def has(self, token: str | None) -> bool:
        return token is not None and self.tokenizer.token_to_id(token) is not None

    def to_json(self) -> dict[str, Any]:
        """One JSON object that `from_json` reads."""
        return {
            "special_tokens": self.special,
            "truncation_side": self.truncation_side,
            "tokenizer": json.loads(self.tokenizer.to_str()),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelTokenizer:
        special = fields["special_tokens"]
        if not isinstance(special, dict) or not all(isinstance(t, str) for t in special.values()):
            raise ValueError(f"special_tokens must be roles with tokens, got {special!r:.80}")
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields["tokenizer"]))
        return cls(without_padding(tokenizer), fields["special_tokens"], fields["truncation_side"])


def without_padding(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with padding and truncation switched off: published files often have them on,
    and `TextTokenizer` does both itself."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TokenIds(NamedTuple):
    """Token ids of a list of texts.

    ids: one int32 array per text, the rows the encoder sees.
    attended: [N] how many leading rows take part in attention (the rest are [MASK] expansion).
    """

    ids: list[np.ndarray]
    attended: np.ndarray


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens and the markers; what is not used is None."""

    pad: int
    expansion: int | None
    query_marker: int | None
    doc_marker: int | None
    instruction: int | None


class TextTokenizer:
    """Tokenizer of one model: `queries` and `documents` turn texts into token ids."""

    def __init__(self, model: ModelTokenizer, config: TextConfig):
        """
        Args:
          model: the tokenizer, whose post-processor adds [CLS] and [SEP].
          config: lengths, markers, expansion, what is dropped.
        """
        self.config = config
        self._tokenizer, self._side = model.tokenizer, model.truncation_side
        self._roles = model.special
        vocabulary = model.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.special = SpecialTokens(
            pad=self._special(model, "pad_token"),
            expansion=self._expansion(model) if config.query_expansion else None,
            query_marker=self._marker(config.query_token_id, "query_token_id"),
            doc_marker=self._marker(config.doc_token_id, "doc_token_id"),
            instruction=self._marker(config.mask_instruction_token, "mask_instruction_token"),
        )
        if len(self._tokenizer.encode("").ids) != 2:
            raise ValueError("the tokenizer does not put [CLS] before a text and [SEP] behind it")
        # [V] True where a document's token is dropped from the output.
        self.skiplist = self._skiplist()

    @cached_property
    def fingerprint(self) -> str:
        """Tells vocabularies apart."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    def translation(self, other: TextTokenizer) -> np.ndarray | None:
        """The ids that another tokenizer has for the pieces of this one, by id: int32[V].

        Special tokens are matched by their role: [CLS] may be <s> there. None: all are the same.

        Raises:
          ValueError: a piece that the other vocabulary does not have.
        """
        if self.fingerprint == other.fingerprint and self._roles == other._roles:
            return None
        ours = self._tokenizer.get_vocab(with_added_tokens=True)
        theirs = other._tokenizer.get_vocab(with_added_tokens=True)
        special = {t: other._roles[role] for role, t in self._roles.items() if role in other._roles}
        lacking = sorted(piece for piece in ours if special.get(piece, piece) not in theirs)
        if lacking:
            raise ValueError(
                f"the other vocabulary lacks {len(lacking)} of {len(ours)} pieces: "
                f"{', '.join(map(repr, lacking[:5]))}{', ...' if len(lacking) > 5 else ''}"
            )
        ids = np.zeros(self.vocab_size, np.int32)
        for piece, token_id in ours.items():
            ids[token_id] = theirs[special.get(piece, piece)]
        return ids

    def queries(self, texts: Sequence[str]) -> TokenIds:
        """Token ids of queries; with query expansion every row has `query_minlen` at least."""
        config = self.config
        rows = self._encode(texts, is_query=True)
        attended = np.fromiter(map(len, rows), np.int32, len(rows))
        if config.query_expansion:
            floor = config.query_minlen or config.query_maxlen
            for i, row in enumerate(rows):
                if config.skiplist_words is None:  # Stanford's: padding in the text is [MASK] too
                    row[row == self.special.pad] = self.special.expansion
                fill = np.full(max(floor - len(row), 0), self.special.expansion, np.int32)
                rows[i] = np.concatenate([row, fill])
            if config.attend_to_mask_tokens:
                attended = np.fromiter(map(len, rows), np.int32, len(rows))
        return TokenIds(rows, attended)

    def documents(self, texts: Sequence[str]) -> TokenIds:
        """Token ids of documents, each at most `doc_maxlen` long."""
        rows = self._encode(texts, is_query=False)
        return TokenIds(rows, np.fromiter(map(len, rows), np.int32, len(rows)))

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """Which rows of a document's ids become token embeddings: bool of the same shape."""
        return ~self.skiplist[ids]

    def kept_in_query(self, ids: np.ndarray) -> np.ndarray:
        """Which rows of queries count: bool of ids' shape, [L] or [B, L].

        All of them, except with `skiplist_in_queries`, and with `mask_instruction_token`: then the
        tokens behind the marker up to and including the first such token are left out (FLMR: they
        are an instruction, not the question).
        """
        kept = np.ones(ids.shape, bool)
        if self.config.skiplist_in_queries:
            kept &= ~self.skiplist[ids]
        if self.special.instruction is not None:
            kept &= outside_instruction(ids, self.special.instruction)
        return kept

    def labels(self, text: str, *, is_query: bool) -> list[str]:
        """A readable word for every row of the output: the source word of each token.

        Rows of one word share its label. [CLS], [SEP], the marker ("[Q]", "[D]") and [MASK] are
        labelled as such; rows that are dropped are left out.
        """
        row = self.queries([text]).ids[0] if is_query else self.documents([text]).ids[0]
        text = self._prepare(text, is_query)
        encoding = self._tokenizer.encode(text)
        labels = list(encoding.tokens)
        for i, word in enumerate(encoding.word_ids):
            if word is not None:
                spans = [
                    s for s, w in zip(encoding.offsets, encoding.word_ids, strict=True) if w == word
                ]
                labels[i] = text[spans[0][0] : spans[-1][1]]
        marker, limit = self._role(is_query)
        labels = self._cut(labels, limit)
        if marker is not None:
            labels.insert(1, "[Q]" if is_query else "[D]")
        labels += ["[MASK]"] * (len(row) - len(labels))
        kept = self.kept_in_query(row) if is_query else self.kept(row)
        return [label for label, keep in zip(labels, kept, strict=True) if keep]

    def _role(self, is_query: bool) -> tuple[int | None, int]:
        """The marker, and how many tokens the tokenizer may give so that it has a place."""
        if is_query:
            marker, limit = self.special.query_marker, self.config.query_maxlen
        else:
            marker, limit = self.special.doc_marker, self.config.doc_maxlen
        return marker, limit - (marker is not None)

    def _prepare(self, text: str, is_query: bool) -> str:
        text = (self.config.query_prompt if is_query else self.config.doc_prompt) + text
        text = text.strip() if self.config.strip else text
        return text.lower() if self.config.lowercase else text

    def _cut(self, ids: list, limit: int) -> list:
        """Truncate between [CLS] and [SEP]."""
        if len(ids) <= limit:
            return ids
        if self._side == "left":
            return ids[:1] + ids[len(ids) - limit + 1 :]
        return ids[: limit - 1] + ids[-1:]

    def _encode(self, texts: Sequence[str], *, is_query: bool) -> list[np.ndarray]:
        kind = "query" if is_query else "document"
        try:
            prepared = [self._prepare(text, is_query) for text in texts]
            encodings = self._tokenizer.encode_batch_fast(prepared)
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise _bad_text(texts, kind) from error
        marker, limit = self._role(is_query)
        rows = []
        for encoding in encodings:
            ids = self._cut(encoding.ids, limit)
            if marker is not None:
                ids.insert(1, marker)
            rows.append(np.array(ids, np.int32))
        return rows

    def _special(self, model: ModelTokenizer, role: str) -> int:
        if role not in model.special:
            raise ValueError(f"the tokenizer names no {role}")
        return self._id(model.special[role], role)

    def _expansion(self, model: ModelTokenizer) -> int:
        """[MASK], else the end-of-sequence token, as PyLate and sentence-transformers do."""
        if self.config.expansion_token is not None:
            return self._marker(self.config.expansion_token, "expansion_token")  # type: ignore
        role = "mask_token" if "mask_token" in model.special else "eos_token"
        return self._special(model, role)

    def _id(self, token: str, role: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{role} {token!r} is not in the tokenizer's vocabulary")
        return token_id

    def _marker(self, token: str | None, role: str) -> int | None:
        if token is None:
            return None
        try:
            return self._id(token, role)
        except ValueError as error:
            raise ValueError(f"{error}: name another token, or None for none") from None

    def _skiplist(self) -> np.ndarray:
        config, to_id = self.config, self._tokenizer.token_to_id
        drop = np.zeros(self.vocab_size, bool)
        if config.skiplist_words is not None:
            ids = [to_id(word) for word in config.skiplist_words]
            drop[[i for i in ids if i is not None]] = True
        else:
            drop[self.special.pad] = True
            if config.mask_punctuation:
                for char in string.punctuation:
                    drop[self._tokenizer.encode(char, add_special_tokens=False).ids[0]] = True
        if config.keep_only_token_ids is not None:
            kept = np.zeros(self.vocab_size, bool)
            kept[[i for i in config.keep_only_token_ids if 0 <= i < self.vocab_size]] = True
            drop |= ~kept
        return drop


def outside_instruction(ids: Any, end_token: int) -> Any:
    """Which tokens of queries are no instruction: bool of the shape of ids, NumPy's or JAX's.

    The instruction goes from behind the marker up to and including the first `end_token`; a query
    without one has none.
    """
    end = (ids == end_token).argmax(-1)[..., None].clip(1)
    place = np.arange(ids.shape[-1])
    return (end < place) | (place < 2)


def as_texts(texts: str | Sequence[str], kind: str) -> list[str]:
    """A list of strings from what the caller passed; one string is a list of one."""
    if isinstance(texts, str):
        return [texts]
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise _bad_text(texts, kind)
    return texts


def as_queries(queries: str | Sequence[str]) -> list[str]:
    """A list of queries from one or several.

    Raises:
      TypeError: a query that is not a string.
      ValueError: an empty or blank query: it asks nothing, so every document would fit it alike.
    """
    texts = as_texts(queries, "query")
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"query {i} is empty or blank: leave it out")
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
