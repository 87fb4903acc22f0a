"""MTEB: a model that indexes and searches its retrieval and reranking tasks; extra `mteb`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from mteb.models.model_meta import ModelMeta, ScoringFunction

from colbert_jax.colbert import ColBERT
from colbert_jax.retriever import Retriever


class ColBERTSearch:
    """A model in MTEB's search protocol: `mteb.evaluate(ColBERTSearch(model, name), tasks)`.

    A task's corpus is indexed in a temporary folder, which the next task's replaces.
    """

    def __init__(
        self, model: ColBERT, name: str, revision: str | None = None, mode: str = "accurate"
    ):
        """
        Args:
          model: what encodes queries and documents.
          name: of the results, as "organisation/model".
          revision: of the checkpoint.
          mode: of the searches, see `Retriever.search`.
        """
        self.model, self._mode = model, mode
        self._folder: tempfile.TemporaryDirectory | None = None
        self._retriever: Retriever | None = None
        self._meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision or "local",
            release_date=None,
            languages=None,
            n_parameters=sum(leaf.size for leaf in jax.tree.leaves(model.params)),
            memory_usage_mb=None,
            max_tokens=model.config.text.doc_maxlen,
            embed_dim=model.dim,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=[],
            similarity_fn_name=ScoringFunction.MAX_SIM,
            use_instructions=False,
            training_datasets=None,
            model_type=["late-interaction"],
        )

    @property
    def mteb_model_meta(self) -> ModelMeta:
        return self._meta

    def index(self, corpus: Any, **_: Any) -> None:
        """Index rows with an id, a text, and perhaps a title."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = tempfile.TemporaryDirectory(prefix="colbert_jax-mteb-")
        self._retriever = Retriever.build(
            Path(self._folder.name, "index"), self.model, _documents(corpus), store_texts=False
        )

    def search(
        self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Scores of the best documents of each query; with `top_ranked` of those alone."""
        if self._retriever is None:
            raise RuntimeError("index a corpus first")
        texts = {str(row["id"]): _query(row) for row in queries}
        if top_ranked is None:
            found = self._retriever.search_many(
                texts.values(), top_k, mode=self._mode, texts=False, progress=False
            )
            results = dict(zip(texts, found, strict=True))
        else:
            results = {
                qid: self._retriever.search(
                    text, top_k, ids=map(str, top_ranked[qid]), mode="exact", texts=False
                )
                for qid, text in texts.items()
            }
        return {qid: {hit.id: hit.score for hit in hits} for qid, hits in results.items()}


def _documents(corpus: Any) -> Iterator[tuple[str, str]]:
    for row in corpus:
        text = f"{row.get('title') or ''} {row['text']}".strip()
        yield str(row["id"]), text


def _query(row: Any) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError(f"query {row['id']!r} is no text: dialogues are not searched")
    instruction = row.get("instruction")
    return f"{text} {instruction}" if instruction else text
