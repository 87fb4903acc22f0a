"""fast-plaid's indexes, up to 1.7: numpy files, in shards or merged into single files.

Documents that were deleted there are gone without a trace, and later ones have moved up. Raw
embeddings (`embeddings.npy`, `buffer.npy`) and the documents' metadata (`metadata.db`) are not
read; the documents of the first two are in the index too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from colbert_jax.files import present, read_object
from colbert_jax.index.format import IndexFormatError
from colbert_jax.index.layouts.stored import (
    DiskIndex,
    are_lengths,
    checked_rows,
    make_codec,
    read_fields,
    read_lengths,
    read_npy,
)
from colbert_jax.tensors.stored import Stored


def read_fastplaid(folder: Path) -> DiskIndex:
    """An index of fast-plaid. All but the large arrays is read and checked.

    An index made with `compress_only` has no inverted lists.

    Raises:
      FileNotFoundError, IndexFormatError: naming the file that is missing, damaged or inconsistent.
    """
    settings = folder / "metadata.json"
    metadata = read_fields(settings, nbits=int, num_chunks=int)
    nbits, num_chunks = metadata["nbits"], metadata["num_chunks"]
    names = dict(centroids="centroids", cutoffs="bucket_cutoffs", weights="bucket_weights")
    files = {name: folder / f"{stem}.npy" for name, stem in names.items()} | {"settings": settings}
    arrays = {name: read_npy(files[name]).read() for name in names}
    # The library rounds these as it loads them.
    with np.errstate(over="ignore"):  # what is too large is refused below
        arrays |= {name: arrays[name].astype(np.float16) for name in ("cutoffs", "weights")}
    dim = arrays["centroids"].shape[-1]
    average = folder / "avg_residual.npy"
    codec = make_codec(
        files,
        **arrays,
        dim=dim,
        nbits=nbits,
    )
    lengths = [read_lengths(folder / f"doclens.{i}.json") for i in range(num_chunks)]
    tokens = [int(chunk.sum()) for chunk in lengths]
    merged_only = metadata.get("frozen") is True and metadata.get("mutable") is not True
    lists = list_lengths = None
    if not metadata.get("compress_only") or present(folder / "ivf.npy"):
        lists, list_lengths = _lists(folder, len(codec.centroids))
    return DiskIndex(
        layout="fast-plaid",
        folder=folder,
        codec=codec,
        lengths=np.concatenate([np.zeros(0, np.int64), *lengths]),
        codes=_parts(folder, "codes", "iu", (), tokens, merged_only),
        residuals=_parts(folder, "residuals", "u", (dim * nbits // 8,), tokens, merged_only),
        lists=lists,
        list_lengths=list_lengths,
        config={},
        avg_residual=float(np.abs(read_npy(average).read()).mean()) if present(average) else None,
    )


def _parts(
    folder: Path,
    name: str,
    kinds: str,
    row: tuple[int, ...],
    tokens: Sequence[int],
    merged_only: bool,
) -> list[Stored]:
    """The rows of every chunk. A shard is newer than the merged file, which may follow behind."""
    merged = folder / f"merged_{name}.npy"
    manifest_file = folder / f"merged_{name}.manifest.json"
    manifest = read_object(manifest_file) if not merged_only and present(manifest_file) else {}
    parts, start = [], 0
    for i, count in enumerate(tokens):
        shard = folder / f"{i}.{name}.npy"
        entry = manifest.get(shard.name)
        rows = entry.get("rows") if isinstance(entry, dict) else count
        if type(rows) is not int or rows < 0:
            raise IndexFormatError(f"{manifest_file}: damaged: {shard.name} has {rows!r} rows")
        if present(merged) and (merged_only or not present(shard)):
            if rows != count:
                raise IndexFormatError(
                    f"{manifest_file}: {shard.name} has {rows} rows, but doclens.{i}.json adds up "
                    f"to {count}; let fast-plaid load the index once"
                )
            stored = read_npy(merged)
            stored = stored.rows(min(start, stored.shape[0]), stored.shape[0])
            # Chunks that follow, and the library's padding.
            parts.append(checked_rows(stored, kinds, row, count, stored.shape[0]))
        elif merged_only or not present(shard):
            raise FileNotFoundError(
                f"{merged}: missing, and {shard.name} too: the index is incomplete: copy it whole"
            )
        else:
            parts.append(checked_rows(read_npy(shard), kinds, row, count, 0))
        start += rows
    return parts


def _lists(folder: Path, num_centroids: int) -> tuple[Stored, np.ndarray]:
    lists, file = read_npy(folder / "ivf.npy"), folder / "ivf_lengths.npy"
    lengths = read_npy(file).read()
    right = lengths.dtype.kind in "iu" and lengths.shape == (num_centroids,)
    if not right or not are_lengths(lengths):
        raise IndexFormatError(f"{file}: expected the sizes of {num_centroids} inverted lists")
    lengths = lengths.astype(np.int64)
    if lists.dtype.kind not in "iu" or lists.shape != (int(lengths.sum()),):
        raise IndexFormatError(
            f"{lists.file}: holds {lists.dtype} {list(lists.shape)}, but {file.name} adds up to "
            f"{lengths.sum()}"
        )
    return lists, lengths
