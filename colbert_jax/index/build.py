"""Building an index: sample, train centroids, compress chunk by chunk, invert, publish.

Everything is written to a sibling folder that is renamed when it is whole. After every chunk the
build commits how far it has come, and the same build started again goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.codec import ResidualCodec, check_packable, compress, train_codec
from colbert_jax.compression.kmeans import num_centroids_for, sample_size_for, train_kmeans
from colbert_jax.config import IndexConfig
from colbert_jax.embeddings import DocumentEmbeddings, offsets_from_lengths
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.inverted import write_inverted_lists
from colbert_jax.index.sources import PassageSource, Source, write_pids
from colbert_jax.progress import progress_bar

_STATE = "build.json"
_HELD_OUT = 50_000  # embeddings for the bucket statistics, at most; and at most 5 %


def build_index(
    path: Path,
    make_source: Callable[[Path], Source],
    config: IndexConfig,
    *,
    ids: Any = None,
    model: dict[str, Any] | None = None,
    store_texts: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Build an index at `path`.

    Args:
      path: the index folder.
      make_source: called with the building folder, into which it may spool.
      config: compression settings.
      ids: the documents' own ids, any iterable; None: 0..N-1.
      model: what the index remembers of the model that made the embeddings.
      store_texts: keep the passages in the index.
      overwrite: replace an index that is there; it stays until the new one is whole.

    Raises:
      FileExistsError: something is at `path` and must not be replaced.
      RuntimeError: another process builds there.
      ValueError, TypeError: bad input, see the sources.
    """
    _check_free(path, overwrite)
    building = fmt.building_folder(path)
    building.mkdir(parents=True, exist_ok=True)
    with _locked(building):
        fmt.recover(path)
        state = _State(building)
        try:
            _check_free(path, overwrite)  # another process may have published since
            source = make_source(building)
            check_packable(source.dim, config.nbits)
            pids = write_pids(building, ids, source.num_documents)
        except Exception:
            if state.is_new:  # bad input: leave nothing behind
                shutil.rmtree(building, ignore_errors=True)
            raise
        key = {
            "format_version": fmt.FORMAT_VERSION,
            "content": source.fingerprint,
            "pids": pids.fingerprint,
            "store_texts": store_texts,
            "chunk_tokens": sources.CHUNK_TOKENS,
            "dim": source.dim,
            "settings": dataclasses.asdict(config),
            "model": model,
        }
        state.start(key)
        columns = {"pid": pids.num_bytes}
        if isinstance(source, PassageSource):
            columns["text"] = source.num_text_bytes if store_texts else None
        if not state["finished"]:
            _sample(building, source, config, state, progress)
            codec = _train(building, source, config, state, progress)
            _compress(building, source, codec, state, progress)
            _finish(building, source, codec, key, columns)
            state.update(finished=1)
        _tidy(building)
        fmt.publish(building, path)
    (path / _STATE).unlink(missing_ok=True)


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    is_index = (path / fmt.METADATA).is_file()
    if not is_index and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists and is not an index; choose another path")
    if is_index and not overwrite:
        raise FileExistsError(f"{path}: an index is there; pass overwrite=True to replace it")


class _State:
    """How far a build has come: `build.json`, replaced in one step after every chunk."""

    def __init__(self, folder: Path):
        self._file = folder / _STATE
        self._values: dict[str, Any] = {}
        # A damaged state means no state.
        with contextlib.suppress(OSError, ValueError):
            self._values = json.loads(self._file.read_text("utf-8"))

    @property
    def is_new(self) -> bool:
        return not self._values

    @property
    def key(self) -> dict[str, Any]:
        return self._values["key"]

    def start(self, key: dict[str, Any]) -> None:
        """Go on with the build of that key, or forget a different one."""
        if self._values.get("key") != json.loads(json.dumps(key)):
            self._values = {"key": key}
            self._commit()

    def __getitem__(self, name: str) -> int:
        return self._values.get(name, 0)

    def update(self, **values: int) -> None:
        self._values |= values
        self._commit()

    def _commit(self) -> None:
        fmt.write_json(self._file, self._values)


def _sample(
    folder: Path, source: Source, config: IndexConfig, state: _State, progress: bool | None
) -> None:
    """Encode the training sample: float16 values in `sample.npy`, lengths beside them."""
    ids = _sample_ids(source, config)
    tokens, documents = state["sample_tokens"], state["sample_documents"]
    with (
        fmt.ArrayWriter(folder / "sample.npy", np.float16, (source.dim,), tokens) as values,
        fmt.ArrayWriter(folder / "sample_lengths.npy", np.int64, (), documents) as lengths,
        progress_bar(len(ids), "encoding the sample", "doc", progress) as bar,
    ):
        bar.update(documents)
        for encoded in source.encode(_rest(source.chunks(ids), documents), bar):
            _check_finite(encoded)
            values.append(encoded.values.astype(np.float16))
            lengths.append(encoded.lengths)
            values.sync()
            lengths.sync()
            state.update(sample_documents=lengths.rows, sample_tokens=values.rows)


def _check_finite(encoded: DocumentEmbeddings) -> None:
    if not np.isfinite(encoded.values).all():
        raise ValueError("the model returned NaN or infinite token embeddings: check its weights")


def _rest(chunks: list[np.ndarray], done: int) -> list[np.ndarray]:
    """The chunks that a former run has not committed. They are cut as they were then, so that the
    same documents are batched together and the result is the same to the bit."""
    starts = np.cumsum([0, *map(len, chunks)])
    return chunks[int(np.searchsorted(starts, done)) :]


def _sample_ids(source: Source, config: IndexConfig) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    size = sample_size_for(source.num_documents)
    return np.sort(rng.choice(source.num_documents, size, replace=False))


def _train(
    folder: Path, source: Source, config: IndexConfig, state: _State, progress: bool | None
) -> ResidualCodec:
    """Centroids from the sample, bucket statistics from a part of it that was held out."""
    files = [folder / f"{f.name}.npy" for f in dataclasses.fields(ResidualCodec)]
    if state["trained"]:
        return ResidualCodec(*(jnp.asarray(np.load(file)) for file in files))
    points = np.load(folder / "sample.npy", mmap_mode="r")
    n = len(points)
    if n == 0:
        raise ValueError("nothing to index: no sampled document has a token")
    rng = np.random.default_rng(config.seed)
    held_out = np.zeros(n, bool)
    held_out[rng.choice(n, max(1, min(n // 20, _HELD_OUT)), replace=False)] = True
    rows = np.flatnonzero(~held_out) if n > 1 else np.zeros(1, np.int64)
    per_document = n / sample_size_for(source.num_documents)
    num_centroids = config.num_centroids or num_centroids_for(source.num_documents * per_document)
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
    )
    # Stanford's index files keep centroids as float16. Rounding before residuals are taken makes an
    # index convertible without loss.
    centroids = centroids.astype(np.float16).astype(np.float32)
    codec = train_codec(centroids, points[held_out], config.nbits)
    for file, field in zip(files, dataclasses.fields(ResidualCodec), strict=True):
        fmt.write_array(file, np.asarray(getattr(codec, field.name)))
    state.update(trained=1)
    return codec


def _compress(
    folder: Path, source: Source, codec: ResidualCodec, state: _State, progress: bool | None
) -> None:
    """Codes and residuals of all documents; those of the sample are not encoded again."""
    config = IndexConfig(**state.key["settings"])
    tokens, documents = state["tokens"], state["documents"]
    row = (source.dim * codec.nbits // 8,)
    sample = _Sample(folder, _sample_ids(source, config))
    chunks = _rest(source.chunks(np.arange(source.num_documents)), documents)
    silent = progress_bar(None, "", "doc", False)
    fresh = (np.array([i for i in chunk if i not in sample], int) for chunk in chunks)
    with (
        fmt.ArrayWriter(folder / "codes.npy", np.int32, (), tokens) as codes,
        fmt.ArrayWriter(folder / "residuals.npy", np.uint8, row, tokens) as residuals,
        fmt.ArrayWriter(folder / "lengths.npy", np.int64, (), documents) as lengths,
        progress_bar(source.num_documents, "compressing", "doc", progress) as bar,
    ):
        bar.update(documents)
        for chunk, new in zip(chunks, source.encode(fresh, silent), strict=True):
            _check_finite(new)
            rows = iter(new)
            values = [sample[i] if i in sample else next(rows) for i in chunk]
            packed = compress(codec, np.concatenate(values).astype(np.float16))
            codes.append(packed[0])
            residuals.append(packed[1])
            lengths.append(np.array([len(value) for value in values]))
            for writer in (codes, residuals, lengths):
                writer.sync()
            state.update(tokens=codes.rows, documents=lengths.rows)
            bar.update(len(chunk))


class _Sample:
    """The sampled documents' embeddings by document id."""

    def __init__(self, folder: Path, ids: np.ndarray):
        self._ids = ids
        self._values = np.load(folder / "sample.npy", mmap_mode="r")
        self._offsets = offsets_from_lengths(np.load(folder / "sample_lengths.npy"))

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
    source: Source,
    codec: ResidualCodec,
    key: dict[str, Any],
    columns: dict[str, int | None],
) -> None:
    """Offsets, inverted lists, metadata."""
    lengths = np.load(folder / "lengths.npy")
    offsets = offsets_from_lengths(lengths)
    fmt.write_array(folder / "offsets.npy", offsets)
    codes = np.load(folder / "codes.npy", mmap_mode="r")
    entries = write_inverted_lists(folder, codes, offsets, len(codec.centroids))
    kept = {name: size for name, size in columns.items() if size is not None}
    metadata = {
        "format_version": fmt.FORMAT_VERSION,
        "build": uuid.uuid4().hex,
        "num_documents": source.num_documents,
        "num_empty_documents": int((lengths == 0).sum()),
        "num_tokens": len(codes),
        "num_centroids": len(codec.centroids),
        "num_list_entries": entries,
        "dim": source.dim,
        "nbits": codec.nbits,
        "settings": key["settings"],
        "model": key["model"],
        "text_columns": sorted(kept),
        **{f"num_{name}_bytes": size for name, size in kept.items()},
    }
    names = [f"{name}.npy" for name in fmt.array_specs(metadata)]
    metadata["checksums"] = {name: fmt.checksum(folder / name) for name in names}
    fmt.write_json(folder / fmt.METADATA, metadata)


def _tidy(folder: Path) -> None:
    """Delete what an index does not need; the state goes last, after publishing."""
    metadata = json.loads((folder / fmt.METADATA).read_text("utf-8"))
    kept = {f"{name}.npy" for name in fmt.array_specs(metadata)} | {fmt.METADATA, _STATE}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the building folder; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder that was opened may have been published meanwhile.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise RuntimeError(f"{folder}: another process is building this index") from None
    finally:
        os.close(descriptor)
