"""Documents from whatever a caller has: a collection file, strings, pairs, records, a mapping."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from colbert_jax.data.collections import parse_record, read_collection

Document = str | tuple[str, str]  # a text, or an id and a text


class Documents(Iterator[Document]):
    """Documents in order, read once: all texts, or all pairs of id and text.

    `operator.length_hint` gives their number where the source has one.
    """

    def __init__(self, source: Any):
        """
        Args:
          source: one of
            the path of a collection file (`data.collections.read_collection`);
            an iterable of strings, whose ids are their positions;
            an iterable of (id, text) pairs;
            an iterable of records, mappings with an id (optional), a text and optionally a title
              under the names that collection files have: a `datasets` dataset is one;
            a mapping from id to text.

        Raises:
          TypeError, ValueError: the source is something else, or its first document is bad. Later
            ones are named by their position when they are read.
          FileNotFoundError: no such file.
        """
        self._hint = len(source) if isinstance(source, Sized) else 0
        if isinstance(source, (str, os.PathLike)):
            self._hint = 0
            items: Iterable[Any] = read_collection(Path(source).expanduser())
        elif isinstance(source, Mapping):
            if hasattr(source, "column_names"):
                raise TypeError(
                    f"documents must be one dataset, got splits: choose {' or '.join(source)}"
                )
            items = source.items()
        elif isinstance(source, bytes) or not isinstance(source, Iterable):
            raise TypeError(
                "documents must be an iterable of strings, (id, text) pairs or records, or the "
                f"path of a collection file, got {type(source).__name__}"
            )
        else:
            items = source
        self._items = iter(items)
        self._position = 0
        self._with_ids: bool | None = None
        first = list(map(self._checked, itertools.islice(self._items, 1)))
        self._rest = itertools.chain(first, map(self._checked, self._items))

    def __next__(self) -> Document:
        return next(self._rest)

    def __length_hint__(self) -> int:
        return self._hint

    def _checked(self, item: Any) -> Document:
        position, self._position = self._position, self._position + 1
        try:
            document = as_document(item)
        except (TypeError, ValueError) as error:
            raise type(error)(f"document {position}: {error}") from None
        has_id = not isinstance(document, str)
        if self._with_ids not in (None, has_id):
            form = {True: "an id", False: "no id"}
            raise ValueError(
                f"document {position} has {form[has_id]}, but those before it have "
                f"{form[not has_id]}: give all documents an id, or none"
            )
        self._with_ids = has_id
        return document


def as_document(item: Any) -> Document:
    """A text, or an (id, text) pair, from a string, a pair or a record.

    Raises:
      TypeError, ValueError: anything else.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        identifier, text = parse_record(item)
        return text if identifier is None else (identifier, text)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        identifier, text = item
        if isinstance(identifier, (bool, float, bytes)) or identifier is None:
            raise TypeError(f"an id must be a string or a whole number, got {identifier!r:.60}")
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, got {type(text).__name__}")
        return str(identifier), text
    raise TypeError(f"expected a string, an (id, text) pair or a record, got {item!r:.80}")
