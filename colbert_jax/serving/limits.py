"""What one request may ask for, and how much work may wait."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server; a request beyond one is refused with a status that says so.

    wait_ms: how long a request waits, in milliseconds, for others to be computed with it.
    batch: queries that one call computes.
    queue: requests that may wait; one more is answered 429.
    timeout: seconds from a request's last byte to its answer, and for its bytes to arrive; a client
      that takes nothing of its answer for so long loses the connection, on Linux.
    body: bytes of a request.
    k: results of one query.
    queries: of one request.
    query_chars, document_chars: characters of a query, of a document.
    documents: of one request, to rank, embed, add or delete.
    connections: open at a time; one more is answered 503.
    """

    wait_ms: float = 3.0
    batch: int = 32
    queue: int = 256
    timeout: float = 30.0
    body: int = 4 << 20
    k: int = 1000
    queries: int = 64
    query_chars: int = 8192
    document_chars: int = 200_000
    documents: int = 1000
    connections: int = 2000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name == "wait_ms" else 1e-3 if field.name == "timeout" else 1
            if not math.isfinite(value) or value < least:
                raise ValueError(f"{field.name} must be at least {least:g}, got {value}")
