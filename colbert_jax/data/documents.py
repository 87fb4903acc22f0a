"""Documents from whatever a caller has: a collection file, strings, pairs, records, a mapping."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from colbert_jax.data.collections import parse_record, read_documents, record_fields
from colbert_jax.data.fields import Value, check_fields, usable_fields
from colbert_jax.data.published import TestCollection

# A text, an id and a text, or these and fields; the id None where documents have none.
Document = str | tuple[str, str] | tuple[str | None, str, dict[str, Value]]


class Documents(Iterator[Document]):
    """Documents in order, read once: all with an id, or all without.

    A document without fields is a text, or a pair of id and text; one with fields is id, text and
    a dict of these. `operator.length_hint` gives their number where the source has one.

    Attributes:
      images: the images of those read so far, by position; None where nobody asked for images.
    """

    def __init__(self, source: Any, *, fields: bool = True, images: str | None = None):
        """
        Args:
          source: one of
            the path of a collection file (`data.collections.read_documents`);
            an iterable of strings, whose ids are their positions;
            an iterable of (id, text) pairs, or of triples (id, text, fields);
            an iterable of records, mappings with an id (optional), a text and optionally a title
              under the names that collection files have; all else in them are fields: a `datasets`
              dataset is one;
            a mapping from id to text;
            a `TestCollection`.
          fields: False: leave fields out, unchecked.
          images: the name under which records, and the fields of triples, have an image: what
            `images.ImageInput` says, or None. They are kept until the end, so paths are best.

        Values that no field can have (`data.fields`) are left out of files and datasets, with a
        warning at their end.

        Raises:
          TypeError, ValueError: the source is something else, or its first document is bad, or has
            a field that cannot be. Later ones are named by their position when they are read.
          FileNotFoundError: no such file.
        """
        self._hint = len(source) if isinstance(source, Sized) else 0
        is_file = isinstance(source, (str, os.PathLike, TestCollection))
        if isinstance(source, TestCollection):
            self._hint = source.num_documents
            items: Iterable[Any] = source.documents()
        elif is_file:
            self._hint = 0
            items = read_documents(Path(source).expanduser())
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
        self._with_fields, self._image_name = fields, images
        self.images: dict[int, Any] | None = None if images is None else {}
        if images is None and isinstance(source, Documents):
            self.images = source.images  # of the same positions
        self._left_out = _LeftOut() if is_file or hasattr(source, "column_names") else None
        self._items = iter(items)
        self._position = 0
        self._with_ids: bool | None = None
        first = list(map(self._checked, itertools.islice(self._items, 1)))
        self._rest = itertools.chain(first, map(self._checked, self._items))

    def __next__(self) -> Document:
        try:
            return next(self._rest)
        except StopIteration:
            if self._left_out is not None:
                self._left_out.warn()
            raise

    def __length_hint__(self) -> int:
        return self._hint

    def _checked(self, item: Any) -> Document:
        position, self._position = self._position, self._position + 1
        try:
            identity, text, fields = _parts(item)
        except (TypeError, ValueError) as error:
            raise type(error)(f"document {position}: {error}") from None
        has_id = identity is not None
        if self._with_ids not in (None, has_id):
            form = {True: "an id", False: "no id"}
            raise ValueError(
                f"document {position} has {form[has_id]}, but those before it have "
                f"{form[not has_id]}: give all documents an id, or none"
            )
        self._with_ids = has_id
        if self._image_name is not None and self.images is not None and fields:
            image = fields.get(self._image_name)
            fields = {name: value for name, value in fields.items() if name != self._image_name}
            if image is not None:
                self.images[position] = image
        kept: dict[str, Value] = {}
        if fields and self._with_fields:
            name = f"document {position}" + (f" (id {identity!r:.60})" if has_id else "")
            if self._left_out is None:
                kept = check_fields(fields, name)
            else:
                kept, wrong = usable_fields(fields)
                self._left_out.add(wrong, name)
        if kept:
            return identity, text, kept
        return text if identity is None else (identity, text)


class _LeftOut:
    """Which fields were left out, of how many documents, of which first, and why."""

    def __init__(self) -> None:
        self._found: dict[str, list[Any]] = {}

    def add(self, wrong: Mapping[str, str], document: str) -> None:
        for name, why in wrong.items():
            self._found.setdefault(name, [0, document, why])[0] += 1

    def warn(self) -> None:
        found, self._found = self._found, {}
        if found:
            listed = (
                f"{name!r:.60} of {count} document{'s' * (count > 1)}, first of {document}: {why}"
                for name, (count, document, why) in found.items()
            )
            warnings.warn("left out what no field can hold: " + "; ".join(listed), stacklevel=3)


def _parts(item: Any) -> tuple[str | None, str, Mapping[str, Any]]:
    """Id or None, text, and fields as they come, from a string, a pair, a triple or a record.

    Raises:
      TypeError, ValueError: anything else.
    """
    if isinstance(item, str):
        return None, item, {}
    if isinstance(item, Mapping):
        return *parse_record(item), record_fields(item)
    is_triple = isinstance(item, tuple | list) and len(item) == 3 and isinstance(item[2], Mapping)
    if is_triple or (isinstance(item, tuple | list) and len(item) == 2):
        identity, text = item[:2]
        if identity is None and is_triple:
            pass
        elif isinstance(identity, (bool, float, bytes)) or identity is None:
            raise TypeError(f"an id must be a string or a whole number, got {identity!r:.60}")
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, got {type(text).__name__}")
        return None if identity is None else str(identity), text, item[2] if is_triple else {}
    raise TypeError(f"expected a string, an (id, text) pair or a record, got {item!r:.80}")
