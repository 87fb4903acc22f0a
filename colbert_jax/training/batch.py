"""The arrays of one training step, as the host prepares them and the device takes them."""

from __future__ import annotations

from typing import Any, NamedTuple


class TokenBatch(NamedTuple):
    """Token ids of texts, padded: what `models.colbert.TokenEncoder` takes.

    ids: int32[N, L].
    attended: int32[N], how many leading tokens take part in attention.
    kept: bool[N, L], the tokens that become embeddings.
    """

    ids: Any
    attended: Any
    kept: Any


class Passages(NamedTuple):
    """Which texts of a batch are the same: 64-bit hashes of their token ids, in two halves.

    queries: int32[B, 2].
    documents: int32[B * W, 2], W a query in turn.
    labelled: int32[B, P, 2], positives of each query in the whole source, its own among them.
    """

    queries: Any
    documents: Any
    labelled: Any


class Images(NamedTuple):
    """Images of B queries.

    pixels: float32[B, channels, height, width], zeros where there is none.
    given: bool[B], whether there is one.
    """

    pixels: Any
    given: Any


class ExampleBatch(NamedTuple):
    """B queries with W documents each, the first of them the positive.

    Documents are grouped by length, so that short ones are not padded to the longest: `documents`
    holds the groups, longest first, and row `order[b * W + w]` of the groups laid end to end is
    document w of query b.

    queries: B rows.
    documents: groups of as many rows each, B * W in all.
    order: int32[B * W].
    scores: float32[B, W], the teacher's, if there are any.
    passages: which documents are no negatives of a query. If None, only its own positive is none.
    images: of the queries; None for queries of text alone.
    """

    queries: TokenBatch
    documents: tuple[TokenBatch, ...]
    order: Any
    scores: Any
    passages: Passages | None = None
    images: Images | None = None
