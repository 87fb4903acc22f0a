"""Converting indexes: Stanford ColBERT's and fast-plaid's into ours, ours and fast-plaid's into
Stanford's.

Codes, residual bytes and inverted lists are copied as they are, a block at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.compression.codec import ResidualCodec
from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.files import present, resolved
from colbert_jax.index import format as fmt
from colbert_jax.index.columns import ID, TEXT, open_column, write_documents
from colbert_jax.index.fields import FieldStore
from colbert_jax.index.folder import (
    METADATA,
    building,
    check_free,
    clear,
    discard,
    naming_space,
    publish,
)
from colbert_jax.index.inverted import write_inverted_lists
from colbert_jax.index.layouts.fastplaid import read_fastplaid
from colbert_jax.index.layouts.stanford import (
    CHUNK_DOCUMENTS,
    check_stanford,
    read_stanford,
    write_collection,
    write_fields,
    write_pids,
    write_stanford,
)
from colbert_jax.index.layouts.stored import DiskIndex, read_npy
from colbert_jax.index.sources import DocumentEncoder
from colbert_jax.progress import progress_bar
from colbert_jax.tensors.stored import Stored

TARGETS = ("native", "stanford")
_FIELDS = 1 << 12  # documents whose fields are read at a time


def convert_index(
    source: str | Path,
    folder: str | Path,
    to: str = "native",
    *,
    model: DocumentEncoder | None = None,
    collection: Iterable[tuple[str, str]] | None = None,
    chunk_documents: int = CHUNK_DOCUMENTS,
    overwrite: bool = False,
    progress: bool | None = None,
) -> DiskIndex:
    """Write an index in another layout. Returns what was read, its layout among it.

    The folder appears when it is whole. Memory is bounded by a block of tokens and, beside it, the
    centroids and about 50 bytes a document.

    Args:
      source: an index of ours, of Stanford ColBERT or of fast-plaid; its files tell which.
      folder: where to write.
      to: "native", our own layout, or "stanford".
      model: the model whose embeddings are indexed, for the new index to remember.
      collection: (id, text) of every document in the index's order, to be kept in an index of ours.
      chunk_documents: most documents in a chunk of a Stanford index.
      overwrite: replace an index that is at `folder`; it stays until the new one is whole.
      progress: True for a bar. If None, a bar on a terminal, else log lines.

    Raises:
      FileNotFoundError: no index at `source`, or a file of it is missing.
      FileExistsError: something is at `folder` and must not be replaced.
      ValueError: damaged or inconsistent, naming the file; or impossible in the other layout.
      RuntimeError: another process builds at `folder`, or the source was replaced meanwhile.
      DiskFullError (an OSError): no room, with file, folder and free space.
    """
    source, path = Path(source).expanduser(), resolved(folder)
    if to not in TARGETS:
        raise ValueError(f"an index is written as one of {', '.join(TARGETS)}, not {to!r}")
    if path == source.resolve() or path in source.resolve().parents:
        raise ValueError(f"{path}: holds the source; choose another folder")
    if chunk_documents < 1:
        raise ValueError(f"chunk_documents must be >= 1, got {chunk_documents}")
    check_free(path, overwrite)
    layout, before = detect_index(source), _stamp(source)
    if layout == to:
        raise ValueError(f"{source}: already in the {to} layout; copy the folder")
    index = _READERS[layout](source)
    if index.num_tokens == 0:
        raise ValueError(f"{source}: no document has a token: nothing to convert")
    if model is not None and model.dim != index.dim:
        raise ValueError(
            f"the checkpoint's embeddings have {model.dim} dimensions, {source} has {index.dim}"
        )
    if to == "stanford":
        check_stanford(index)
        if collection is not None:
            raise ValueError("a Stanford index keeps no texts; collection= is for ours")

    with building(path, overwrite) as draft:
        try:
            clear(draft)
            with (
                naming_space(draft),
                progress_bar(len(index.lengths), "converting", "doc", progress) as bar,
            ):
                write = _write_ours if to == "native" else _write_theirs
                for documents in write(index, draft, path, model, collection, chunk_documents):
                    bar.update(documents)
            if _stamp(source) != before:
                raise RuntimeError(f"{source}: replaced while it was converted; convert it again")
            publish(draft, path)
        except BaseException:  # starting again is as quick as going on would be
            discard(draft)
            raise
    return index


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """What tells an index's metadata from those that replace it."""
    try:
        stat = (folder / METADATA).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def detect_index(folder: Path) -> str:
    """The layout of the index in a folder, told by its files.

    Raises FileNotFoundError where there is none, ValueError for a file that cannot be read.
    """
    if present(folder / "centroids.pt"):
        return "stanford"
    if present(folder / "codes.npy") or _has_changed_codes(folder):
        return "native"
    if present(folder / "centroids.npy"):
        return "fast-plaid"
    for name, layout in (("plan.json", "Stanford ColBERT"), (METADATA, "")):
        if present(folder / name):
            raise FileNotFoundError(
                f"{folder}: an incomplete index{' of ' * bool(layout)}{layout}: {name} is there, "
                "centroids.pt or centroids.npy is not"
            )
    raise FileNotFoundError(
        f"{folder}: no index there (of ours codes.npy, of Stanford ColBERT centroids.pt, of "
        "fast-plaid centroids.npy)"
    )


def _has_changed_codes(folder: Path) -> bool:
    """Whether there are codes as a change of an index of ours names them."""
    files = folder.iterdir() if folder.is_dir() else ()
    return any(fmt.is_array_file(file.name, "codes") for file in files)


def read_ours(path: Path) -> DiskIndex:
    """An index of ours. Raises FileNotFoundError or IndexFormatError as `Index.open`."""
    folder, metadata, arrays = fmt.open_arrays(path)
    if metadata.num_deleted:
        raise ValueError(f"{path}: {metadata.num_deleted} of its documents are deleted: compact it")
    change = metadata.change
    listed = change is None or (
        change.num_listed_documents == metadata.num_documents
        and change.num_listed_centroids == metadata.num_centroids
    )
    specs = fmt.array_specs(metadata)

    def stored(name: str) -> Stored:
        # The header of an array that has grown states the rows that it began with.
        return replace(read_npy(folder / metadata.file(name)), shape=specs[name][1])

    origin = metadata.origin or {}
    codec = ResidualCodec(*(np.array(arrays[f.name]) for f in fields(ResidualCodec)))
    config, average = origin.get("config") or {}, origin.get("avg_residual")
    if not isinstance(config, dict) or not isinstance(average, float | int | None):
        raise fmt.IndexFormatError(f"{folder / METADATA}: field 'origin' is damaged")
    checkpoint = config.get("checkpoint")
    if metadata.model:
        checkpoint = metadata.model["load"]["name_or_path"]
    return DiskIndex(
        layout="native",
        folder=folder,
        codec=codec,
        avg_residual=average,
        lengths=np.diff(arrays["offsets"]),
        codes=[stored("codes")],
        residuals=[stored("residuals")],
        lists=stored("lists") if listed else None,
        list_lengths=np.diff(arrays["list_offsets"]) if listed else None,
        config=config,
        checkpoint=checkpoint,
    )


_READERS: dict[str, Callable[[Path], DiskIndex]] = {
    "native": read_ours,
    "stanford": read_stanford,
    "fast-plaid": read_fastplaid,
}


def _write_ours(
    index: DiskIndex,
    folder: Path,
    path: Path,
    model: DocumentEncoder | None,
    collection: Iterable[tuple[str, str]] | None,
    chunk_documents: int,
) -> Iterator[int]:
    columns = _write_columns(folder, collection, len(index.lengths))
    codec = index.codec
    for field in fields(codec):
        fmt.write_array(folder / f"{field.name}.npy", getattr(codec, field.name))
    offsets = offsets_from_lengths(index.lengths)
    fmt.write_array(folder / "offsets.npy", offsets)
    row = (index.dim * codec.nbits // 8,)
    with (
        fmt.ArrayWriter(folder / "codes.npy", np.int32) as codes,
        fmt.ArrayWriter(folder / "residuals.npy", np.uint8, row) as residuals,
    ):
        for block in index.code_blocks(0, index.num_tokens):
            codes.append(block)
        done = 0
        for block in index.residual_blocks(0, index.num_tokens):
            residuals.append(block)
            whole = int(np.searchsorted(offsets[1:], residuals.rows, side="right"))
            yield whole - done
            done = whole
    entries = _write_lists(index, folder, offsets)
    metadata = fmt.Metadata(
        build=uuid.uuid4().hex,
        num_documents=len(index.lengths),
        num_empty_documents=int((index.lengths == 0).sum()),
        num_tokens=int(index.lengths.sum()),
        num_centroids=index.num_centroids,
        num_list_entries=entries,
        dim=index.dim,
        nbits=codec.nbits,
        settings={"nbits": codec.nbits, "converted_from": index.layout},
        model=None if model is None else model.describe(),
        columns=columns,
        origin={
            "layout": index.layout,
            "config": dict(index.config),
            "avg_residual": index.avg_residual,
        },
        checksums={},
    )
    fmt.write_metadata(folder, metadata)


def _write_columns(
    folder: Path, collection: Iterable[tuple[str, str]] | None, num_documents: int
) -> dict[str, int]:
    """Texts, and ids where they are not 0..N-1; how many bytes each column has."""
    if collection is None:
        return {}
    try:
        written = write_documents(folder, collection)
        count = written.num_documents
        if count != num_documents:
            raise ValueError(f"{count} ids were given for {num_documents} documents")
    except ValueError as error:
        raise ValueError(f"the collection does not fit the index: {error}") from None
    columns = {TEXT: written.num_bytes, ID: written.ids.num_bytes}
    return {name: size for name, size in columns.items() if size is not None}


def _write_lists(index: DiskIndex, folder: Path, offsets: np.ndarray) -> int:
    """`lists.npy` and `list_offsets.npy`, copied or made of `codes.npy`; the number of entries."""
    if index.list_lengths is None:
        codes = np.load(folder / "codes.npy", mmap_mode="r")
        return write_inverted_lists(folder, codes, offsets, index.num_centroids)
    with fmt.ArrayWriter(folder / "lists.npy", np.int32) as lists:
        for block in index.list_blocks():
            lists.append(block)
    fmt.write_array(folder / "list_offsets.npy", offsets_from_lengths(index.list_lengths))
    return lists.rows


def _write_theirs(
    index: DiskIndex,
    folder: Path,
    path: Path,
    model: DocumentEncoder | None,
    collection: Iterable[tuple[str, str]] | None,
    chunk_documents: int,
) -> Iterator[int]:
    made: list[Path] = []
    if index.list_lengths is None:
        names = ("codes", "lists", "list_offsets")
        made = [folder / f"{name}.npy" for name in names]
        with fmt.ArrayWriter(made[0], np.int32) as codes:
            for block in index.code_blocks(0, index.num_tokens):
                codes.append(block)
        _write_lists(index, folder, offsets_from_lengths(index.lengths))
        lengths = np.diff(np.load(made[2]))
        index = replace(index, lists=read_npy(made[1]), list_lengths=lengths)
    checkpoint = index.checkpoint if model is None else model.describe()["load"]["name_or_path"]
    config: dict[str, Any] = {**index.config, "checkpoint": checkpoint}
    if index.layout == "native":
        at, metadata, arrays = fmt.open_arrays(index.folder)
        texts, ids = open_column(at, TEXT, arrays), open_column(at, ID, arrays)
        if texts is not None:
            config["collection"] = str(path / write_collection(folder, texts).name)
        if ids is not None:
            write_pids(folder, ids)
        if metadata.fields is not None:
            _write_fields(folder, FieldStore(at / metadata.fields, len(index.lengths)))
    yield from write_stanford(index, folder, config, chunk_documents)
    for file in made:
        file.unlink()


def _write_fields(folder: Path, store: FieldStore) -> None:
    """`fields.jsonl` beside Stanford's files: the documents' fields by position."""
    with contextlib.closing(store):
        starts = range(0, len(store), _FIELDS)
        blocks = (store.several(list(range(s, min(s + _FIELDS, len(store))))) for s in starts)
        write_fields(folder, itertools.chain.from_iterable(blocks))
