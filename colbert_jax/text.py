"""Turn queries and documents into token ids, as the library that trained the checkpoint does.

A query is `[CLS] marker tokens [SEP]`, filled up with [MASK] (query expansion); a document is
`[CLS] marker tokens [SEP]`. Both are cut to their maximum length. Rows stay ragged here; `batching`
pads them to static shapes.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from colbert_jax.config import TextConfig

ROLES = ("pad_token", "mask_token", "cls_token", "sep_token", "unk_token", "bos_token", "eos_token")
_STRANGE = "\ua66e \U00012000"  # letters that are in no vocabulary


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a checkpoint.

    special: role ("pad_token", ...) -> token, for the roles that the model has.
    truncation_side: "right" or "left", the end at which long texts are cut.
    file: where it was read from, for errors.
    """

    tokenizer: tokenizers.Tokenizer
    special: dict[str, str]
    truncation_side: str = "right"
    file: Path | None = field(default=None, compare=False)

    @cached_property
    def largest_id(self) -> tuple[int, str]:
        """The largest id that a text can get, and its token.

        It may be one that only the post-processor knows: it has ids of its own for what it adds.

        Raises ValueError if there is no vocabulary, a text cannot be encoded, or the post-processor
        gives a token another id than the vocabulary does.
        """
        largest = max(
            ((i, token) for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items()),
            default=None,
        )
        if largest is None:
            raise ValueError("the tokenizer's vocabulary is empty")
        try:
            encodings = self.tokenizer.encode(_STRANGE), self.tokenizer.encode("a", "b")
        except Exception as error:  # such as an unknown token that is missing
            raise ValueError(f"the tokenizer cannot encode every text: {error}") from None
        added = [pair for e in encodings for pair in zip(e.ids, e.tokens, strict=True)]
        for i, token in added:
            known = self.tokenizer.token_to_id(token)
            if known not in (None, i) and i <= largest[0]:  # larger ones are the caller's affair
                raise ValueError(
                    f"its post-processor gives {token!r:.80} the id {i}, its vocabulary {known}: "
                    "they are not of one model"
                )
        return max([largest, *added])

    def has(self, token: str | None) -> bool:
        """Whether the vocabulary has a token."""
        return token is not None and self.tokenizer.token_to_id(token) is not None

    def to_json(self) -> dict[str, Any]:
        """Return one JSON object that `from_json` reads."""
        return {
            "special_tokens": self.special,
            "truncation_side": self.truncation_side,
            "tokenizer": json.loads(self.tokenizer.to_str()),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], file: Path | None = None) -> ModelTokenizer:
        """Make a tokenizer from a JSON object. Raises KeyError or ValueError if it is damaged."""
        special = fields["special_tokens"]
        if not isinstance(special, dict) or not all(isinstance(t, str) for t in special.values()):
            raise ValueError(f"special_tokens must map roles to tokens, got {special!r:.80}")
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields["tokenizer"]))
        side = fields["truncation_side"]
        return cls(without_padding(tokenizer), fields["special_tokens"], side, file)


def without_padding(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Switch off a tokenizer's padding and truncation and return it.

    Published files often have them on; `TextTokenizer` truncates, `batching` pads.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TokenIds(NamedTuple):
    """Token ids of a list of texts.

    ids: one int32 array for each text, the encoder's input.
    attended: int32[N], how many leading tokens take part in attention; those after them are [MASK]
      expansion.
    """

    ids: list[np.ndarray]
    attended: np.ndarray


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens and the markers; None for those that are not used."""

    pad: int
    expansion: int | None
    query_marker: int | None
    doc_marker: int | None
    instruction: int | None


class TextTokenizer:
    """The tokenizer of a model: `queries` and `documents` turn texts into token ids.

    skiplist: bool[V], the tokens of documents that give no embedding.
    vocab_size: V, the largest id + 1.
    """

    def __init__(self, model: ModelTokenizer, config: TextConfig):
        """
        Args:
          model: a tokenizer whose post-processor adds [CLS] and [SEP] if it has them.
          config: lengths, markers, expansion, skiplist.

        Raises:
          ValueError: a special token or marker is missing, or [CLS] and [SEP] are not added.
        """
        self.config = config
        self._tokenizer, self._side = model.tokenizer, model.truncation_side
        self._roles = model.special
        self.vocab_size = model.largest_id[0] + 1  # ids may have gaps
        self.special = SpecialTokens(
            pad=self._special(model, "pad_token"),
            expansion=self._expansion(model) if config.query_expansion else None,
            query_marker=self._marker(config.query_token_id, "query_token_id"),
            doc_marker=self._marker(config.doc_token_id, "doc_token_id"),
            instruction=self._marker(config.mask_instruction_token, "mask_instruction_token"),
        )
        self._before, self._after = self._around(model)
        self.skiplist = self._skiplist()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    @cached_property
    def special_ids(self) -> set[int]:
        """The ids of the tokens around and in place of text: first, last, padding, unknown."""
        roles = ("cls_token", "bos_token", "sep_token", "eos_token", "pad_token", "unk_token")
        found = (self._tokenizer.token_to_id(self._roles[r]) for r in roles if r in self._roles)
        return {token_id for token_id in found if token_id is not None}

    def translation(self, other: TextTokenizer) -> np.ndarray | None:
        """Map the ids of this vocabulary to those of another one.

        Special tokens are matched by their role: [CLS] may be <s> in the other.

        Returns:
          int32[V], or None if the vocabularies are the same.

        Raises:
          ValueError: the other vocabulary lacks a piece.
        """
        if self.fingerprint == other.fingerprint and self._roles == other._roles:
            return None
        ours = self._tokenizer.get_vocab(with_added_tokens=True)
        theirs = other._tokenizer.get_vocab(with_added_tokens=True)
        special = {t: other._roles[role] for role, t in self._roles.items() if role in other._roles}
        missing = sorted(piece for piece in ours if special.get(piece, piece) not in theirs)
        if missing:
            raise ValueError(
                f"the other vocabulary lacks {len(missing)} of {len(ours)} pieces: "
                f"{', '.join(map(repr, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
            )
        ids = np.zeros(self.vocab_size, np.int32)
        for piece, token_id in ours.items():
            ids[token_id] = theirs[special.get(piece, piece)]
        return ids

    def queries(self, texts: Sequence[str]) -> TokenIds:
        """Tokenize queries; with query expansion each has at least `query_minlen` tokens.

        Raises:
          TypeError, ValueError: a query is not a string, or not valid Unicode.
        """
        config = self.config
        rows = self._encode(texts, is_query=True)
        attended = np.fromiter(map(len, rows), np.int32, len(rows))
        if config.query_expansion:
            minlen = config.query_minlen or config.query_maxlen
            for i, row in enumerate(rows):
                if config.skiplist_words is None:  # as Stanford: padding in a text is [MASK] too
                    row[row == self.special.pad] = self.special.expansion
                fill = np.full(max(minlen - len(row), 0), self.special.expansion, np.int32)
                rows[i] = np.concatenate([row, fill])
            if config.attend_to_mask_tokens:
                attended = np.fromiter(map(len, rows), np.int32, len(rows))
        return TokenIds(rows, attended)

    def documents(self, texts: Sequence[str]) -> TokenIds:
        """Tokenize documents, each to at most `doc_maxlen` tokens; errors as for `queries`."""
        rows = self._encode(texts, is_query=False)
        return TokenIds(rows, np.fromiter(map(len, rows), np.int32, len(rows)))

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """Return which tokens of documents become embeddings: bool of the shape of `ids`."""
        return ~self.skiplist[ids]

    def kept_in_query(self, ids: np.ndarray) -> np.ndarray:
        """Return which tokens of queries become embeddings: bool of the shape of `ids`.

        All do, unless `skiplist_in_queries` drops the skiplist, or `mask_instruction_token` the
        tokens after the marker up to and including the first such token (FLMR's instruction).

        Args:
          ids: int[L] or [B, L].
        """
        kept = np.ones(ids.shape, bool)
        if self.config.skiplist_in_queries:
            kept &= ~self.skiplist[ids]
        if self.special.instruction is not None:
            kept &= outside_instruction(ids, self.special.instruction)
        return kept

    def labels(self, text: str, *, is_query: bool) -> list[str]:
        """Return a readable label for each embedding of a text: the word that its token is from.

        All tokens of a word have the word as their label. Others have "[CLS]", "[SEP]", "[MASK]",
        and the marker "[Q]" or "[D]". Tokens that give no embedding have no label.
        """
        prepared, spans = self._prepare(text, is_query), self._spans(text, is_query)
        return [token if span is None else prepared[slice(*span)] for token, span in spans]

    def spans(self, text: str, *, is_query: bool) -> list[tuple[int, int] | None]:
        """Return where in a text the word of each embedding is, as `labels` are in their order.

        Returns:
          start and end in characters of `text`; None for [CLS], [SEP], [MASK], markers, and words
          of the prompt.
        """
        prompt = self.config.query_prompt if is_query else self.config.doc_prompt
        whole = prompt + text
        shift = len(whole) - len(whole.lstrip()) if self.config.strip else 0
        ends = None
        if self.config.lowercase and len(whole.lower()) != len(whole):  # as of a capital I with dot
            ends = np.cumsum([len(letter.lower()) for letter in whole[shift:]])

        def place(span: tuple[int, int] | None) -> tuple[int, int] | None:
            if span is None:
                return None
            start, end = span
            if ends is not None:
                start, end = np.searchsorted(ends, [start, end - 1], side="right").tolist()
                end += 1
            moved = shift - len(prompt)
            return (start + moved, end + moved) if start + moved >= 0 else None

        return [place(span) for _, span in self._spans(text, is_query)]

    def _spans(self, text: str, is_query: bool) -> list[tuple[str, tuple[int, int] | None]]:
        """For each embedding its token, and where its word is in the prepared text, if in any."""
        row = self.queries([text]).ids[0] if is_query else self.documents([text]).ids[0]
        encoding = self._tokenizer.encode(self._prepare(text, is_query))
        words: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            if word is not None:
                words[word] = (words.get(word, (start, end))[0], end)
        found: list[tuple[str, tuple[int, int] | None]] = [
            (token, None if word is None else words[word])
            for token, word in zip(encoding.tokens, encoding.word_ids, strict=True)
        ]
        marker, limit = self._role(is_query)
        found = self._cut(found, limit)
        if marker is not None:
            found.insert(1, ("[Q]" if is_query else "[D]", None))
        found += [("[MASK]", None)] * (len(row) - len(found))
        kept = self.kept_in_query(row) if is_query else self.kept(row)
        return [one for one, keep in zip(found, kept, strict=True) if keep]

    def _role(self, is_query: bool) -> tuple[int | None, int]:
        """The marker's id, and the maximum number of tokens without it."""
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
        """Truncate between [CLS] and [SEP], or what a tokenizer adds in their place."""
        if len(ids) <= limit:
            return ids
        if self._side == "left":
            return ids[: self._before] + ids[len(ids) - limit + self._before :]
        return ids[: limit - self._after] + ids[len(ids) - self._after :]

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

    def _around(self, model: ModelTokenizer) -> tuple[int, int]:
        """How many tokens the tokenizer puts before and after a text.

        Language models put the first token before it, or none; where there are [CLS] and [SEP],
        encoders were trained with both.
        """
        ids = self._tokenizer.encode("").ids
        if len(ids) != 2 and {"cls_token", "sep_token"} <= model.special.keys():
            raise ValueError("the tokenizer does not put [CLS] before a text and [SEP] after it")
        special = self._tokenizer.encode("a").special_tokens_mask
        before = next((i for i, added in enumerate(special) if not added), len(ids))
        return before, len(ids) - before

    def _special(self, model: ModelTokenizer, role: str) -> int:
        if role not in model.special:
            raise ValueError(f"the tokenizer has no {role}")
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
            raise ValueError(f"{error}; name another token, or None for no token") from None

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
    """Return which tokens of queries are outside the instruction.

    The instruction goes from after the marker up to and including the first `end_token`; a query
    without that token has no instruction.

    Args:
      ids: int[..., L], a NumPy or JAX array.

    Returns:
      bool of the shape of `ids`.
    """
    end = (ids == end_token).argmax(-1)[..., None].clip(1)
    place = np.arange(ids.shape[-1])
    return (end < place) | (place < 2)


def as_texts(texts: str | Sequence[str], kind: str, first: int = 0) -> list[str]:
    """Turn a caller's texts into a list of strings; a single string becomes a list of one.

    Args:
      kind, first: what they are and the number of the first, for error messages.

    Raises:
      TypeError, ValueError: an item is not a string, or not valid Unicode.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(listed, first):
        if not isinstance(text, str) or not (text.isascii() or _is_unicode(text)):
            raise _bad_text([text], kind, i)
    return listed


def as_queries(
    queries: str | Sequence[str], first: int = 0, may_be_blank: Container[int] = ()
) -> list[str]:
    """A list of queries from one or several.

    Args:
      first: the number of the first, for error messages.
      may_be_blank: the numbers of those that ask something without a text.

    Raises:
      TypeError: a query that is not a string.
      ValueError: an empty or blank query: it asks nothing, so every document would fit it alike.
    """
    texts = as_texts(queries, "query", first)
    for i, text in enumerate(texts, first):
        if not text.strip() and i not in may_be_blank:
            raise ValueError(f"query {i} is empty or blank: leave it out")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad_text(texts: Sequence[Any], kind: str, first: int = 0) -> Exception:
    for i, text in enumerate(texts, first):
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
