"""Measures and lengths with which the papers report collections."""

from __future__ import annotations

import re
from typing import NamedTuple

from colbert_jax.data.published import TestCollection
from colbert_jax.evaluation.metrics import DEPTH, MEASURES


class Preset(NamedTuple):
    """How collections of a kind are reported.

    measures: the first is the one that is compared. depth: documents retrieved for each query.
    query_maxlen, doc_maxlen: tokens; None: the checkpoint's.
    """

    measures: tuple[str, ...] = tuple(MEASURES)
    depth: int = DEPTH
    query_maxlen: int | None = None
    doc_maxlen: int | None = None


# Lengths of ColBERTv2 (Santhanam et al., 2022).
PRESETS = {
    "default": Preset(),
    "beir": Preset(("nDCG@10", "Recall@100"), DEPTH, 32, 300),
    "nanobeir": Preset(("nDCG@10", "MRR@10", "Recall@100"), DEPTH, 32, 300),
    "lotte": Preset(("Success@5", "Recall@100"), DEPTH, 32, 300),
    "msmarco": Preset(("MRR@10", "Recall@50", "Recall@1000"), 1000, 32, 180),
    "trec-dl": Preset(("nDCG@10", "RR(rel=2)", "AP(rel=2)@1000", "R(rel=2)@1000"), 1000, 32, 180),
}
_OF_FORM = {
    "BEIR folder": "beir",
    "data set folder": "nanobeir",
    "LoTTE folder": "lotte",
    "MS MARCO folder": "msmarco",
}
_LONG_QUERIES = {"arguana": 300, "climatefever": 64}
_OWN_QUERIES = ("arguana", "quora")


def _plain(collection: TestCollection) -> str:
    return re.sub("[^a-z]", "", collection.name.lower())


def preset_of(collection: TestCollection, name: str | None = None) -> Preset:
    """The preset of a name, or that of the collection's form; ArguAna has longer queries.

    Raises:
      ValueError: an unknown name.
    """
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset {name!r:.40}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name or _OF_FORM.get(collection.form, "default")]
    if preset.query_maxlen is not None:
        for part, length in _LONG_QUERIES.items():
            if part in _plain(collection):
                return preset._replace(query_maxlen=length)
    return preset


def queries_are_documents(collection: TestCollection) -> bool:
    """Whether a query finds itself: it is a document of ArguAna or Quora."""
    return any(part in _plain(collection) for part in _OWN_QUERIES)
