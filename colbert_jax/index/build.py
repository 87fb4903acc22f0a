"""Building an index: sample, train centroids, compress chunk by chunk, invert, publish.

Everything is written to a sibling folder that is renamed when it is whole. After every chunk the
build commits how far it has come, and the same build started again goes on from there.

Under `jax.distributed` all processes build together, in a folder that they share. Each encodes and
compresses a contiguous share of the documents into parts of its own, the first process joins the
parts. Wherever they meet, a process that failed ends the build of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax import processes
from colbert_jax.compression import learned
from colbert_jax.compression.codec import (
    ResidualCodec,
    check_packable,
    codec_from_nearest,
    compress,
    decompress_on_host,
    nearest_codes,
)
from colbert_jax.compression.kmeans import num_centroids_for, sample_size_for, train_kmeans
from colbert_jax.compression.sharding import auto_mesh, data_mesh, local_part
from colbert_jax.config import IndexConfig, written
from colbert_jax.embeddings import DocumentEmbeddings, offsets_from_lengths
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.columns import TEXT
from colbert_jax.index.fields import FIELDS, fields_checksum
from colbert_jax.index.folder import (
    METADATA,
    await_visible,
    building,
    publish,
    read_state,
    state_name,
    write_state,
)
from colbert_jax.index.inverted import join_inverted_lists, write_inverted_lists
from colbert_jax.index.sources import DocumentSource
from colbert_jax.processes import Group
from colbert_jax.progress import progress_bar
from colbert_jax.runtime import apart, on_cpu

_HELD_OUT = 50_000  # embeddings for the bucket statistics, at most; and at most 5 %
OUTLIERS = 0.1  # of held-out embeddings are farther from their centroid than `outlier_distance`
_DECOMPRESSED = 1 << 15  # tokens at a time, for learned vectors
_JOINED = 1 << 18  # rows copied at a time where parts are joined


def build_index(
    path: Path,
    make_source: Callable[[], DocumentSource],
    config: IndexConfig,
    *,
    model: Mapping[str, Any] | None = None,
    store_texts: bool = True,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> None:
    """Build an index at `path`, together with the other processes of the job if there are any.

    Args:
      path: the index folder, shared by all processes.
      make_source: what to index; not yet prepared.
      config: compression settings.
      model: what the index remembers of the model that made the embeddings.
      store_texts: keep the texts in the index.
      overwrite: replace an index that is there; it stays until the new one is whole.
      mesh: one axis of devices, of every process, for k-means and compression. None: all devices,
        or, on a CPU without other processes, its own way of doing both.

    Memory of a process: a chunk of 262,144 tokens (float32, and twice as float16), about 100 bytes
    a document and 10 bytes a token of the whole sample, whatever the size of the collection; on
    each device the centroids, twice in k-means, and a block of points with their scores.

    Raises:
      FileExistsError: something is at `path` and must not be replaced.
      RuntimeError: others build there, or a process of this group failed (`PeerError`).
      ValueError, TypeError: bad input, see the sources.
    """
    with processes.group(f"the build of {path.name}") as group:
        # A process of a CPU cluster compresses as it would alone; only k-means needs them all.
        own_way = mesh is None and on_cpu()
        mesh = _choose_mesh(group, mesh)
        own = None if mesh is None or own_way else local_part(mesh)
        show = progress if group.is_first else False
        with building(path, overwrite, group) as folder:
            state = BuildState(folder, group)
            source = make_source()
            check_packable(source.dim, config.nbits)
            source.prepare(folder, group, show)
            state.start(_key(source, config, model, store_texts, group), group)
            if not group.exchange("the start", state["finished"])[0]:
                if source.num_documents:
                    encode_sample(folder, source, config, state, group, show)
                    codec = _train(folder, source, config, state, group, mesh, show)
                    predictor = _learn(folder, config, state, group)
                    compress_documents(
                        folder, source, codec, state, group, own, show, predictor=predictor
                    )
                    _finish(folder, source, codec, state, group, predictor)
                elif group.is_first:
                    _finish_empty(folder, source, config, state)
            if group.is_first:
                _tidy(folder, group)
                publish(folder, path)
            build = group.exchange("publishing", state.build)[0]
            if not group.is_first:
                await_visible(lambda: fmt.read_metadata(path).build == build, path, group)
        group.exchange("the end")


def _choose_mesh(group: Group, mesh: Mesh | None) -> Mesh | None:
    if mesh is None:
        several = group.count > 1 or (len(jax.devices()) > 1 and not on_cpu())
        return data_mesh(jax.devices()) if several else None
    mesh = auto_mesh(mesh)
    if {device.process_index for device in mesh.devices.flat} != set(range(group.count)):
        raise ValueError(f"the mesh of a build needs devices of all {group.count} processes")
    return mesh


def _key(
    source: DocumentSource,
    config: IndexConfig,
    model: Mapping[str, Any] | None,
    store_texts: bool,
    group: Group,
) -> dict[str, Any]:
    """What makes a build this build: equal keys, equal indexes."""
    columns = {name: n for name, n in source.columns.items() if store_texts or name != TEXT}
    key = {
        "format_version": fmt.FORMAT_VERSION,
        "content": source.fingerprint,
        "store_texts": store_texts,
        "columns": columns,
        "chunk_tokens": sources.CHUNK_TOKENS,
        "dim": source.dim,
        "settings": written(config),
        "model": model,
        "processes": group.count,
    }
    first = group.exchange("the settings", key)[0]
    # What the checkpoint is called may differ between machines, what it holds may not.
    own, other = (_without_place(json.loads(json.dumps(k))) for k in (key, first))
    if own != other:
        different = ", ".join(name for name in key if own[name] != other[name])
        raise ValueError(f"process {group.index} builds with another {different} than process 0")
    return first


def _without_place(key: dict[str, Any]) -> dict[str, Any]:
    return key | {"model": key["model"] and key["model"]["fingerprint"]}


def _part(name: str, index: int, count: int) -> str:
    """The stem of one process's part of an array; of the array itself where there is one part."""
    return name if count == 1 else f"{name}.{index}"


class BuildState:
    """How far a process's build has come: a file replaced in one step after every chunk."""

    def __init__(self, folder: Path, group: Group):
        self._folder, self._process = folder, group.index
        self._values = read_state(folder, group.index)

    @property
    def key(self) -> dict[str, Any]:
        return self._values["key"]

    @property
    def build(self) -> str:
        """A name of its own for every build that was started, and not resumed."""
        return self._values["build"]

    def start(self, key: dict[str, Any], group: Group, *, commit: bool = True) -> None:
        """Go on with the build of that key, or forget a different one.

        The others go on only with what belongs to the build that the first process goes on with.

        Args:
          commit: at once, and not with the first `update`. What was committed for another key is
            forgotten at once in any case: its files are written over.
        """
        fresh = {"key": json.loads(json.dumps(key)), "build": uuid.uuid4().hex}
        known = self.is_of(key) and "build" in self._values
        build = group.exchange("the state", self.build if known else fresh["build"])[0]
        if not known or self.build != build:
            commit = commit or "key" in self._values
            self._values = fresh | {"build": build}
            if commit:
                self._commit()

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name, 0)

    def is_of(self, key: dict[str, Any]) -> bool:
        """Whether it is the state of the build, or change, of that key."""
        return self._values.get("key") == json.loads(json.dumps(key))

    def update(self, *, commit: bool = True, **values: Any) -> None:
        """`commit`: now; if not, the next update does."""
        self._values |= values
        if commit:
            self._commit()

    def _commit(self) -> None:
        write_state(self._folder, self._values, self._process)


def encode_sample(
    folder: Path,
    source: DocumentSource,
    config: IndexConfig,
    state: BuildState,
    group: Group,
    progress: bool | None,
) -> None:
    """Encode the training sample: float16 values in `sample.npy`, lengths beside them."""
    ids = _sample_ids(source, config, group)
    tokens, documents = state["sample_tokens"], state["sample_documents"]
    name = _part("sample", group.index, group.count)
    file, row = folder / f"{name}.npy", (source.dim,)
    with (
        fmt.ArrayWriter(file, np.float16, row, tokens, durable=False) as values,
        fmt.ArrayWriter(
            folder / f"{name}.lengths.npy", np.int64, (), documents, durable=False
        ) as lengths,
        progress_bar(len(ids), "encoding the sample", "doc", progress, initial=documents) as bar,
    ):
        for encoded in source.encode(_rest(source.chunks(ids), documents), bar):
            _check_finite(encoded)
            values.append(encoded.values.astype(np.float16))
            lengths.append(encoded.lengths)
            values.sync()
            lengths.sync()
            state.update(sample_documents=lengths.rows, sample_tokens=values.rows)
            group.check()
    group.exchange("the sample")


def _check_finite(encoded: DocumentEmbeddings) -> None:
    if not np.isfinite(encoded.values).all():
        raise ValueError("the model returned NaN or infinite token embeddings: check its weights")


def _rest(chunks: list[np.ndarray], done: int) -> list[np.ndarray]:
    """The chunks that a former run has not committed. They are cut as they were then, so that the
    same documents are batched together and the result is the same to the bit."""
    starts = np.cumsum([0, *map(len, chunks)])
    return chunks[int(np.searchsorted(starts, done)) :]


def _sample_ids(source: DocumentSource, config: IndexConfig, group: Group) -> np.ndarray:
    """The sampled documents of this process's share, ascending."""
    rng = np.random.default_rng(config.seed)
    size = sample_size_for(source.num_documents)
    ids = np.sort(rng.choice(source.num_documents, size, replace=False))
    start, stop = source.share(group)
    return ids[(ids >= start) & (ids < stop)]


@apart()
def _train(
    folder: Path,
    source: DocumentSource,
    config: IndexConfig,
    state: BuildState,
    group: Group,
    mesh: Mesh | None,
    progress: bool | None,
) -> ResidualCodec:
    """Centroids from the sample, bucket statistics from a part of it that was held out."""
    files = [folder / f"{f.name}.npy" for f in dataclasses.fields(ResidualCodec)]
    if not group.exchange("training", state["trained"])[0]:
        points = SampleRows(folder, group.count).array()
        trained = _train_codec(points, source.num_documents, config, group, mesh, progress)
        if trained is not None:
            codec, distance = trained
            for file, field in zip(files, dataclasses.fields(ResidualCodec), strict=True):
                fmt.write_array(file, np.asarray(getattr(codec, field.name)))
            state.update(trained=1, outlier_distance=distance)
    group.exchange("the codec")
    return ResidualCodec(*(jnp.asarray(np.load(file)) for file in files))


def _train_codec(
    points: Any,
    num_documents: int,
    config: IndexConfig,
    group: Group,
    mesh: Mesh | None,
    progress: bool | None,
) -> tuple[ResidualCodec, float] | None:
    """The codec and `Metadata.outlier_distance`, in the first process; the others only help with
    the centroids."""
    n = len(points)
    if n == 0:
        raise ValueError("nothing to index: no sampled document has a token")
    rng = np.random.default_rng(config.seed)
    held_out = np.zeros(n, bool)
    held_out[rng.choice(n, max(1, min(n // 20, _HELD_OUT)), replace=False)] = True
    rows = np.flatnonzero(~held_out) if n > 1 else np.zeros(1, np.int64)
    per_document = n / sample_size_for(num_documents)
    num_centroids = config.num_centroids or num_centroids_for(num_documents * per_document)
    if num_centroids >= len(rows):  # tiny: every point can be its own centroid
        rows = np.arange(n)
    centroids = train_kmeans(
        points,
        num_centroids,
        rows=rows,
        iterations=config.kmeans_niters,
        max_points_per_centroid=config.max_points_per_centroid,
        seed=config.seed,
        progress=progress,
        mesh=mesh,
        group=group,
    )
    if not group.is_first:
        return None
    # Stanford's index files keep centroids as float16. Rounding before residuals are taken makes an
    # index convertible without loss.
    centroids = centroids.astype(np.float16).astype(np.float32)
    values = np.asarray(points[np.flatnonzero(held_out)], np.float32)
    near = centroids[nearest_codes(centroids, values)]
    distance = float(np.quantile(np.linalg.norm(values - near, axis=1), 1 - OUTLIERS))
    return codec_from_nearest(centroids, near, values, config.nbits, config.buckets), distance


def _learn(
    folder: Path, config: IndexConfig, state: BuildState, group: Group
) -> learned.Predictor | None:
    """What makes learned vectors, from the sample, in the first process; None if not asked for."""
    if config.learned_dim is None:
        return None
    if group.is_first and not state["learned"]:
        points = SampleRows(folder, group.count).array()
        names = [_part("sample", i, group.count) for i in range(group.count)]
        lengths = np.concatenate([np.load(folder / f"{name}.lengths.npy") for name in names])
        fitted = learned.fit(points, lengths, config.learned_dim, config.seed)
        for name, array in zip(fmt.PREDICTOR, fitted, strict=True):
            fmt.write_array(folder / f"{name}.npy", array)
        state.update(learned=1)
    group.exchange("the learned vectors")
    return learned.Predictor(*(np.load(folder / f"{name}.npy") for name in fmt.PREDICTOR))


class SampleRows:
    """The sample of all processes, one part after the other."""

    def __init__(self, folder: Path, count: int):
        names = [_part("sample", i, count) for i in range(count)]
        self._parts = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
        self._offsets = offsets_from_lengths(np.array([len(part) for part in self._parts]))

    def array(self) -> Any:
        """The one part as the array it is, several as rows that are read when asked for."""
        return self._parts[0] if len(self._parts) == 1 else self

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """float16[m, D], the rows of an ascending int array."""
        cuts = np.searchsorted(rows, self._offsets)
        return np.concatenate(
            [
                part[rows[cuts[i] : cuts[i + 1]] - self._offsets[i]]
                for i, part in enumerate(self._parts)
            ]
        )


def compress_documents(
    folder: Path,
    source: DocumentSource,
    codec: ResidualCodec,
    state: BuildState,
    group: Group,
    mesh: Mesh | None,
    progress: bool | None,
    *,
    predictor: learned.Predictor | None = None,
    final: bool = True,
) -> None:
    """Codes and residuals of this process's documents; the sample's are not encoded again.

    Args:
      predictor: what makes their learned vectors, of the compressed tokens, which searches score;
        if None, none are made.
      final: whether an index keeps the files; the rows are durable in any case.
    """
    config = IndexConfig(**state.key["settings"])
    tokens, documents = state["tokens"], state["documents"]
    row = (source.dim * codec.nbits // 8,)
    sample = _Sample(folder, _sample_ids(source, config, group), group)
    start, stop = source.share(group)
    chunks = _rest(source.chunks(np.arange(start, stop)), documents)
    silent = progress_bar(None, "", "doc", False)
    fresh = (np.array([i for i in chunk if i not in sample], int) for chunk in chunks)

    def file(name: str) -> Path:
        return folder / f"{_part(name, group.index, group.count)}.npy"

    added: dict[str, tuple[Any, tuple[int, ...]]] = {}
    if predictor is not None:
        added = dict(
            zip(fmt.LEARNED, ((np.int8, (predictor.width,)), (np.float32, ())), strict=True)
        )
    with (
        contextlib.ExitStack() as stack,
        fmt.ArrayWriter(file("codes"), np.int32, (), tokens, durable=final) as codes,
        fmt.ArrayWriter(file("residuals"), np.uint8, row, tokens, durable=final) as residuals,
        fmt.ArrayWriter(file("lengths"), np.int64, (), documents, durable=False) as lengths,
        progress_bar(stop - start, "compressing", "doc", progress, initial=documents) as bar,
    ):
        writers = [codes, residuals, lengths]
        writers += [
            stack.enter_context(fmt.ArrayWriter(file(name), *kind, documents, durable=final))
            for name, kind in added.items()
        ]
        for chunk, new in zip(chunks, source.encode(fresh, silent), strict=True):
            _check_finite(new)
            rows = iter(new)
            values = [sample[i] if i in sample else next(rows) for i in chunk]
            packed = compress(codec, np.concatenate(values).astype(np.float16), mesh)
            sizes = np.array([len(value) for value in values])
            made = () if predictor is None else _learned_vectors(predictor, codec, *packed, sizes)
            for writer, rows_ in zip(writers, (*packed, sizes, *made), strict=True):
                writer.append(rows_)
                writer.sync()
            state.update(tokens=codes.rows, documents=lengths.rows)
            group.check()
            bar.update(len(chunk))


def _learned_vectors(
    predictor: learned.Predictor,
    codec: ResidualCodec,
    codes: np.ndarray,
    residuals: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`learned.document_vectors` of compressed documents, decompressed a few at a time."""
    starts = offsets_from_lengths(lengths)
    cuts = np.searchsorted(starts, np.arange(0, starts[-1], _DECOMPRESSED))
    cuts = np.unique([0, *cuts, len(lengths)])
    parts = []
    for first, last in itertools.pairwise(cuts):
        rows = slice(starts[first], starts[last])
        values = decompress_on_host(codec, codes[rows], residuals[rows])
        parts.append(learned.document_vectors(predictor, values, lengths[first:last]))
    vectors, scales = (np.concatenate(column) for column in zip(*parts, strict=True))
    return vectors, scales


class _Sample:
    """The sampled documents' embeddings by document id, of this process's share."""

    def __init__(self, folder: Path, ids: np.ndarray, group: Group):
        name = _part("sample", group.index, group.count)
        self._ids = ids
        self._values = np.load(folder / f"{name}.npy", mmap_mode="r")
        self._offsets = offsets_from_lengths(np.load(folder / f"{name}.lengths.npy"))

    def _place(self, i: int) -> int:
        return int(np.searchsorted(self._ids, i))

    def __contains__(self, i: int) -> bool:
        place = self._place(i)
        return place < len(self._ids) and self._ids[place] == i

    def __getitem__(self, i: int) -> np.ndarray:
        place = self._place(i)
        return self._values[self._offsets[place] : self._offsets[place + 1]]


def _finish(
    folder: Path,
    source: DocumentSource,
    codec: ResidualCodec,
    state: BuildState,
    group: Group,
    predictor: learned.Predictor | None,
) -> None:
    """Inverted lists of each process's documents; then, in the first, everything joined."""
    suffix = _part("", group.index, group.count)
    entries = write_inverted_lists(
        folder,
        np.load(folder / f"codes{suffix}.npy", mmap_mode="r"),
        offsets_from_lengths(np.load(folder / f"lengths{suffix}.npy")),
        len(codec.centroids),
        first=source.share(group)[0],
        suffix=suffix,
    )
    group.exchange("the inverted lists")
    if not group.is_first:
        return
    if group.count > 1:
        suffixes = [_part("", i, group.count) for i in range(group.count)]
        vectors = () if predictor is None else fmt.LEARNED
        for name in ("codes", "residuals", "lengths", *vectors):
            _join(folder, name, suffixes)
        entries = join_inverted_lists(folder, suffixes)
    lengths = np.load(folder / "lengths.npy")
    fmt.write_array(folder / "offsets.npy", offsets_from_lengths(lengths))
    metadata = fmt.Metadata(
        build=state.build,
        num_documents=len(lengths),
        num_empty_documents=int((lengths == 0).sum()),
        num_tokens=int(lengths.sum()),
        num_centroids=len(codec.centroids),
        num_list_entries=entries,
        dim=source.dim,
        nbits=codec.nbits,
        settings=state.key["settings"],
        model=state.key["model"],
        columns=state.key["columns"],
        outlier_distance=state["outlier_distance"],
        fields=FIELDS if source.has_fields else None,
        learned=None if predictor is None else predictor.sizes,
        checksums={FIELDS: fields_checksum(folder / FIELDS, len(lengths))}
        if source.has_fields
        else {},
    )
    fmt.write_metadata(folder, metadata)
    state.update(finished=1)


def _finish_empty(
    folder: Path, source: DocumentSource, config: IndexConfig, state: BuildState
) -> None:
    """An index without documents, and without centroids: these are trained on the first it gets."""
    metadata = fmt.Metadata(
        build=state.build,
        num_documents=0,
        num_empty_documents=0,
        num_tokens=0,
        num_centroids=0,
        num_list_entries=0,
        dim=source.dim,
        nbits=config.nbits,
        settings=state.key["settings"],
        model=state.key["model"],
        columns=state.key["columns"],
        checksums={},
    )
    specs = fmt.array_specs(metadata)
    for name, (dtype, shape) in specs.items():
        fmt.write_array(folder / f"{name}.npy", np.zeros(shape, dtype))
    change = fmt.Change(
        generation=1,
        name=state.build,
        files={name: f"{name}.npy" for name in specs},
        num_deleted=0,
        num_listed_documents=0,
        num_listed_centroids=0,
        next_id=None,
        num_added_tokens=0,
        num_outliers=0,
    )
    fmt.write_metadata(folder, dataclasses.replace(metadata, change=change))
    state.update(finished=1)


def _join(folder: Path, name: str, suffixes: list[str]) -> None:
    """One array from its parts, a block of rows at a time."""
    parts = [np.load(folder / f"{name}{suffix}.npy", mmap_mode="r") for suffix in suffixes]
    with fmt.ArrayWriter(folder / f"{name}.npy", parts[0].dtype, parts[0].shape[1:]) as writer:
        for part in parts:
            for start in range(0, len(part), _JOINED):
                writer.append(part[start : start + _JOINED])


def _tidy(folder: Path, group: Group) -> None:
    """Delete what an index does not need; the state goes last, after publishing."""
    kept = {f"{name}.npy" for name in fmt.array_specs(fmt.read_metadata(folder))}
    kept |= {METADATA, FIELDS, *map(state_name, range(group.count))}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
