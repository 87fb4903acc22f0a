"""Where an index's token embeddings come from: a model and texts, or ready arrays.

In a group of processes each encodes a contiguous share of the documents, about equal in tokens.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from colbert_jax.config import ColBERTConfig
from colbert_jax.embeddings import (
    DocumentEmbeddings,
    document_ranges,
    offsets_from_lengths,
)
from colbert_jax.index.columns import (
    ID,
    TEXT,
    Strings,
    WrittenDocuments,
    WrittenIds,
    write_documents,
    write_fields,
    write_ids,
)
from colbert_jax.index.format import string_arrays
from colbert_jax.multimodal import Items, images_fingerprint
from colbert_jax.processes import Group
from colbert_jax.progress import progress_bar

CHUNK_TOKENS = 1 << 18  # tokens between two commits of a build: its memory, and what a kill loses
_CHECK_ROWS = 1 << 16
_UNIT_TOLERANCE = 1e-2


class DocumentEncoder(Protocol):
    """What an index needs of a model; `ColBERT` has it."""

    dim: int
    config: ColBERTConfig

    def describe(self) -> dict[str, Any]:
        """What an index remembers of the model: `load`, `fingerprint` and `search`."""
        ...

    def image_fingerprint(self) -> str:
        """A hash of what encodes documents' images. Raises ValueError if nothing does."""
        ...

    def check_document_images(self, items: Items) -> dict[int, int]:
        """Decode documents' images: how many token embeddings each gives, by place. Raises
        ImageError, naming all that cannot be used."""
        ...

    def encode_windows(
        self, windows: Iterable[list[str] | Items], bar: Any = None
    ) -> Iterator[DocumentEmbeddings]:
        """Token embeddings of lists of texts, or of texts with images, one after the other."""
        ...


class DocumentSource(Protocol):
    """Documents to be indexed.

    Attributes:
      fingerprint: of content, ids and fields; equal ones, equal fingerprint.
      columns: the bytes of each column of strings that `prepare` has written.
      has_fields: whether `prepare` has written fields (`index.fields.FIELDS`).
    """

    num_documents: int
    dim: int
    fingerprint: str
    columns: dict[str, int]
    has_fields: bool

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Read and check what is to be indexed; nothing else may be called before.

        Only the first process of the group reads iterables, and writes columns and fields.

        Args:
          folder: the building folder, shared by the group.

        Raises:
          ValueError, TypeError: bad input, named.
        """
        ...

    def share(self, group: Group) -> tuple[int, int]:
        """The documents of this process: from the first up to, not with, the second."""
        ...

    def chunks(self, positions: np.ndarray) -> list[np.ndarray]:
        """Cut ascending positions of documents into runs of about `CHUNK_TOKENS` tokens."""
        ...

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        """Token embeddings of each run of documents."""
        ...


class EmbeddingSource:
    """Ready token embeddings: values [T, D], in memory or mapped, and lengths [N].

    Every process of a group has all of them, best as a mapped file, and reads its own share.
    """

    def __init__(
        self,
        values: Any,
        lengths: Any,
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        first: int | None = 0,
    ):
        """
        Args:
          ids, first: see `columns.write_documents`.
          fields: a dict or None for each document. If None, no document has any.

        Raises:
          ValueError: arrays that do not fit together.
        """
        values, lengths = np.asarray(values), np.asarray(lengths)
        if values.dtype.name == "bfloat16":
            values = values.astype(np.float32)
        if values.ndim != 2 or values.dtype.kind != "f":
            raise ValueError(
                "embeddings must be a float array [tokens, dim], got "
                f"{values.dtype} {list(values.shape)}"
            )
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any():
            raise ValueError("lengths must be a list of whole numbers >= 0, one per document")
        if lengths.sum() != len(values):
            raise ValueError(
                f"lengths add up to {lengths.sum()} tokens, but embeddings has {len(values)} rows"
            )
        if len(values) == 0:
            raise ValueError("nothing to index: no document has a token")
        self.num_documents, self.dim = len(lengths), values.shape[1]
        self._values, self._offsets = values, offsets_from_lengths(lengths)
        self._ids, self._fields, self._first = ids, fields, first

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Raises ValueError for a row of another length than one, TypeError or ValueError for bad
        ids or fields."""
        written = fields = None
        if group.is_first:
            written = write_ids(folder, self._ids, self.num_documents, self._first)
            fields = write_fields(folder, self._fields, self.num_documents)
        first, last = (int(self._offsets[i]) for i in self.share(group))
        digest = hashlib.sha256(self._offsets.tobytes())
        for start in range(first, last, _CHECK_ROWS):
            block = np.ascontiguousarray(self._values[start : min(start + _CHECK_ROWS, last)])
            norms = np.linalg.norm(block.astype(np.float32), axis=1)
            bad = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))
            if len(bad):
                row = start + int(bad[0])
                document = int(np.searchsorted(self._offsets, row, side="right")) - 1
                raise ValueError(
                    f"embeddings row {row} (document {document}) has length {norms[bad[0]]:.4g}; "
                    "token embeddings must have unit length: divide each by its norm"
                )
            digest.update(block.tobytes())
        own = digest.hexdigest(), written, fields
        parts = group.exchange("the check of the embeddings", own)
        ids, fields = WrittenIds(*parts[0][1]), parts[0][2]
        self.fingerprint = _fingerprint(*(part[0] for part in parts), ids.fingerprint, fields)
        self.has_fields = fields is not None
        self.columns = _columns(ids)

    def share(self, group: Group) -> tuple[int, int]:
        return _share(self._offsets, group)

    def chunks(self, positions: np.ndarray) -> list[np.ndarray]:
        return _cut(positions, np.diff(self._offsets)[positions])

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        for chunk in chunks:
            rows = [self._values[self._offsets[i] : self._offsets[i + 1]] for i in chunk]
            yield DocumentEmbeddings.from_list(rows, self.dim)
            bar.update(len(chunk))


class TextSource:
    """Texts, spooled to the building folder as they come, and the model that embeds them.

    Only the first process of a group reads them; the others read its spool.
    """

    def __init__(
        self,
        model: DocumentEncoder,
        documents: Iterable[Any],
        ids: Iterable[Any] | None = None,
        fields: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        first: int | None = 0,
    ):
        """
        Args:
          documents: texts, pairs (id, text), or triples (id, text, fields). Where they have
            images, an attribute `images` has these by position once all are read.
          ids: of documents without. If None, their positions.
          fields: of documents that are not triples, a dict or None for each.
          first: see `columns.write_documents`.
        """
        if not getattr(getattr(model, "encoder_config", None), "normalized", True):
            raise ValueError(
                "the model does not normalise token embeddings, and an index holds directions "
                "only: rank() scores with their lengths"
            )
        self._model, self._documents, self._ids, self._fields = model, documents, ids, fields
        self._first = first
        self.dim = model.dim

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Raises ValueError or TypeError naming a document that is no text, ImageError naming all
        images that cannot be used."""
        known, images = None, getattr(self._documents, "images", None)
        if images is not None and group.count > 1:
            raise ValueError("documents with images are indexed by one process, not by several")
        if group.is_first:
            total = operator.length_hint(self._documents) or None
            with progress_bar(total, "reading documents", "doc", show) as bar:
                known = write_documents(
                    folder, self._documents, self._ids, bar, self._fields, self._first
                )
        written = WrittenDocuments(*group.exchange("the documents", known)[0])
        ids = WrittenIds(*written.ids)
        self.num_documents = written.num_documents
        self.fingerprint = _fingerprint(written.fingerprint, ids.fingerprint)
        self.columns = _columns(ids) | {TEXT: written.num_bytes}
        self.has_fields = written.has_fields
        data, bounds = (folder / f"{name}.npy" for name in string_arrays(TEXT))
        # A token is seldom under three bytes, and none are encoded beyond doc_maxlen; but very long
        # texts must not meet in one chunk either.
        offsets = np.load(bounds, mmap_mode="r")
        longest, size = self._model.config.text.doc_maxlen, np.diff(offsets)
        self._estimates = np.maximum(np.minimum(size // 3 + 3, longest), size // 64)
        texts = np.load(data, mmap_mode="r" if written.num_bytes else None)
        self._texts = Strings(folder, TEXT, texts, offsets)
        self._images: Mapping[int, Any] = images or {}
        if images is not None:
            # Decoded, so that no build ends at a truncated file.
            numbers = range(self.num_documents)
            rows = self._model.check_document_images(Items([], images, numbers, "document"))
            for place, count in rows.items():
                self._estimates[place] += count
            self.fingerprint = _fingerprint(self.fingerprint, images_fingerprint(images))

    def _items(self, positions: np.ndarray) -> Items:
        listed = positions.tolist()
        images = {place: self._images[i] for place, i in enumerate(listed) if i in self._images}
        return Items([self._texts[i] for i in listed], images, listed, "document")

    def share(self, group: Group) -> tuple[int, int]:
        return _share(offsets_from_lengths(self._estimates), group)

    def chunks(self, positions: np.ndarray) -> list[np.ndarray]:
        return _cut(positions, self._estimates[positions])

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        windows = (
            self._items(chunk) if self._images else [self._texts[i] for i in chunk]
            for chunk in chunks
        )
        return self._model.encode_windows(windows, bar)


def _columns(ids: WrittenIds) -> dict[str, int]:
    return {} if ids.num_bytes is None else {ID: ids.num_bytes}


def _fingerprint(*parts: str | None) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _share(offsets: np.ndarray, group: Group) -> tuple[int, int]:
    """This process's range of documents, by the running sum of tokens [N+1]."""
    start, stop = document_ranges(offsets, group.count)[group.index : group.index + 2]
    return int(start), int(stop)


def _cut(positions: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Split where the running sum of sizes passes a multiple of the chunk size."""
    part = (np.cumsum(sizes) - sizes) // CHUNK_TOKENS
    return np.split(positions, np.flatnonzero(np.diff(part)) + 1) if len(positions) else []
