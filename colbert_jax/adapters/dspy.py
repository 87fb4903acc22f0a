"""DSPy: a callable that retrieves; extra `dspy`.

`dspy.ColBERTv2(url="http://127.0.0.1:8000/api/search")` asks `colbert-jax serve` instead.
"""

from __future__ import annotations

from typing import Any

from dspy.dsp.utils.utils import dotdict

from colbert_jax.adapters.common import find
from colbert_jax.retriever import Retriever


class ColBERTRM:
    """What `dspy.configure(rm=...)` takes, or a module calls itself."""

    def __init__(self, retriever: Retriever, k: int = 10, **settings: Any):
        """
        Args:
          retriever: an open index and its model.
          k: results where a call names no number.
          **settings: further arguments of `Retriever.search`, such as `where`.
        """
        self.retriever, self.k, self.settings = retriever, k, settings

    def __call__(self, query: str, k: int | None = None, **settings: Any) -> list[Any]:
        """Passages, best first: `long_text`, `text`, `pid`, `score`, `rank`, and their fields."""
        found = find(self.retriever, query, k or self.k, self.settings | settings)
        return [
            dotdict(
                fields
                | {
                    "long_text": hit.text or "",
                    "text": hit.text or "",
                    "pid": hit.id,
                    "score": hit.score,
                    "rank": rank,
                }
            )
            for rank, (hit, fields) in enumerate(found, 1)
        ]
