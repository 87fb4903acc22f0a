"""Which words of a passage match which words of a query, by their places in the two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from colbert_jax.text import TextTokenizer


def shading(
    tokenizer: TextTokenizer, query: str, text: str, q: np.ndarray, d: np.ndarray
) -> dict[str, Any]:
    """The similarities of the words of a query and of a passage, JSON.

    Args:
      q: float32[Lq, D], the query's token embeddings.
      d: float32[Ld, D], the passage's.

    Returns:
      score: MaxSim of the texts as the model embeds them, markers included; that of the compressed
        document differs a little.
      query, document: for each word `start` and `end` in characters, `similarity` with the word of
        the other text that is most like it, and `match`, that word's place in the other list. A
        word is as similar as the best of its tokens.
    """
    left = _words(query, tokenizer.spans(query, is_query=True)[: len(q)])
    right = _words(text, tokenizer.spans(text, is_query=False)[: len(d)])
    similarity = q @ d.T
    table = np.array(
        [
            [
                similarity[rows.start : rows.stop, columns.start : columns.stop].max()
                for _, columns in right
            ]
            for _, rows in left
        ],
        np.float32,
    ).reshape(len(left), len(right))
    score = float(similarity.max(axis=1).sum()) if len(d) else 0.0
    return {
        "score": round(score, 4),
        "query": _matches(left, table),
        "document": _matches(right, table.T),
    }


_Word = tuple[tuple[int, int], range]  # where it is in the text, and its token embeddings


def _words(text: str, spans: Sequence[tuple[int, int] | None]) -> list[_Word]:
    """Words with a letter or a digit; the tokens of a word are neighbours."""
    words: list[_Word] = []
    for place, span in enumerate(spans):
        if span is None or not any(map(str.isalnum, text[slice(*span)])):
            continue
        if words and words[-1][0] == span:
            words[-1] = span, range(words[-1][1].start, place + 1)
        else:
            words.append((span, range(place, place + 1)))
    return words


def _matches(words: list[_Word], table: np.ndarray) -> list[dict[str, Any]]:
    """Of each word, its place and its best match; `table` is float32[words, other words]."""
    if not table.size:
        return []
    best = table.argmax(axis=1).tolist()
    values = table.max(axis=1).tolist()
    return [
        {"start": span[0], "end": span[1], "similarity": round(value, 4), "match": match}
        for (span, _), value, match in zip(words, values, best, strict=True)
    ]
