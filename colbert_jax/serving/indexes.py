"""Indexes under names: for each the state that is searched now, and the way to the next."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from colbert_jax.colbert import ColBERT
from colbert_jax.index.index import Index
from colbert_jax.retriever import Retriever, remembered_model

LOGGER = logging.getLogger("colbert_jax")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ServedIndex:
    """An index under a name.

    Attributes:
      name: what requests call it.
      now: a model and one state of the index. What has begun with one ends with it.
      problem: why the state on disk is not searched; None where it is.
      has_bm25: whether hybrid searches are answered.
    """

    def __init__(self, name: str, retriever: Retriever):
        self.name, self._living = name, retriever
        self._changing = threading.Lock()
        self.problem: str | None = None
        self._advance()

    def _advance(self) -> None:
        index = self._living.index
        try:
            self._keeps_bm25 = self.has_bm25 = index.keeps_bm25
            if self.has_bm25:
                index.bm25()  # before requests ask for it
        except (ImportError, ValueError) as error:
            self.has_bm25 = False
            LOGGER.warning("%s: no hybrid searches: %s", self.name, error)
        self.now = Retriever(self._living.model, index)

    @property
    def generation(self) -> int:
        """The number of changes since the index was built."""
        change = self.now.index.metadata.change
        return 0 if change is None else change.generation

    def refresh(self) -> bool:
        """Search the state that is on disk now; whether it is another one.

        Where it cannot be searched, the former stays, and `problem` says why.
        """
        with self._changing:
            try:
                changed = self._living.refresh()
                if changed or self._living.index.keeps_bm25 != self._keeps_bm25:
                    self._advance()
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                return False
            self.problem = None
            return changed

    def change(self, kind: str, argument: Any) -> None:
        """Call `add`, `update`, `upsert` or `delete` of the retriever; errors are its own."""
        with self._changing:
            settings = {} if kind == "delete" else {"progress": False}
            getattr(self._living, kind)(argument, **settings)
            self._advance()

    def about(self) -> dict[str, Any]:
        """What the server says of it, JSON."""
        index = self.now.index
        return {
            "name": self.name,
            "documents": len(index),
            "dim": index.dim,
            "nbits": index.nbits,
            "generation": self.generation,
            "model": str(self.now.model.load["name_or_path"]),
            "texts": index.texts is not None,
            "fields": index.field_names(),
            "bm25": self.has_bm25,
        }


def open_indexes(places: Iterable[str], checkpoint: str | None = None) -> dict[str, ServedIndex]:
    """Open indexes to be served; those of one model share it.

    Args:
      places: folders, or NAME=FOLDER; without a name the folder's, without its suffix.
      checkpoint: the model of all of them, where it is not where it was.

    Raises:
      ValueError: a name that cannot be one, or two indexes of one name.
      FileNotFoundError, ValueError: as `Retriever.open`.
    """
    named: dict[str, str] = {}
    for place in places:
        name, path = split_name(place)
        if name in named:
            raise ValueError(
                f"two indexes are called {name!r}: {named[name]} and {path}; name one, as in "
                f"other={path}"
            )
        named[name] = path
    opened = {name: Index.open(path) for name, path in named.items()}
    models: dict[str, ColBERT] = {}
    served: dict[str, ServedIndex] = {}
    for name, index in opened.items():
        known = remembered_model(index)
        key = json.dumps([checkpoint, None if known is None else known["load"]], sort_keys=True)
        retriever = Retriever.open(index, models.get(key, checkpoint))
        models[key] = retriever.model
        served[name] = ServedIndex(name, retriever)
    return served


def split_name(place: str | os.PathLike) -> tuple[str, str]:
    """Name and folder of an index from FOLDER or NAME=FOLDER.

    Raises ValueError for a name that cannot stand in an address.
    """
    text = os.fspath(place)
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).resolve().stem), text
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{text}: {name!r} cannot be an index's name: letters, digits, '.', '_' and '-' can; "
            "name it, as in books=FOLDER"
        )
    return name, path


def checked_indexes(indexes: Any) -> dict[str, ServedIndex]:
    """Retrievers under names, as they are served."""
    if isinstance(indexes, Retriever):
        indexes = {split_name(indexes.index.path)[0]: indexes}
    if not isinstance(indexes, Mapping) or not indexes:
        raise TypeError("serve a Retriever, or a dict from names to retrievers")
    return {
        split_name(f"{name}=")[0]: one if isinstance(one, ServedIndex) else ServedIndex(name, one)
        for name, one in indexes.items()
    }
