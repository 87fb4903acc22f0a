"""Where an index's token embeddings come from: a model and passages, or ready arrays.

In a group of processes each encodes a contiguous share of the documents, about equal in tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from colbert_jax.embeddings import (
    DocumentEmbeddings,
    document_ranges,
    offsets_from_lengths,
)
from colbert_jax.index.format import Strings, StringWriter, delete_strings
from colbert_jax.processes import Group
from colbert_jax.progress import progress_bar

CHUNK_TOKENS = 1 << 18  # tokens between two commits of a build: its memory, and what a kill loses
_CHECK_ROWS = 1 << 16
_UNIT_TOLERANCE = 1e-2


class Source(Protocol):
    num_documents: int
    dim: int
    fingerprint: str  # of the content: equal content, equal fingerprint

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Read and check what is to be indexed; nothing else may be called before.

        Args:
          folder: the building folder, shared by the group, into which it may spool.

        Raises:
          ValueError, TypeError: bad input, named.
        """
        ...

    def share(self, group: Group) -> tuple[int, int]:
        """The documents of this process: from the first up to, not with, the second."""
        ...

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Cut ascending document ids into runs of about `CHUNK_TOKENS` tokens."""
        ...

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        """Token embeddings of each run of documents."""
        ...


class EmbeddingSource:
    """Ready token embeddings: values [T, D], in memory or mapped, and lengths [N].

    Every process of a group has all of them, best as a mapped file, and reads its own share.
    """

    def __init__(self, values: Any, lengths: Any):
        """Raises ValueError for arrays that do not fit together."""
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

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Raises ValueError for a row of another length than one."""
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
        parts = group.exchange("the check of the embeddings", digest.hexdigest())
        self.fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()

    def share(self, group: Group) -> tuple[int, int]:
        return _share(self._offsets, group)

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        return _cut(ids, np.diff(self._offsets)[ids])

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        for ids in chunks:
            rows = [self._values[self._offsets[i] : self._offsets[i + 1]] for i in ids]
            yield DocumentEmbeddings.from_list(rows, self.dim)
            bar.update(len(ids))


class PassageSource:
    """Passages, spooled to the building folder as they come, and the model that embeds them.

    Only the first process of a group reads them; the others read its spool.
    """

    def __init__(self, model: Any, passages: Iterable[str]):
        self._model, self._passages, self.dim = model, passages, model.dim

    def prepare(self, folder: Path, group: Group, show: bool | None) -> None:
        """Raises ValueError or TypeError naming a passage that is no text."""
        known = None
        if group.is_first:
            with StringWriter(folder, "text") as writer:
                digest, count = _spool(self._passages, writer, show)
            known = digest, count, writer.num_bytes
        self.fingerprint, self.num_documents, self.num_text_bytes = group.exchange(
            "the passages", known
        )[0]
        # A token is seldom under three bytes, and none are encoded beyond doc_maxlen; but very long
        # texts must not meet in one chunk either.
        offsets = np.load(folder / "text_offsets.npy", mmap_mode="r")
        longest, size = self._model.config.text.doc_maxlen, np.diff(offsets)
        self._estimates = np.maximum(np.minimum(size // 3 + 3, longest), size // 64)
        data = np.load(folder / "texts.npy", mmap_mode="r" if self.num_text_bytes else None)
        self._texts = Strings(data, offsets)

    def share(self, group: Group) -> tuple[int, int]:
        return _share(offsets_from_lengths(self._estimates), group)

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        return _cut(ids, self._estimates[ids])

    def encode(self, chunks: Iterable[np.ndarray], bar: Any) -> Iterator[DocumentEmbeddings]:
        windows = ([self._texts[i] for i in ids] for ids in chunks)
        return self._model.encode_windows(windows, bar)


def _spool(passages: Iterable[str], writer: StringWriter, show: bool | None) -> tuple[str, int]:
    """Write all passages; returns a hash of them and their number."""
    digest, count = hashlib.sha256(), 0
    total = len(passages) if isinstance(passages, Sized) else None
    with progress_bar(total, "reading passages", "doc", show) as bar:
        for block in _blocks(passages, 1024):
            for i, text in enumerate(block, count):
                if not isinstance(text, str):
                    raise TypeError(f"passage {i} must be a string, got {type(text).__name__}")
                try:
                    encoded = text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(f"passage {i} is not valid Unicode: {error}") from None
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
            writer.extend(block)
            count += len(block)
            bar.update(len(block))
    if not count:
        raise ValueError("the collection is empty: nothing to index")
    return digest.hexdigest(), count


def _share(offsets: np.ndarray, group: Group) -> tuple[int, int]:
    """This process's range of documents, by the running sum of tokens [N+1]."""
    start, stop = document_ranges(offsets, group.count)[group.index : group.index + 2]
    return int(start), int(stop)


class Pids(NamedTuple):
    """The documents' own ids as written: bytes (None: they are 0..N-1) and a hash of them."""

    num_bytes: int | None
    fingerprint: str | None


def write_pids(folder: Path, ids: Iterable[Any] | None, num_documents: int) -> Pids:
    """Write the documents' own ids, unless they are 0..N-1.

    Raises:
      ValueError: another number of ids than documents, or an id twice.
    """
    if ids is None:
        return Pids(None, None)
    hashes: list[np.ndarray] = []
    count, trivial = 0, True
    with StringWriter(folder, "pid") as writer:
        for block in _blocks(ids, 1024):
            strings = [str(i) for i in block]
            trivial = trivial and strings == [str(i) for i in range(count, count + len(strings))]
            digests = (hashlib.blake2b(s.encode(), digest_size=8).digest() for s in strings)
            hashes.append(np.frombuffer(b"".join(digests), np.uint64))
            writer.extend(strings)
            count += len(strings)
    if count != num_documents:
        raise ValueError(f"{count} ids were given for {num_documents} documents")
    every = np.concatenate(hashes)
    _refuse_duplicates(folder, every)
    if trivial:
        delete_strings(folder, "pid")
        return Pids(None, None)
    return Pids(writer.num_bytes, hashlib.sha256(every.tobytes()).hexdigest())


def _refuse_duplicates(folder: Path, hashes: np.ndarray) -> None:
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(same) == 0:
        return
    pids = Strings(np.load(folder / "pids.npy"), np.load(folder / "pid_offsets.npy"))
    for at in same:
        first, second = order[at], order[at + 1]
        if pids[first] == pids[second]:
            raise ValueError(
                f"duplicate document id {pids[first]!r}: passages {first + 1} and {second + 1} "
                "(counted from 1)"
            )


def _cut(ids: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Split ids where the running sum of sizes passes a multiple of the chunk size."""
    part = (np.cumsum(sizes) - sizes) // CHUNK_TOKENS
    return np.split(ids, np.flatnonzero(np.diff(part)) + 1) if len(ids) else []


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    block = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
