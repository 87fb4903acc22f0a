"""Changing an index that is there: add, update, delete, compact, while others search it.

A document never changes its place, nor do the bytes of a place ever change: an update deletes the
document and adds it again at the end. So whoever has an index open keeps what they opened, and each
change is published with one rename, that of `metadata.json` (`index.format` says how files are
named). A killed change leaves the index as it was; the same call goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.codec import ResidualCodec, extended, nbits_of, nearest_codes, unpack
from colbert_jax.compression.kmeans import most_centroids_for, sample_size_for, train_kmeans
from colbert_jax.compression.learned import Predictor
from colbert_jax.config import IndexConfig
from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.files import sync_folder
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.build import (
    OUTLIERS,
    BuildState,
    SampleRows,
    compress_documents,
    encode_sample,
)
from colbert_jax.index.columns import (
    ID,
    TEXT,
    Column,
    DuplicateIdError,
    Positions,
    StringWriter,
    UnknownIdError,
    open_column,
)
from colbert_jax.index.fields import (
    FIELDS,
    FieldStore,
    FieldsWriter,
    copy_fields,
    delete_fields,
    fields_checksum,
    verify_fields,
)
from colbert_jax.index.folder import changing, discard, naming
from colbert_jax.index.inverted import join_inverted_lists, write_inverted_lists
from colbert_jax.index.sources import DocumentSource
from colbert_jax.processes import Group
from colbert_jax.progress import progress_bar
from colbert_jax.runtime import apart

_UNLISTED = 1 << 18  # tokens that searchers invert themselves, or ...
_UNLISTED_SHARE = 16  # ... this part of all: beyond both, the lists on disk are made again
_POINTS = 8  # training points of a new centroid, at least
_ROWS = 1 << 18  # tokens copied at a time
_STRINGS = 1 << 12  # strings copied at a time
_SAMPLED = 10_000  # tokens whose residuals are looked at
_NAMED = 5  # ids in a message
# Arrays from which changes make others, which get checksums of their own.
_IDS = (*fmt.string_arrays(ID), "deleted")
TOLD = (*_IDS, *fmt.string_arrays(TEXT))
_CODEC = ("centroids", "bucket_cutoffs", "bucket_weights")
_COPIED = ("codes", "residuals", "offsets", *TOLD, *fmt.LEARNED)


class Opened(NamedTuple):
    """One state of an index, as it was opened.

    deleted: bool[N].
    """

    path: Path
    metadata: fmt.Metadata
    arrays: Mapping[str, np.ndarray]
    ids: Column
    deleted: np.ndarray

    def position(self, id: str) -> int | None:
        """Where the document with an id is; None if there is none, or it is deleted."""
        return self.ids.position(id, self.deleted)


def check_whole(path: Path, metadata: fmt.Metadata, arrays: Iterable[str]) -> None:
    """Compare the checksums of those of some arrays that are there, and of the metadata.

    What is made of a damaged file would get a checksum of its own, and look whole.

    Raises IndexFormatError, naming the file.
    """
    there = fmt.array_specs(metadata)
    with fmt.IndexFiles(path) as files:
        files.check(metadata, [name for name in arrays if name in there])


# --- Add, update, upsert --------------------------------------------------------------------


def add_documents(
    path: Path,
    open_now: Callable[[], Opened],
    make_source: Callable[[int | None], DocumentSource],
    kind: str,
    progress: bool | None,
) -> None:
    """Add documents, replacing those of the same ids where `kind` says so.

    Args:
      open_now: opens the index as it is now.
      make_source: the documents; takes the position that the first will have if ids are positions,
        else None.
      kind: "add" refuses ids that are there, "update" those that are not, "upsert" none.

    Raises:
      DuplicateIdError, UnknownIdError: such ids, before anything is encoded.
      ValueError, TypeError: bad input, see the sources.
      RuntimeError: somebody else changes the index.
    """
    with changing(path, "adding") as folder:
        now = open_now()
        metadata = now.metadata
        check_whole(now.path, metadata, (*_CODEC, *_IDS, *fmt.PREDICTOR))
        _check_next_id(now)
        group = Group()
        state = BuildState(folder, group)
        by_position = isinstance(now.ids, Positions)
        source = make_source(len(now.deleted) if by_position and kind == "add" else None)
        if source.dim != metadata.dim:
            raise ValueError(
                f"{path}: token embeddings of {metadata.dim} dimensions, these have {source.dim}"
            )
        source.prepare(folder, group, progress)
        settings = config_of(now.path, metadata)
        key = {
            "kind": kind,
            "content": source.fingerprint,
            "chunk_tokens": sources.CHUNK_TOKENS,
            "build": metadata.build,
            "num_centroids": metadata.num_centroids,
            "settings": vars(settings),
        }
        if state.is_of(key) and state["change"] == metadata.state:
            discard(folder)  # a killed run has come as far as publishing it
            return
        given = _given_ids(folder, source)
        replaced = _replaced(now, kind, given)
        texts = _check_columns(now, source, given)
        if source.num_documents == 0:
            discard(folder)
            return
        state.start(key, group, commit=False)
        encode_sample(folder, source, settings, state, group, progress)
        codec, share = _extended(folder, now, source, state, settings, progress)
        predictor = None
        if metadata.learned is not None:
            predictor = Predictor(*(np.array(now.arrays[name]) for name in fmt.PREDICTOR))
        compress_documents(
            folder,
            source,
            codec,
            state,
            group,
            None,
            progress,
            predictor=predictor,
            final=False,
        )
        _publish_added(folder, now, source, state, given, replaced, texts, share)
        discard(folder)


def config_of(path: Path, metadata: fmt.Metadata) -> IndexConfig:
    """The settings of the build; of a converted index, those that are known."""
    names = {field.name for field in dataclasses.fields(IndexConfig)}
    known = {name: value for name, value in metadata.settings.items() if name in names}
    try:
        return IndexConfig(**known)
    except (TypeError, ValueError) as error:
        file = path / fmt.METADATA
        raise fmt.IndexFormatError(f"{file}: field 'settings' is damaged: {error}") from None


def _check_next_id(now: Opened) -> None:
    """Raises IndexFormatError where the next number is an id that is there: they ascend."""
    change = now.metadata.change
    if change is None or change.next_id is None or not len(now.ids):
        return
    last = now.ids.one(len(now.ids) - 1)
    if not (last.isascii() and last.isdigit() and int(last) < change.next_id):
        file = now.path / fmt.METADATA
        raise fmt.IndexFormatError(
            f"{file}: damaged: 'change.next_id' is {change.next_id}, the last id is {last!r:.80}"
        )


def _given_ids(folder: Path, source: DocumentSource) -> Column | None:
    """The ids that the new documents brought; None if they brought none."""
    if ID not in source.columns:
        return None
    return open_column(folder, ID, _staged_strings(folder, ID))


def _staged_strings(folder: Path, column: str) -> dict[str, np.ndarray]:
    files = {name: folder / f"{name}.npy" for name in fmt.string_arrays(column)}
    return {name: np.load(file) for name, file in files.items()}


def _replaced(now: Opened, kind: str, given: Column | None) -> np.ndarray:
    """Positions of the documents that make room for new ones of the same ids."""
    if given is None:
        if kind != "add":
            raise ValueError(f"{kind} replaces documents by their ids: give pairs (id, text)")
        return np.zeros(0, np.int64)
    there = [now.position(id) for id in given]
    if kind == "add":
        _refuse(
            now.path,
            (id for id, place in zip(given, there, strict=True) if place is not None),
            DuplicateIdError,
            "already has the {}; upsert replaces documents that are there",
        )
    if kind == "update":
        _refuse(
            now.path,
            (id for id, place in zip(given, there, strict=True) if place is None),
            UnknownIdError,
            "has no {}; upsert adds documents that are not there",
        )
    return np.array([place for place in there if place is not None], np.int64)


def _refuse(path: Path, ids: Iterable[str], error: type[Exception], message: str) -> None:
    found = list(ids)
    if found:
        named = ", ".join(repr(id)[:80] for id in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        what = f"document id{'s' if len(found) > 1 else ''} {named}{more}"
        raise error(f"{path}: {message.format(what)}")


def _check_columns(now: Opened, source: DocumentSource, given: Column | None) -> bool:
    """Whether the index keeps texts. Raises ValueError for documents without what it keeps."""
    change = now.metadata.change
    numbered = change is not None and change.next_id is not None
    if given is None and not isinstance(now.ids, Positions) and not numbered:
        raise ValueError(
            f"{now.path}: its documents have ids of their own: give pairs (id, text), or ids="
        )
    keeps = TEXT in now.metadata.columns
    if keeps and TEXT not in source.columns:
        raise ValueError(
            f"{now.path}: keeps the documents' texts, so ready embeddings alone cannot be added"
        )
    return keeps


@apart()
def _extended(
    folder: Path,
    now: Opened,
    source: DocumentSource,
    state: BuildState,
    config: IndexConfig,
    progress: bool | None,
) -> tuple[ResidualCodec, float]:
    """The index's codec, with new centroids if the new documents need them, written to `folder`.

    Up to `most_centroids_for` the tokens, new ones are trained on that half of the new tokens that
    lies farthest from the known ones: on real passages this loses less than training on the
    outliers alone. A build rounds that number down to a power of two, but what is grown bit by bit
    needs more of them than a build to find as much. No change brings more of them for each token
    than there are: a small one does not make up for what the build has rounded down.

    Outliers, tokens farther from their centroid than nine in ten were when the index was built, may
    bring more. One in ten is expected; for what is beyond, there are as many as keep the tokens per
    centroid as they are.

    Returns:
      the codec, and the part of the new tokens that are outliers to it.
    """
    arrays = (now.arrays[field.name] for field in dataclasses.fields(ResidualCodec))
    known = ResidualCodec(*map(jnp.asarray, arrays))
    file = folder / "centroids.npy"
    if state["extended"]:
        return extended(known, np.load(file)), state["share"]
    points = SampleRows(folder, 1).array()
    codec, fresh, share = known, np.zeros((0, now.metadata.dim), np.float32), 0.0
    if len(points):
        limit = now.metadata.outlier_distance
        limit = _typical_distance(now) if limit is None else limit
        distances = _distances(known, points)
        scale = source.num_documents / sample_size_for(source.num_documents)
        count, rows = _new_centroids(now.metadata, distances, limit, scale)
        far = np.flatnonzero(distances > limit)
        if count:
            fresh = train_kmeans(
                points,
                count,
                rows=rows,
                iterations=config.kmeans_niters,
                max_points_per_centroid=config.max_points_per_centroid,
                seed=config.seed,
                progress=progress,
            )
            fresh = fresh.astype(np.float16).astype(np.float32)
            codec = extended(known, fresh)
            far = far[_distances(codec, points, far) > limit]
        share = len(far) / len(points)
    fmt.write_array(file, fresh)
    state.update(extended=1, share=share, commit=False)  # the first compressed chunk does
    return codec, share


def _new_centroids(
    metadata: fmt.Metadata, distances: np.ndarray, limit: float, scale: float
) -> tuple[int, np.ndarray]:
    """How many new centroids, and the rows of the sample to train them on, ascending.

    Args:
      distances: float32[n], of the sampled tokens.
      limit: of the distance of what is no outlier.
      scale: how many times the sample the new tokens are.
    """
    known, tokens = metadata.num_centroids, len(distances) * scale
    far = np.flatnonzero(distances > limit)
    excess = (len(far) / len(distances) - OUTLIERS) * tokens
    per_centroid = (metadata.num_tokens + tokens) / known
    to_far = max(min(int(excess / per_centroid), len(far) // _POINTS), 0)
    if metadata.settings.get("num_centroids") is not None:
        return to_far, far
    half = np.sort(np.argpartition(distances, len(distances) // 2)[len(distances) // 2 :])
    room = most_centroids_for(metadata.num_tokens + tokens) - known
    at_most = min(known * tokens / max(metadata.num_tokens, 1), len(half) / _POINTS)
    # Rounded up as often as the remainder says, so that many small adds get what a large one gets.
    at_most += np.random.default_rng(metadata.num_tokens).random()
    to_half = int(max(min(room, at_most), 0))
    return (to_half, half) if to_half > to_far else (to_far, far)


def _distances(codec: ResidualCodec, points: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """float32[n], the distances of token embeddings from their centroids, a block at a time."""
    rows = np.arange(len(points)) if rows is None else rows
    centroids, distances = np.asarray(codec.centroids), np.zeros(len(rows), np.float32)
    for i in range(0, len(rows), _ROWS):
        values = np.asarray(points[rows[i : i + _ROWS]], np.float32)
        near = centroids[nearest_codes(codec.centroids, values)]
        distances[i : i + _ROWS] = np.linalg.norm(values - near, axis=1)
    return distances


def _typical_distance(now: Opened) -> float:
    """`Metadata.outlier_distance` of an index that does not know it, from its rounded residuals."""
    if len(now.arrays["residuals"]) == 0:
        return float("inf")
    weights = np.asarray(now.arrays["bucket_weights"])
    step = max(len(now.arrays["residuals"]) // _SAMPLED, 1)
    packed = np.asarray(now.arrays["residuals"][::step])
    residuals = weights[unpack(packed, nbits_of(weights))]
    return float(np.quantile(np.linalg.norm(residuals, axis=1), 1 - OUTLIERS))


def _publish_added(
    folder: Path,
    now: Opened,
    source: DocumentSource,
    state: BuildState,
    given: Column | None,
    replaced: np.ndarray,
    texts: bool,
    share: float,
) -> None:
    metadata, before = now.metadata, len(now.deleted)
    lengths = np.load(folder / "lengths.npy")
    publication = _Publication(folder, now, state, len(lengths))
    fresh = len(np.load(folder / "centroids.npy"))
    vectors = () if metadata.learned is None else fmt.LEARNED
    for name in ("codes", "residuals", *(["centroids"] if fresh else []), *vectors):
        empty = name in ("codes", "residuals") and not lengths.any()  # can't be mapped
        rows = np.load(folder / f"{name}.npy", mmap_mode=None if empty else "r")
        publication.append(name, _blocks(rows))
    publication.append("offsets", [metadata.num_tokens + np.cumsum(lengths, dtype=np.int64)])
    if texts:
        publication.append_strings(TEXT, _staged_strings(folder, TEXT))
    publication.append_fields(folder / FIELDS if source.has_fields else None)
    next_id = None if metadata.change is None else metadata.change.next_id
    if given is not None:
        next_id = None
        if isinstance(now.ids, Positions):
            publication.replace_strings(ID, [_all(now.ids), _all(given)])
        else:
            publication.append_strings(ID, _staged_strings(folder, ID))
    elif next_id is not None:
        ids = range(next_id, next_id + len(lengths))
        publication.append_strings(ID, _strings([str(i).encode() for i in ids]))
        next_id += len(lengths)
    if len(replaced):
        deleted = np.concatenate([now.deleted, np.zeros(len(lengths), bool)])
        deleted[replaced] = True
        publication.replace_deleted(deleted)
    elif metadata.num_deleted:
        more = -(-(before + len(lengths)) // 8) - -(-before // 8)
        publication.append("deleted", [np.zeros(more, np.uint8)])
    publication.publish(
        num_documents=before + len(lengths),
        num_empty_documents=metadata.num_empty_documents + int((lengths == 0).sum()),
        num_tokens=metadata.num_tokens + int(lengths.sum()),
        num_centroids=metadata.num_centroids + fresh,
        next_id=next_id,
        num_added_tokens=int(lengths.sum()),
        num_outliers=round(share * int(lengths.sum())),
    )


# --- Delete ---------------------------------------------------------------------------------


def delete_documents(path: Path, open_now: Callable[[], Opened], ids: Iterable[str]) -> None:
    """Delete documents by their ids; their places stay empty until the index is compacted.

    Raises:
      UnknownIdError: naming ids that no document has, before anything is deleted.
      TypeError: an id that is no string.
      RuntimeError: somebody else changes the index.
    """
    wanted = _listed(ids)
    with changing(path, "deleting") as folder:
        now = open_now()
        state = BuildState(folder, Group())
        key = {"ids": hashlib.sha256("\0".join(wanted).encode("utf-8", "replace")).hexdigest()}
        if state.is_of(key) and state["change"] == now.metadata.state:
            discard(folder)
            return
        check_whole(now.path, now.metadata, _IDS)
        there = [now.position(id) for id in wanted]
        _refuse(
            path,
            (id for id, place in zip(wanted, there, strict=True) if place is None),
            UnknownIdError,
            "has no {}",
        )
        if wanted:
            state.start(key, Group(), commit=False)
            deleted = now.deleted.copy()
            deleted[np.array(there, np.int64)] = True
            publication = _Publication(folder, now, state)
            publication.replace_deleted(deleted)
            publication.publish()
        discard(folder)


def _listed(ids: Iterable[str]) -> list[str]:
    """Ids as a list without repetitions."""
    if isinstance(ids, str):
        return [ids]
    listed = list(dict.fromkeys(ids))
    for id in listed:
        if not isinstance(id, str):
            raise TypeError(f"a document's id is a string, got {id!r:.80}")
    return listed


# --- Compact --------------------------------------------------------------------------------


def compact(path: Path, open_now: Callable[[], Opened], progress: bool | None) -> None:
    """Write the documents that are left one after the other, and all inverted lists.

    Positions change, ids stay. Nothing is encoded or compressed again.

    Raises:
      RuntimeError: somebody else changes the index.
      IndexFormatError: the index is damaged.
    """
    with changing(path, "compacting") as folder:
        now = open_now()
        change = now.metadata.change
        if change is None or (
            not change.num_deleted
            and change.num_listed_documents == now.metadata.num_documents
            and change.num_listed_centroids == now.metadata.num_centroids
        ):
            discard(folder)
            return
        check_whole(now.path, now.metadata, _COPIED)
        state = BuildState(folder, Group())
        state.start({"compact": now.metadata.state}, Group(), commit=False)
        left = np.flatnonzero(~now.deleted)
        offsets = np.asarray(now.arrays["offsets"])
        lengths = np.diff(offsets)[left]
        publication = _Publication(folder, now, state)
        with progress_bar(len(left), "compacting", "doc", progress) as bar:
            codes, residuals = now.arrays["codes"], now.arrays["residuals"]
            with (
                fmt.ArrayWriter(folder / "codes.npy", np.int32) as to_codes,
                fmt.ArrayWriter(folder / "residuals.npy", np.uint8, residuals.shape[1:]) as to_rest,
            ):
                for first, last in _runs(left, offsets):
                    rows = slice(int(offsets[first]), int(offsets[last]))
                    to_codes.append(codes[rows])
                    to_rest.append(residuals[rows])
                    bar.update(last - first)
        publication.replace("codes", folder / "codes.npy")
        publication.replace("residuals", folder / "residuals.npy")
        fmt.write_array(folder / "offsets.npy", offsets_from_lengths(lengths))
        publication.replace("offsets", folder / "offsets.npy")
        for name in () if now.metadata.learned is None else fmt.LEARNED:
            known = now.arrays[name]
            with fmt.ArrayWriter(folder / f"{name}.npy", known.dtype, known.shape[1:]) as writer:
                for start in range(0, len(left), _ROWS):
                    writer.append(known[left[start : start + _ROWS]])
            publication.replace(name, folder / f"{name}.npy")
        next_id = change.next_id
        if not isinstance(now.ids, Positions):
            publication.replace_strings(ID, [_chosen(now.ids, left)])
        elif change.num_deleted:  # the numbers stay the documents' own
            publication.replace_strings(ID, [_chosen(now.ids, left)])
            next_id = now.metadata.num_documents
        texts = open_column(path, TEXT, now.arrays, now.metadata)
        if texts is not None:
            publication.replace_strings(TEXT, [_chosen(texts, left)])
        publication.choose_fields(left)
        publication.forget_deleted()
        publication.publish(
            lists=True,
            num_documents=len(left),
            num_empty_documents=int((lengths == 0).sum()),
            num_tokens=int(lengths.sum()),
            next_id=next_id,
        )
        discard(folder)


def _runs(left: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours among positions, each of a bounded number of tokens."""
    cuts = np.flatnonzero(np.diff(left) != 1) + 1
    for run in np.split(left, cuts):
        first = int(run[0]) if len(run) else 0
        end = int(run[-1]) + 1 if len(run) else 0
        while first < end:
            last = int(np.searchsorted(offsets, offsets[first] + _ROWS, side="right")) - 1
            last = min(max(last, first + 1), end)
            yield first, last
            first = last


# --- Publishing -----------------------------------------------------------------------------


class _Publication:
    """The files of the next state of an index, and the rename that makes it the index."""

    def __init__(self, folder: Path, now: Opened, state: BuildState, num_new: int = 0):
        self._folder, self._now, self._state, self._num_new = folder, now, state, num_new
        metadata = now.metadata
        self.generation = metadata.generation + 1
        self._specs = fmt.array_specs(metadata)
        self._files = {name: metadata.file(name) for name in self._specs}
        self._checksums = {name: metadata.checksums[file] for name, file in self._files.items()}
        self._columns = dict(metadata.columns)
        self._num_deleted = metadata.num_deleted
        self._fields = metadata.fields
        self._fields_checksum = metadata.checksums.get(metadata.fields or "")

    def append(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Append rows to an array's file, behind the committed ones."""
        file = self._now.path / self._files[name]
        if _is_shared(file):
            own = self._target(name)
            with naming(own):
                shutil.copyfile(file, own)
            self._files[name], file = own.name, own
        known = self._checksums[name]
        self._checksums[name] = fmt.append_rows(file, *self._specs[name], parts, known)

    def replace(self, name: str, staged: Path) -> None:
        """Take a whole file, written by an `ArrayWriter`, for an array."""
        target = self._target(name)
        os.replace(staged, target)
        self._files[name] = target.name
        with fmt.IndexFiles(target.parent) as files:
            self._checksums[name] = files.whole_checksum(target.name)

    def append_strings(self, column: str, strings: Mapping[str, np.ndarray]) -> None:
        data, offsets = (strings[name] for name in fmt.string_arrays(column))
        known = self._columns[column]
        for name, part in zip(fmt.string_arrays(column), (data, known + offsets[1:]), strict=True):
            self.append(name, [part])
        self._columns[column] = known + len(data)

    def replace_strings(self, column: str, parts: Iterable[Iterable[list[bytes]]]) -> None:
        with StringWriter(self._folder, column) as writer:
            for part in parts:
                for block in part:
                    writer.extend(block)
        self._columns[column] = writer.num_bytes
        for name in fmt.string_arrays(column):
            self.replace(name, self._folder / f"{name}.npy")

    def replace_deleted(self, deleted: np.ndarray) -> None:
        """`deleted`: bool[N], of all documents of the new state."""
        file = self._folder / "deleted.npy"
        fmt.write_array(file, np.packbits(deleted, bitorder="little"))
        self.replace("deleted", file)
        self._num_deleted = int(deleted.sum())

    def forget_deleted(self) -> None:
        """No document is deleted in the new state."""
        for of in (self._files, self._checksums):
            of.pop("deleted", None)
        self._num_deleted = 0

    def append_fields(self, staged: Path | None) -> None:
        """Add the fields of new documents, a file as a build writes it; None: they have none.

        Rows that a killed change has left are taken for theirs unless they go.
        """
        path, count = self._now.path, len(self._now.deleted)
        if self._fields is None and staged is None:
            return
        own = path / f"fields-{self.generation}.sqlite"
        if self._fields is None:
            delete_fields(own)  # a killed change has left it
        else:
            file = path / self._fields
            if self._fields_checksum is None:
                self._fields_checksum = fields_checksum(file, count)
            if _is_shared(file):
                copy_fields(file, own, np.arange(count))
                self._fields = own.name
        self._fields = self._fields or own.name
        with contextlib.ExitStack() as stack:
            known = self._fields_checksum or 0
            writer = stack.enter_context(FieldsWriter(path / self._fields, count, known))
            if staged is not None:
                total = self._num_new
                store = stack.enter_context(contextlib.closing(FieldStore(staged, total)))
                for start in range(0, total, _STRINGS):
                    writer.extend(store.several(list(range(start, min(start + _STRINGS, total)))))
        self._fields_checksum = writer.checksum

    def choose_fields(self, left: np.ndarray) -> None:
        """Keep the fields of the documents at ascending positions."""
        if self._fields is not None:
            own = f"fields-{self.generation}.sqlite"
            path, count = self._now.path, len(self._now.deleted)
            verify_fields(path / self._fields, count, self._fields_checksum)
            self._fields_checksum = copy_fields(path / self._fields, path / own, left)
            self._fields = None if self._fields_checksum is None else own

    def publish(self, *, lists: bool = False, **values: Any) -> None:
        """Make the new state the index, and delete what only the former one needed.

        Args:
          lists: make the inverted lists of all documents, and not only when it is time.
          **values: fields of `Metadata` and `Change` that differ; `num_added_tokens` and
            `num_outliers` are added to the known ones.
        """
        old, path = self._now.metadata, self._now.path
        known = old.change
        change = {
            "num_listed_documents": known.num_listed_documents if known else old.num_documents,
            "num_listed_centroids": known.num_listed_centroids if known else old.num_centroids,
            "next_id": values.pop("next_id", known.next_id if known else None),
            "num_added_tokens": values.pop("num_added_tokens", 0),
            "num_outliers": values.pop("num_outliers", 0),
        }
        if known:
            change["num_added_tokens"] += known.num_added_tokens
            change["num_outliers"] += known.num_outliers
        metadata = dataclasses.replace(
            old, columns=self._columns, fields=self._fields, checksums={}, **values
        )
        listed = 0 if lists else change["num_listed_documents"]
        if lists or self._is_time(metadata, listed):
            if listed:
                self._check_lists(metadata)
            entries = self._write_lists(metadata, listed)
            metadata = dataclasses.replace(metadata, num_list_entries=entries)
            change["num_listed_documents"] = metadata.num_documents
            change["num_listed_centroids"] = metadata.num_centroids
        name = uuid.uuid4().hex
        self._state.update(change=name)
        kept = {old.fields, *map(old.file, self._specs)}
        if not kept.issuperset({self._fields, *self._files.values()}):  # names of new files
            sync_folder(path)
        checksums = {file: self._checksums[name] for name, file in self._files.items()}
        if self._fields is not None and self._fields_checksum is not None:
            checksums[self._fields] = self._fields_checksum
        metadata = dataclasses.replace(
            metadata,
            checksums=checksums,
            change=fmt.Change(
                generation=self.generation,
                name=name,
                files=self._files,
                num_deleted=self._num_deleted,
                **change,
            ),
        )
        fmt.replace_metadata(path, metadata)
        fmt.delete_others(path, metadata)

    def _target(self, name: str) -> Path:
        return self._now.path / f"{name}-{self.generation}.npy"

    def _is_time(self, metadata: fmt.Metadata, listed: int) -> bool:
        if metadata.num_documents == listed:
            return False
        offsets = self._array(metadata, "offsets")
        unlisted = metadata.num_tokens - int(offsets[listed])
        return unlisted > max(_UNLISTED, metadata.num_tokens // _UNLISTED_SHARE)

    def _check_lists(self, metadata: fmt.Metadata) -> None:
        """Compare the checksums of what new lists are made of."""
        check_whole(self._now.path, self._now.metadata, ("lists", "list_offsets"))
        specs = fmt.array_specs(metadata)
        with fmt.IndexFiles(self._now.path) as files:
            for name in ("codes", "offsets"):
                file = self._files[name]
                if files.checksum(file, *specs[name]) != self._checksums[name]:
                    raise fmt.IndexFormatError(
                        f"{files.folder / file}: damaged: its checksum differs"
                    )

    def _write_lists(self, metadata: fmt.Metadata, listed: int) -> int:
        """Inverted lists: the known ones up to a document, and those of the others."""
        offsets = np.asarray(self._array(metadata, "offsets"))[listed:]
        codes = self._array(metadata, "codes")[int(offsets[0]) :]
        count = metadata.num_centroids
        suffixes = [".known", ".new"] if listed else [""]
        entries = write_inverted_lists(
            self._folder, codes, offsets - offsets[0], count, first=listed, suffix=suffixes[-1]
        )
        if listed:
            known = np.asarray(self._now.arrays["list_offsets"])
            missing = np.full(count + 1 - len(known), known[-1])
            fmt.write_array(self._folder / "lists.known.npy", self._now.arrays["lists"])
            fmt.write_array(
                self._folder / "list_offsets.known.npy", np.concatenate([known, missing])
            )
            entries = join_inverted_lists(self._folder, suffixes)
        for name in ("lists", "list_offsets"):
            self.replace(name, self._folder / f"{name}.npy")
        return entries

    def _array(self, metadata: fmt.Metadata, name: str) -> np.ndarray:
        dtype, shape = fmt.array_specs(metadata)[name]
        with fmt.IndexFiles(self._now.path) as files:
            return fmt.open_array(files, self._files[name], dtype, shape, grown=True)


def _is_shared(file: Path) -> bool:
    """Whether a file has a second name: a copy of the index by links must not get our rows."""
    return file.is_symlink() or file.stat().st_nlink > 1


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


def _strings(encoded: list[bytes]) -> dict[str, np.ndarray]:
    """Strings of ids as arrays, the way `StringWriter` writes them."""
    data, offsets = fmt.string_arrays(ID)
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {data: np.frombuffer(b"".join(encoded), np.uint8), offsets: ends}


def _all(column: Column) -> Iterator[list[bytes]]:
    return _chosen(column, np.arange(len(column)))


def _chosen(column: Column, positions: np.ndarray) -> Iterator[list[bytes]]:
    """The strings at some positions, in blocks."""
    for start in range(0, len(positions), _STRINGS):
        yield [column.one(int(i)).encode() for i in positions[start : start + _STRINGS]]
