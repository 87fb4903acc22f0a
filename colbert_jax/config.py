"""Every setting of the library, as frozen dataclasses: one class per concern.

Architectures of encoders are in `models.config` and `models.colbert`.

Field names are Stanford ColBERT's where it has the setting, so that an `artifact.metadata` reads
straight into them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NBITS = (1, 2, 4, 8)
BUCKETS = ("optimal", "quantile")
RECALL = ("fast", "high", "exact")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_types(settings: Any) -> None:
    """Hold every field of a settings dataclass to its annotation (JSON has no other check)."""
    for f in dataclasses.fields(settings):
        value, wanted = getattr(settings, f.name), str(f.type)
        if value is None and "None" in wanted:
            continue
        base = wanted.split(" | ")[0]
        kinds: Any = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(base)
        if kinds is None:
            continue
        if not isinstance(value, kinds) or (base != "bool" and isinstance(value, bool)):
            raise ValueError(f"{f.name} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class TextConfig:
    """How queries and documents become token ids, and which tokens become embeddings.

    The defaults are Stanford ColBERT's.

    query_maxlen, doc_maxlen: longest input in tokens; longer texts are cut.
    query_token_id, doc_token_id: the marker put at position 1; None: no marker.
    query_expansion: fill queries up to `query_minlen` tokens (None: `query_maxlen`) with
      `expansion_token` (None: [MASK], else the end-of-sequence token), whose vectors count.
    attend_to_mask_tokens: whether the other tokens attend to that filling.
    mask_punctuation: drop ASCII punctuation from a document's output.
    skiplist_words: drop exactly these tokens instead; () drops none.
    skiplist_in_queries: drop them from queries too.
    keep_only_token_ids: of documents, keep nothing but these tokens.
    query_prompt, doc_prompt: text put before every text; strip, lowercase: done to the whole.
    mask_instruction_token: a query's tokens up to and including this one give no embedding (FLMR).
    """

    query_maxlen: int = 32
    doc_maxlen: int = 220
    query_token_id: str | None = "[unused0]"
    doc_token_id: str | None = "[unused1]"
    query_expansion: bool = True
    attend_to_mask_tokens: bool = False
    mask_punctuation: bool = True
    query_minlen: int | None = None
    expansion_token: str | None = None
    skiplist_words: tuple[str, ...] | None = None
    skiplist_in_queries: bool = False
    keep_only_token_ids: tuple[int, ...] | None = None
    query_prompt: str = ""
    doc_prompt: str = ""
    strip: bool = False
    lowercase: bool = False
    mask_instruction_token: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("skiplist_words", str), ("keep_only_token_ids", int)):
            value = getattr(self, name)
            if value is None:
                continue
            items = isinstance(value, (list, tuple)) and all(isinstance(v, kind) for v in value)
            _require(items, f"{name} must be a list of {kind.__name__}, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        _require_types(self)
        for name, marker in (
            ("query_maxlen", self.query_token_id),
            ("doc_maxlen", self.doc_token_id),
        ):
            least = 3 if marker is None else 4  # [CLS] (marker) one token [SEP]
            value = getattr(self, name)
            _require(value >= least, f"{name} must be at least {least}, got {value}")
        floor = self.query_minlen
        _require(
            floor is None or 1 <= floor <= self.query_maxlen,
            f"query_minlen must be between 1 and query_maxlen {self.query_maxlen}, got {floor}",
        )

    @classmethod
    def untrained(cls, **changes: Any) -> TextConfig:
        """Defaults for an encoder that was not trained for late interaction.

        Markers, [MASK] expansion and dropped punctuation are things a model learns to use; without
        that training each of them is noise, so none is on.
        """
        settings: dict[str, Any] = dict(
            query_maxlen=128,
            doc_maxlen=512,
            query_token_id=None,
            doc_token_id=None,
            query_expansion=False,
            mask_punctuation=False,
        )
        return cls(**(settings | changes))


@dataclass(frozen=True)
class IndexConfig:
    """How an index is compressed.

    num_centroids: None: Stanford's rule (see `compression.kmeans.num_centroids_for`).
    buckets: how residual values are rounded, "optimal" or Stanford's "quantile"
      (`compression.codec.train_codec`). Readers of either index see no difference.
    """

    nbits: int = 2
    kmeans_niters: int = 4
    num_centroids: int | None = None
    max_points_per_centroid: int = 256
    seed: int = 123
    buckets: str = "optimal"

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self.nbits in NBITS, f"nbits must be one of {NBITS}, got {self.nbits}")
        _require(self.buckets in BUCKETS, f"buckets must be one of {BUCKETS}, got {self.buckets!r}")
        _require(self.kmeans_niters >= 1, f"kmeans_niters must be >= 1, got {self.kmeans_niters}")
        _require(
            self.num_centroids is None or self.num_centroids >= 1,
            f"num_centroids must be >= 1, got {self.num_centroids}",
        )
        _require(
            self.max_points_per_centroid >= 1,
            f"max_points_per_centroid must be >= 1, got {self.max_points_per_centroid}",
        )


@dataclass(frozen=True)
class SearchConfig:
    """PLAID's three settings. None means the default for the k of the call (`resolve`)."""

    ncells: int | None = None
    centroid_score_threshold: float | None = None
    ndocs: int | None = None

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self.ncells is None or self.ncells >= 1, f"ncells must be >= 1: {self.ncells}")
        _require(self.ndocs is None or self.ndocs >= 1, f"ndocs must be >= 1: {self.ndocs}")
        threshold = self.centroid_score_threshold
        _require(
            threshold is None or not math.isnan(threshold),
            "centroid_score_threshold must not be NaN",
        )

    def resolve(self, k: int, recall: str = "high") -> SearchConfig:
        """The settings for one call: what is None takes the default for this k, each time anew.

        "fast" are Stanford's defaults. "high" looks at more centroids and documents, so that nine
        or ten of the ten best documents by exact scoring are found (`benchmarks/search.py`).
        """
        _require(recall in RECALL[:2], f"recall must be one of {RECALL}, got {recall!r}")
        table = _FAST if recall == "fast" else _HIGH
        ncells, threshold, ndocs = next(row[1:] for row in table if k <= row[0])
        given = self.centroid_score_threshold
        return SearchConfig(
            ncells=self.ncells or ncells,
            centroid_score_threshold=threshold if given is None else given,
            ndocs=self.ndocs or max(ndocs, 4 * k if k > 100 else 0),
        )


# The largest k, and for it ncells, centroid_score_threshold, ndocs.
_FAST = ((10, 1, 0.5, 256), (100, 2, 0.45, 1024), (math.inf, 4, 0.4, 4096))
_HIGH = ((10, 4, 0.4, 1024), (100, 4, 0.4, 4096), (math.inf, 8, 0.3, 8192))


@dataclass(frozen=True)
class ColBERTConfig:
    """All settings of a loaded model.

    `index` and `search` are what the checkpoint itself asks for: defaults of an index built with
    it. `metadata` keeps every other field of the checkpoint's own file (training settings,
    provenance) for the code that trains and exports.
    """

    similarity: str = "cosine"
    text: TextConfig = TextConfig()
    index: IndexConfig = IndexConfig()
    search: SearchConfig = SearchConfig()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_types(self)
        _require(
            self.similarity in ("cosine", "l2"),
            f"similarity must be 'cosine' or 'l2', got {self.similarity!r}",
        )
